# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 01 The MoE layer
#
# **What you will see**: how router logits become a `Routing`; six routers on the same tokens; which
# tokens capacity drops; how tokens are dispatched; what a layer costs; and a router of your own.
# **Time**: about a minute.

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
import jax
import jax.numpy as jnp
from flax import nnx

import moekit as mk
from moekit.bench.layer import layer as bench_layer
from moekit.commands.runtime import describe_runtime
from moekit.moe.capacity import slots_per_expert

SETTING = "small"  # "colab", "full": longer training of the router of your own
STEPS = {"small": 40, "colab": 300, "full": 1000}[SETTING]
print(describe_runtime())

# %% [markdown]
# ## From logits to a Routing
# A router is a function of one group's logits `[S tokens, E experts]`, its padding mask and the
# number of slots of each expert. Its result says which expert and slot every token is assigned to,
# and which token every slot holds. No features are moved yet.

# %%
words = ["the", "router", "sends", "every", "token", "of", "a", "line", "to"]
logits = jax.random.normal(jax.random.key(4), (len(words), 4)) * 2
logits = logits.at[:, 1].add(1.5)  # expert 1 is popular
mask = jnp.ones(len(words), bool).at[-1].set(False)  # the last token is padding
switch = mk.Switch()(logits, mask, capacity=3)
print("expert of each token (4 is none):", switch.expert_index[:, 0])
print("slot of each token (12 is none): ", switch.slot[:, 0])
print("token in each slot (9 is none):  ", switch.slot_to_choice)

# %% [markdown]
# ## Six routers, the same logits
# The darker a cell, the higher the router's probability. A number is the slot in the expert's
# queue; a cross is a choice that found the queue full. Padding (the last row) never takes a slot.
# In Expert Choice, experts choose tokens: load is even, and a token may get no expert or several.

# %%
routers = {
    "Switch": mk.Switch(),
    "top-2": mk.TopK(k=2),
    "GShard": mk.GShard(),
    "batch priority": mk.TopK(k=2, priority="batch"),
    "Expert Choice": mk.ExpertChoice(),
    "random": mk.Random(),
}
routings = {
    name: router(logits, mask, capacity=3, key=jax.random.key(0))
    for name, router in routers.items()
}
mk.show(mk.plot_routing(routings, words), "01-routers")

# %% [markdown]
# ## Capacity
# Each expert has `C = capacity factor x tokens / experts` slots, in one of two conventions:
# multiplied by the number of choices k (Mesh-TensorFlow, GShard) or not (flaxformer). A choice
# without a slot is dropped: the layer returns 0 for it, and the token is left to the residual
# connection.

# %%
tokens, experts = 512, 8
skewed = jax.random.normal(jax.random.key(1), (tokens, experts)) + jnp.linspace(0, 1.5, experts)
everyone = jnp.ones(tokens, bool)
dropped = {}
for name in ("Switch", "top-2", "GShard", "Expert Choice"):
    dropped[name] = {}
    for factor in (0.5, 1.0, 1.25, 2.0, 4.0):
        k = getattr(routers[name], "num_choices", 1) or 1
        slots = slots_per_expert(tokens, experts, factor, choices=k, minimum=4)
        routing = routers[name](skewed, everyone, capacity=slots)
        kept = (routing.slot < experts * slots).any(-1)
        dropped[name][str(factor)] = float(1 - kept.mean())

# %%
fig = mk.plot_bars(dropped, "share of tokens without an expert", "Uneven logits, 512 tokens")
fig.axes[0].set_xlabel("capacity factor (k counted)")
mk.show(fig, "01-capacity")

# %% [markdown]
# ## The layer
# `mk.MoE` is router, dispatch and experts in one nnx module that can be used in any model.
# Dispatch and combine are gathers: a slot reads its token, a token reads the results of its slots.
# No one-hot tensor of tokens x experts x capacity is built.

# %%
moe = mk.MoE(64, 128, 8, router=mk.TopK(k=2), capacity_counts_k=True, rngs=nnx.Rngs(0))
x = jax.random.normal(jax.random.key(2), (4, 32, 64))
y, stats, routing = moe(x)
print("in", x.shape, "out", y.shape)
print("choices of each expert ", stats.load)
print("tokens without any     ", int(stats.dropped_tokens))
print("balance loss (2 = even)", round(float(stats.balance_loss()), 3))

# %% [markdown]
# ## What it costs
# Forward and backward time beside the dense FFN of equal active FLOPs, measured in one run.
# `einsum` is the one-hot dispatch that many codebases use: its cost grows with tokens x slots.

# %%
rows = bench_layer(tokens=1024, d_model=128, d_ff=352, repeats=5)
names = {(r["experts"], r["k"]): f"{r['experts']} experts, top-{r['k']}" for r in rows}
ratios = {
    variant: {
        names[r["experts"], r["k"]]: r["ratio_to_dense"] for r in rows if r["variant"] == variant
    }
    for variant in ("capacity", "einsum")
}
title = "Time of a layer, 1,024 tokens of 128"
fig = mk.plot_bars(ratios, "time over dense FFN", title, ("dense FFN", 1.0))
mk.show(fig, "01-cost")

# %% [markdown]
# ## A router of your own
# A router chooses experts and weights; `mk.assign` assigns slots. This one is top-1 with noisy
# logits during training (when a key is given), a simple way to make the router try other experts.


# %%
def noisy_switch(logits, mask, *, capacity, limit=None, key=None, **_):
    noise = 0.0 if key is None else jax.random.gumbel(key, logits.shape)
    probs = jax.nn.softmax(logits)
    choice = jnp.argmax(logits + 0.5 * noise, -1)[:, None]
    weight = jnp.take_along_axis(probs, choice, -1)
    return mk.assign(choice, weight, probs, mask, capacity=capacity, limit=limit)


noisy_switch.causal = True  # token order: allowed in a decoder

# %%
mixture = mk.flan_mixture("builtin")
config = mk.TrainConfig(
    steps=STEPS, batch_tokens=5120, input_length=256, target_length=64, learning_rate=3e-2
)
runs = {}
for name, router in {"Switch": mk.Switch(), "noisy Switch": noisy_switch}.items():
    cfg = mk.preset("switch-nano").replace(router=router)
    runs[name] = mk.train(mk.EncoderDecoder(cfg, seed=0), mixture, config).metrics
key, label = "encoder_load_entropy", "load entropy (nats; log 8 = 2.08 is even)"
mk.show(mk.plot_learning_curves(runs, key, label, "A router of your own"), "01-own-router")

# %% [markdown]
# ## Exercises
# 1. Why does top-1 with weights divided by their sum leave the router without a gradient? Set
#    `mk.TopK(k=1, normalise=True)` and look at the gradient of `moe.router.w_de`.
# 2. Remove `noisy_switch.causal = True`. Read the error: what would leak, and where?
# 3. In the capacity figure, which router drops least at factor 1.0, and why can it not be used in
#    a decoder?
