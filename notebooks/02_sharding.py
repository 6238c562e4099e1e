# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 02 Sharding
#
# **What you will see**: a model sharded over eight devices; which device holds which part of a
# parameter; what an MoE layer communicates on three meshes; the same numbers on all of them; the
# compiled program line by line; the cost of rematerialization. **Time**: about two minutes.

# %%
# Outside a clone (Colab, Kaggle) this installs moekit; the runtime's jax stays as it is.
import subprocess
import sys
from importlib import metadata, util

REPOSITORY, TAG = "", ""  # filled in by `make release`
if util.find_spec("moekit") is None:
    if not REPOSITORY:
        raise ModuleNotFoundError(
            "moekit is not installed: clone the repository, run `make lab` in the clone "
            "and open this notebook there"
        )
    stack = ("jax", "jaxlib", "libtpu", "flax", "numpy", "ml_dtypes")
    found = [each for each in metadata.distributions() if each.name in stack]
    kept = [f"{each.name}=={each.version}" for each in found]
    source = f"moekit @ git+{REPOSITORY}@{TAG}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", source, *kept], check=True)

# %%
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import moekit as mk
from moekit.commands.runtime import describe_runtime
from moekit.planning.chips import CHIPS
from moekit.planning.program_cost import program_cost
from moekit.training.step import abstract_batch, compiled_step

SETTING = "small"  # "colab": the mini model; "full": the base model on eight TPU chips themselves
SIZE = {"small": "nano", "colab": "mini", "full": "base"}[SETTING]
if SETTING != "full":  # virtual devices of the CPU
    jax.config.update("jax_platforms", "cpu")

# %% [markdown]
# ## Eight devices
# `make_mesh` splits one CPU into virtual devices if it is called before anything else uses jax.
# They share two cores, so nothing gets faster. But the programs are real: every device runs its own
# part, and the parts communicate what chips would communicate.

# %%
mesh = mk.make_mesh(data=2, expert=2, model=2)
print(describe_runtime())
print(jax.devices())
for name, size in mesh.shape.items():
    print(f"{name:7} {size}")
print("device numbers [data, expert, model]:", np.vectorize(lambda d: d.id)(mesh.devices).tolist())

# %% [markdown]
# ## Parameter placement
# Parameters carry names for their dimensions ("expert", "embed", "mlp", ..), and one small table,
# `moekit.sharding.Sharding`, maps these names to mesh axes. Each parameter is created sharded: no
# device and no host ever holds the whole model. The numbers in the picture are devices. An expert's
# matrix is sharded along experts (axis expert), along its features (the remaining axis: data) and
# along its hidden features (model). A dense matrix has no experts, so its features are sharded over
# data *and* expert: every device uses the dense matrices, but none stores a whole one. Norms are
# small and replicated.


# %%
def three_of(model):
    first, last = model.encoder.blocks[0], model.encoder.blocks[-1]
    experts, dense, norm = last.moe.experts.wi_edf, first.ffn.wi_df, first.ffn_norm.scale_d
    return {"experts wi_edf": experts, "dense wi_df": dense, "norm scale_d": norm}


model = mk.EncoderDecoder(mk.preset(f"st-{SIZE}"), seed=0, mesh=mesh)
mk.show(mk.plot_sharding(three_of(model)), "02-placement")

# %% [markdown]
# The same three parameters with all devices on the expert axis: one expert each. The first
# dimension of every parameter counts the scanned layers; it is never sharded.

# %%
model = mk.EncoderDecoder(mk.preset(f"st-{SIZE}"), seed=0, mesh=mk.make_mesh(expert=8))
mk.show(mk.plot_sharding(three_of(model)), "02-eight-experts")

# %% [markdown]
# The memory that this takes, beside that of full replication and that of plain expert parallelism,
# which shards only the experts, as many early MoE systems did.

# %%
held = {"here": 0.0, "replicated": 0.0, "only experts split": 0.0}
kinds = {"experts": dict(held), "dense": dict(held)}
is_variable = {"is_leaf": lambda leaf: isinstance(leaf, nnx.Variable)}
for parameter in jax.tree.leaves(nnx.state(model, nnx.Param), **is_variable):
    array, expert = parameter[...], "expert" in parameter.axes
    kind = kinds["experts" if expert else "dense"]
    kind["here"] += array.addressable_shards[0].data.nbytes / 2**20
    kind["replicated"] += array.nbytes / 2**20
    kind["only experts split"] += array.nbytes / 2**20 / (8 if expert else 1)
title = f"{model.cfg.name} on eight devices, float32 parameters"
mk.show(mk.plot_bars(kinds, "MiB on each device", title), "02-bytes")

# %% [markdown]
# ## Communication
# Now one MoE layer alone: 16 rows of 128 tokens, top-2 of 8 experts, forward and backward, compiled
# for three meshes with both kinds of dispatch. `program_cost` reads the compiled program and counts
# every collective with the mesh axes along which its devices differ. The groups of 128 tokens that
# are routed together are the same everywhere, or else drops would differ.

# %%
x = jax.random.normal(jax.random.key(1), (16, 128, 64))
options = {"router": mk.TopK(k=2), "capacity_counts_k": True, "group_size": 128}


def program(dispatch, mesh):
    layer = mk.MoE(64, 256, 8, dispatch=dispatch, mesh=mesh, rngs=nnx.Rngs(0), **options)
    graphdef, params = nnx.split(layer)

    def loss(params, x):
        y, stats, _ = nnx.merge(graphdef, params)(x)
        return jnp.mean(y**2) + 0.01 * stats.balance_loss(), stats.dropped_assignments

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    compiled = step.lower(params, x).compile()
    return compiled, jax.device_get(compiled(params, x))


# %%
meshes = {
    "1x8": mk.make_mesh(expert=8),
    "2x4": mk.make_mesh(data=2, expert=4),
    "2x2x2": mk.make_mesh(data=2, expert=2, model=2),
}
programs = {
    (dispatch, name): program(dispatch, mesh)
    for dispatch in ("capacity", "dropless")
    for name, mesh in {"one device": None, **meshes}.items()
}

# %%
traffic = {}
for (dispatch, name), (compiled, _) in programs.items():
    if name in meshes:
        cost = program_cost(compiled.as_text(), meshes[name], CHIPS["v5e"], lambda *_: 0.0)
        traffic[dispatch, name] = cost.collectives
for (dispatch, name), collectives in traffic.items():
    print(f"{dispatch}, {name}")
    for (op, axis), found in sorted(collectives.items()):
        print(f"  {found.count:2} {op:15} over {axis:12} {found.nbytes / 1e3:8.2f} kB")

# %% [markdown]
# **Capacity**: four all-to-alls on every mesh. Slots are dispatched to their experts, results are
# returned, and the backward pass does both again for the gradients. Each sends
# `slots x features x bytes x (n - 1) / n`: on 1x8 a device has two groups of 8 experts x 40 slots,
# so 640 x 64 x 4 x 7/8 = 143 kB, four times. On the first two meshes no other collective moves
# tokens. The others move weights: with a data axis, each expert's matrices are sharded over it as
# well, all-gathered just before use, and their gradients are reduce-scattered.
#
# **Dropless**: the number of tokens per expert is not known in advance, so here all tokens along
# the expert axis are all-gathered, each device computes those of its experts, and a reduce-scatter
# sums the results. On an axis of two devices this moves fewer bytes than the slots, on one of eight
# three times as many. (TPUs and GPUs use a ragged all-to-all instead.)
#
# **The model axis** shards each expert's hidden features: its two all-reduces, one forward and one
# backward, move whole activations. That is why it is the last axis to use.

# %%
axes = ("expert", "data", "model", "data+expert")
sent = {axis: dict.fromkeys([f"{n}\n{d}" for d, n in traffic], 0.0) for axis in axes}
for (dispatch, name), collectives in traffic.items():
    for (_, axis), found in collectives.items():
        sent[axis][f"{name}\n{dispatch}"] += found.nbytes / 1e3
fig = mk.plot_bars(sent, "kB a device sends", "An MoE layer, forward and backward, by mesh axis")
fig.axes[0].set_xlabel("mesh (data x expert x model) and dispatch")
mk.show(fig, "02-traffic")

# %% [markdown]
# ## The same numbers everywhere
# Loss, number of dropped choices, and the largest difference of any gradient from that of one
# device. The remaining difference is rounding: sums are taken in another order.

# %%
for (dispatch, name), (_, ((loss, drops), grads)) in programs.items():
    (_, _), expected = programs[dispatch, "one device"][1]
    off = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), grads, expected)
    worst = max(map(float, jax.tree.leaves(off)))
    print(f"{dispatch:9} {name:11} loss {loss:.7f}  {drops:4.0f} dropped  gradients {worst:.0e}")

# %% [markdown]
# ## The compiled program, line by line
# XLA compiles the layer with capacity on 1x8 to a text of thousands of lines. It is the program of
# one device: all shapes are those of one device. Only a few lines matter here. Each ends with the
# place in our source that it comes from: `jvp()` is the forward pass, `transpose(jvp())` the
# backward pass.

# %%
lines = programs["capacity", "1x8"][0].as_text().splitlines()


def excerpt(word, width=96):
    for number, line in enumerate(lines):
        if re.search(rf" {word}\(", line):
            source = re.search(r'op_name="jit\(loss\)/([^"]*)"', line)
            print(f"{number:5} {line.strip()[:width]} ..")
            print(f"{'':6}from {source[1] if source else '(XLA, no source)'}")


print(len(lines), "lines")
excerpt("all-to-all")

# %% [markdown]
# Four exchanges. The CPU writes an all-to-all as a tuple with one entry for each of eight devices:
# each entry `f32[80,64]` is 80 slots (two groups of 40) of 64 features, sent to one device. A TPU
# writes one array of 640 rows instead. Two come from `jvp()`, two from `transpose(jvp())`: autodiff
# adds the backward ones, because the transpose of an all-to-all is an all-to-all.

# %%
excerpt("all-gather")
excerpt("reduce-scatter")

# %% [markdown]
# The router's matrix is dense, so its 64 x 8 weights are sharded over the devices, 8 rows each.
# They are all-gathered before the logits are computed; the reduce-scatter, its transpose, sums the
# gradients of all devices and leaves each device its 8 rows.

# %%
excerpt("all-reduce")

# %% [markdown]
# A group like `{0},{1},..` holds one device only: such a line sums over an axis of size one, moves
# nothing, and is not counted by `program_cost`. The other all-reduce sums the layer's statistics, a
# few numbers, for the balance loss and the log.

# %%
excerpt("dot")

# %% [markdown]
# The matmuls. `[640,256]` are an expert's 640 slots (80 from each of eight devices) times its
# hidden features. There are two up projections (the gate and the input of the gated GELU) and one
# down projection; the backward pass has two matmuls for each of these, one for the gradient of the
# weights and one for that of the slots. The other three are the router's: the logits `[256,8]` of
# this device's tokens and their two gradients, in the highest precision.

# %% [markdown]
# ## The cost of rematerialization
# `remat="full"` stores only each layer's input and recomputes the layer in the backward pass. That
# saves memory and costs FLOPs. In an MoE it also costs communication: the recomputed layer
# dispatches its tokens again. Here is the whole training step of two stacks of eight layers; every
# second one is an MoE layer.

# %%
cfg = mk.preset(f"st-{SIZE}").replace(encoder_layers=8, decoder_layers=8)
cfg = cfg.replace(encoder_moe_layers=4, decoder_moe_layers=4)
mesh = meshes["2x4"]
model = nnx.eval_shape(lambda: mk.EncoderDecoder(cfg, mesh=mesh))
for remat in ("none", "full"):
    config = mk.TrainConfig(batch_tokens=20_480, input_length=256, target_length=64, remat=remat)
    step = compiled_step(model, config)
    compiled = step.update.lower(step.state, abstract_batch(config, mesh)).compile()
    cost = program_cost(compiled.as_text(), mesh, CHIPS["v5e"], lambda *_: 0.0)
    exchanges = cost.collectives["all-to-all", "expert"]
    print(
        f"remat {remat}: {compiled.memory_analysis().temp_size_in_bytes / 2**20:4.0f} MiB of "
        f"temporaries, {cost.flops / 1e9:.1f} GFLOP, {exchanges.count} all-to-alls of "
        f"{exchanges.nbytes / 1e6:.1f} MB in all, on each device"
    )

# %% [markdown]
# Without rematerialization each of the eight MoE layers has four all-to-alls. With it there are
# six: dispatch and return run once more. The return is needed too, because the gradient of a
# combine weight is a product with the expert's output. `remat="dots"` is in between: it stores the
# results of matmuls with weights.

# %% [markdown]
# ## Exercises
# 1. How many bytes would the four all-to-alls of 1x8 send with `mk.Switch()`, and with
#    `capacity_factor=2.0`? Compute first, then compare with `program_cost`.
# 2. Set `group_size=256` on the one device only. Which of the compared numbers changes, and why
#    can no mesh of eight devices and 16 rows be compared with groups of 512 tokens?
# 3. A batch of 8 times as many tokens: which bars of the communication figure grow?
