# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 05 Instruction tuning
#
# **What you will see**: the FLAN stage on the models of notebook 03, dense and sparse; loss, router
# balance and held-out scores during training; before and after, with intervals. **Time**: about
# four minutes.

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
from moekit.commands.runtime import describe_runtime

SETTING = "small"  # "colab": ten minutes on one TPU v5e or T4; "full": longer, a TPU VM
setup = mk.StudySetup(mk.StudyConfig.named(SETTING))
print(describe_runtime())
before = {family: setup.pretrain(family).model for family in ("t5", "st")}  # of notebook 03

# %% [markdown]
# ## Questions of a new kind
# The held-out clusters are never trained on. A model of this size stores little knowledge; what can
# transfer from the held-in tasks is to find the answer in the text of the question. Options are
# ranked by their likelihood and not shown (`options=False`), so that the question is all the model
# reads. State tracking needs several steps of bookkeeping: expect chance there.

# %%
suite = mk.suite("builtin")
scores = {
    name: mk.evaluate(model, suite, limit=100, options=False) for name, model in before.items()
}
for each in scores.values():
    mean = each.mean
    print(
        f"{each.name}: {mean.score:.1%} ({mean.low:.1%} to {mean.high:.1%}; chance "
        f"{mean.chance:.1%}, the most common answer {mean.majority:.1%})"
    )

# %% [markdown]
# ## The FLAN stage
# Zero- and few-shot prompts, with and without options, some rationales. Mini models get dropout
# 0.05 and expert dropout 0.2 as in the paper; a nano model underfits in its two minutes and gets
# none, and mostly short prompts. These settings of nano were chosen by looking at held-out scores,
# so its improvement shows that the stage works here, not how large it is elsewhere. A callback
# evaluates held-out questions during training.

# %%
runs = {}
for name, model in before.items():
    watch = mk.evaluation_callback(suite, "held_out_score", limit=20, options=False)
    runs[name] = setup.tune(model, callbacks=[watch])
curves = {run.model.cfg.name: run.metrics for run in runs.values()}
label = "validation loss (nats a target token)"
mk.show(mk.plot_learning_curves(curves, "valid_loss", label, "Instruction tuning"), "05-loss")

# %%
chance = scores["t5"].mean.chance
label = "mean held-out score (20 questions a task)"
fig = mk.plot_learning_curves(
    curves, "held_out_score", label, "Held-out tasks during tuning", [("chance", chance)]
)
mk.show(fig, "05-held-out")

# %%
mk.show(runs["st"].metrics.plot("st: the FLAN stage"), "05-st-metrics")

# %% [markdown]
# ## Before and after
# The questions are the same, so the difference is paired: its interval resamples questions, not
# models. This is one seed; the interval does not cover other seeds.

# %%
tuned = {
    name: mk.evaluate(run.model, suite, limit=100, options=False) for name, run in runs.items()
}
for name in tuned:
    mean, change = tuned[name].mean, mk.compare(scores[name], tuned[name])
    print(f"{tuned[name].name}: {mean.score:.1%} ({mean.low:.1%} to {mean.high:.1%})")
    print(f"  against itself before tuning: {change}")

# %%
groups = {}
for stage, results in (("before", scores), ("after", tuned)):
    groups |= {f"{name}, {stage} tuning": [each.to_dict()] for name, each in results.items()}
mk.show(mk.plot_scores(groups, "Held-out tasks, zero-shot"), "05-before-after")

# %%
mk.show(tuned["st"].plot(), "05-st-tasks")

# %% [markdown]
# ## Exercises
# 1. Show the options (`options=True`). Which tasks gain, which lose? What would the model have to
#    do to benefit from them?
# 2. Tune with the router frozen: `mk.instruction_tune(model, setup.mixture,
#    setup.stage(mk.TrainConfig(freeze=("router",), learning_rate=2e-2), setup.config.tune_steps))`.
#    The paper finds that freezing the gate hardly matters.
# 3. Leave the tasks of one cluster out of the mixture (`mk.flan_mixture("builtin", exclude=[..])`).
#    Which held-out score falls most?
