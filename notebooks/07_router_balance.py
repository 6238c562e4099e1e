# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 07 Router balance
#
# **What you will see**: the same small MoE trained with and without its balance loss, with router
# z-loss, and with bias-based balancing; load, entropy, violation and dropped tokens side by side;
# the effect of capacity. **Time**: about three minutes.

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
import dataclasses

import moekit as mk
from moekit.analysis.balance import dropped_assignments
from moekit.commands.runtime import describe_runtime

SETTING = "small"  # "colab": ten minutes on one TPU v5e or T4; "full": longer, a TPU VM
config = mk.StudyConfig.named(SETTING)
config = dataclasses.replace(config, workdir=config.workdir / "balance")
if SETTING == "small":
    config = dataclasses.replace(config, pretrain_steps=200)
setup = mk.StudySetup(config)
print(describe_runtime())

# %% [markdown]
# ## Four ways to train one model
# All are `switch` with eight experts, the same seed and the same batches. They differ in what keeps
# the load even: nothing, the balance loss of Fedus et al. (2021), that and ST-MoE's
# router z-loss, or a bias that is updated after every step without a gradient (Wang et al. 2024).

# %%
variants = {
    "nothing": {"balance_loss": 0.0},
    "balance loss": {"balance_loss": 1e-2},
    "balance + z-loss": {"balance_loss": 1e-2, "router_z_loss": 1e-3},
    "loss-free bias": {"balance_loss": 0.0, "router": mk.LossFree(k=1, rate=1e-2)},
}
runs = {
    name: setup.pretrain("switch", name=name.replace(" ", "-"), **changes)
    for name, changes in variants.items()
}

# %%
curves = {name: run.metrics for name, run in runs.items()}
label = "largest load over mean load, less 1"
title = "Encoder: violation of balance while training"
fig = mk.plot_learning_curves(curves, "encoder_max_violation", label, title, [("even load", 0.0)])
mk.show(fig, "07-violation")

# %%
label, title = "share of tokens dropped", "Encoder: tokens dropped while training (factor 1.25)"
mk.show(mk.plot_learning_curves(curves, "encoder_dropped", label, title), "07-dropped")

# %% [markdown]
# ## After training
# The routing of held-out text. `confidence` is the mean combine weight, `router entropy` how
# undecided the router is about a token; load entropy is that of all tokens together. A router can
# be certain about every token and balanced over all of them. These texts have no target, so only
# the encoder is traced.

# %%
traces = {name: setup.trace(run.model) for name, run in runs.items()}
for name, trace in traces.items():
    print(f"[{name}]\n{mk.balance_table(trace)}\n")

# %%
mk.show(mk.plot_expert_load(traces["nothing"]), "07-load-nothing")

# %%
mk.show(mk.plot_expert_load(traces["balance loss"]), "07-load-balance-loss")

# %% [markdown]
# ## The effect of balancing on the loss
# Does weaker balancing improve the loss? At this length of training the differences are small and
# one seed cannot rank them; the ablations of the paper go both ways (FLAN-EC-base gains from the
# balance loss, FLAN-ST-base loses).

# %%
for name, run in runs.items():
    loss = run.metrics.last("valid_loss")
    print(f"{name:18} held-out loss {loss:.3f} (unigram {setup.unigram_entropy:.3f})")

# %% [markdown]
# ## Capacity at evaluation
# The same trained model, evaluated with other capacity factors: the router's choices are similar,
# the number of dropped tokens is not.

# %%
prompts = mk.text_prompts(setup.corpus, 16, characters=300)
dropped = {"nothing": {}, "balance loss": {}}
for name in dropped:
    for factor in (0.5, 1.0, 1.25, 2.0, 4.0):
        cfg = runs[name].model.cfg.replace(eval_capacity_factor=factor)
        model = mk.with_config(runs[name].model, cfg)
        trace = mk.trace_routing(model, prompts, input_length=128, target_length=8)
        dropped[name][str(factor)] = float(dropped_assignments(trace)[0])

# %%
fig = mk.plot_bars(
    dropped, "share of choices without a slot", "Drops by evaluation capacity factor"
)
fig.axes[0].set_xlabel("capacity factor")
mk.show(fig, "07-capacity")

# %% [markdown]
# ## Exercises
# 1. Multiply the balance coefficient by 100. What happens to confidence, and to the loss?
# 2. Count dropped tokens with `mk.GShard()` at the same factor in both capacity conventions
#    (`capacity_counts_k`).
# 3. Which of the measures in the table would still look fine if two layers collapsed onto
#    *different* experts and you pooled them? That is why every number here is per layer.
