# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 00 Start here
#
# **What you will see**: the devices of this machine, how a model is placed on them, and a small
# Mixture-of-Experts model that is trained, evaluated and analysed. **Time**: about a minute on two
# CPU cores.
#
# moekit rebuilds FLAN-MoE (Shen et al. 2023): sparse encoder-decoder models that are pretrained by
# span corruption and then instruction-tuned on many tasks. The notebooks are ordered: 01 the MoE
# layer, 02 sharding, 03 pretraining, 04 the instruction mixture, 05 instruction tuning, 07 router
# balance, 08 expert specialization, 10 real checkpoints, 11 scaling to pods.

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
import moekit as mk
from moekit.commands.doctor import as_text, report
from moekit.commands.runtime import describe_runtime

SETTING = "small"  # "colab": ten minutes on one TPU v5e or T4; "full": a TPU VM
SIZE, STEPS, BATCH_TOKENS = {
    "small": ("nano", 60, 5120),
    "colab": ("mini", 500, 16_384),
    "full": ("mini", 2000, 65_536),
}[SETTING]
print(describe_runtime())

# %% [markdown]
# ## What runs where
# `moekit doctor` prints this and more. On a Cloud TPU VM or Colab TPU the devices are chips, on a
# laptop one CPU. For a CPU with several virtual devices call `mk.make_mesh(expert=8)` before
# anything else uses jax: it is slow, but runs the same program as eight chips.

# %%
found = report()
found["environment"] = ""  # jax's own description of it is long
print(as_text(found))

# %% [markdown]
# ## A mesh and a model sharded over it
# The mesh has three axes: tokens are sharded over `data` and `expert`, experts over `expert`, and
# single matrices over `model`. The remaining devices go to `data`.

# %%
mesh = mk.make_mesh()
cfg = mk.preset(f"st-{SIZE}")
model = mk.EncoderDecoder(cfg, seed=0, mesh=mesh)
print(dict(mesh.shape))
print(f"{cfg.name}: {cfg.num_experts} experts, {cfg.num_parameters()}")
for name in ("wi_edf", "wg_edf", "wo_efd"):
    weight = getattr(model.encoder.blocks[-1].moe.experts, name)[...]
    print(f"{name:8} {weight.shape} on {len(weight.sharding.device_set)} device(s)")

# %% [markdown]
# ## Train it
# The embedded mixture needs no network: tasks cut from the documentation of installed packages and
# from seeded generators. Training is one call; its result is `run`. `LivePlot` draws the losses
# while the model trains.

# %%
mixture = mk.flan_mixture("builtin")
config = mk.TrainConfig(
    steps=STEPS,
    batch_tokens=BATCH_TOKENS,
    input_length=256,
    target_length=64,
    learning_rate=5e-2,
    schedule="rsqrt",
    warmup_steps=20,
)
run = mk.train(model, mixture, config, on_log=mk.LivePlot(cfg.name))

# %% [markdown]
# The log has more than the losses: the accuracy, the gradient's norm, and how evenly the routers
# spread the tokens.

# %%
mk.show(run.metrics.plot(f"{cfg.name}, its first {STEPS} steps"), "00-training")

# %% [markdown]
# ## Evaluate it
# Such a short training teaches the form of answers and little else. The interval and the chance
# level beside each score show which tasks have improved.

# %%
tasks = [task for task in mixture.tasks if task.name in ("largest", "longest_word", "parity")]
mk.evaluate(model, tasks, limit=50)

# %%
print(mk.generate(model, "What is 3 + 4?", max_new_tokens=8))

# %% [markdown]
# ## Look at its routing
# A `RouterTrace` stores which token was routed to which expert in which layer. All analyses read
# it.

# %%
trace = mk.trace_routing(model, mixture.sample(128))
mk.balance_table(trace)

# %%
mk.show(mk.plot_expert_load(trace), "00-expert-load")

# %% [markdown]
# ## Exercises
# 1. Give the model another router: `mk.preset("st-nano").replace(router=mk.ExpertChoice(),
#    decoder_router=mk.Switch())`. Which of the curves above changes at once?
# 2. Evaluate with `shots=2`. Does a model that cannot do the task benefit from solved examples?
# 3. Replace `st` by `t5`: the dense twin of equal FLOPs per token. What can no longer be drawn?
