# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 03 Pretraining by span corruption
#
# **What you will see**: how text becomes inputs and targets; a dense and a sparse model of equal
# FLOPs per token trained on the same batches; what they generate. **Time**: about two minutes. The
# later notebooks start from the models that this one trains.

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
import json
from pathlib import Path

import numpy as np

import moekit as mk
from moekit.analysis.recorded import plot_recorded_seeds, seed_losses
from moekit.commands.runtime import describe_runtime

SETTING = "small"  # "colab": ten minutes on one TPU v5e or T4; "full": longer, a TPU VM
setup = mk.StudySetup(mk.StudyConfig.named(SETTING))
print(describe_runtime())

# %% [markdown]
# ## The text
# Documentation that comes with Python and the installed packages: real English, no download. The
# package is the domain label. Every object (a topic, a function, a class) is in exactly one split.

# %%
characters = {}
for document in setup.corpus.documents("train"):
    characters[document.domain] = characters.get(document.domain, 0) + len(document.text)
total = sum(characters.values())
print(f"{len(setup.corpus.documents('train')):,} documents, {total:,} characters, of these")
for domain, count in sorted(characters.items(), key=lambda item: -item[1]):
    print(f"  {domain:20} {count / total:6.1%}")
print(f"{setup.tokenizer.vocab_size} token ids, trained on this text")

# %% [markdown]
# ## Span corruption
# 15 % of the tokens are hidden, in spans of 3 on average. Each span is replaced by a sentinel; the
# target lists the sentinels with what they hide.

# %%
text = setup.corpus.documents("valid")[3].text[:220]
ids = np.array(setup.tokenizer.encode(text), np.int32)
inputs, targets = mk.span_corruption(ids, np.random.default_rng(0), tokenizer=setup.tokenizer)
print("text:   ", text)
print("input:  ", setup.tokenizer.decode(inputs))
print("target: ", setup.tokenizer.decode(targets))

# %% [markdown]
# ## Two models of equal FLOPs
# `st` has eight experts, each a quarter as wide as the dense layer; each token uses two of them and
# ST-MoE's extra dense FFN. It has more parameters; the FLOPs per token are equal.

# %%
for family in ("t5", "st"):
    cfg = setup.model_config(family)
    parameters, flops = cfg.num_parameters(), cfg.flops_per_token()
    print(
        f"{cfg.name:8} {parameters.total / 1e6:.2f} M parameters, {parameters.active / 1e6:.2f} M "
        f"active, {flops[0] / 1e6:.2f} / {flops[1] / 1e6:.2f} MFLOPs per encoder / decoder token"
    )

# %% [markdown]
# ## Training
# The dashed line is the unigram entropy: the loss of the best model that uses only the frequencies
# of the target tokens.

# %%
runs = {family: setup.pretrain(family) for family in ("t5", "st")}
curves = {run.model.cfg.name: run.metrics for run in runs.values()}
levels = [("unigram entropy of the same targets", setup.unigram_entropy)]
label = "held-out loss (nats a target token)"
fig = mk.plot_learning_curves(curves, "valid_loss", label, "Span corruption", levels)
mk.show(fig, "03-pretraining")

# %%
for name, metrics in curves.items():
    loss = metrics.last("valid_loss")
    print(f"{name}: {loss:.3f} nats, {setup.unigram_entropy - loss:.3f} under the unigram entropy")
    assert loss < setup.unigram_entropy - 0.5, "this run has not learned: look at its curves"

# %%
mk.show(runs["st"].metrics.plot("st: losses, balance, drops"), "03-st-metrics")

# %% [markdown]
# ## Over seeds
# One seed and a few minutes of training decide nothing between dense and sparse. These recorded
# runs train nano models with the settings of this notebook for 3.4 M tokens, eight seeds each
# (`assets/results/premise-nano-seeds.json`; a dot is a seed, the bar a standard error). The last
# row is a dense model in which every token uses the parameters of all eight experts: what it gains
# over the dense model is about the most that sparsity could gain here.

# %%
folders = [Path("assets/results"), Path("../assets/results")]
records = [folder / "premise-nano-seeds.json" for folder in folders]
record = json.loads(next(path for path in records if path.exists()).read_text())
losses = seed_losses(record, step=1332)
mk.show(plot_recorded_seeds(record, step=1332), "03-seeds")

# %%
dense = np.array(losses["dense (t5-nano)"])
for name in ("switch, 8 experts", "st-nano", "dense with all experts' parameters"):
    values = np.array(losses[name])
    error = np.sqrt(values.var(ddof=1) / len(values) + dense.var(ddof=1) / len(dense))
    print(f"{name}: {values.mean() - dense.mean():+.3f} +- {error:.3f} nats from dense")

# %% [markdown]
# The feed-forward layers are not what limits these models: even with all experts for every token
# the gain is as small as the spread over seeds, so no sparse model can be clearly better at this
# size and length. A switch model with one expert is the dense network, and it trains like it.
#
# ## What do they generate?

# %%
shown = setup.tokenizer.decode(inputs).split("<extra_id_1>")[0].strip()
for run in runs.values():
    said = mk.generate(run.model, [shown], max_new_tokens=12)[0]
    print(f"{run.model.cfg.name}: {said!r}")
print("input:", shown)

# %% [markdown]
# ## Exercises
# 1. Change the mean span: `mk.span_corruption(..., mean_span=1.0)`. How do input and target lengths
#    change, and what does that do to the cost of a step?
# 2. `setup.pretrain("switch")` trains another family of equal FLOPs. Where does it lie?
# 3. Train `st` with another seed: `dataclasses.replace(mk.StudyConfig.named("small"), seed=1)`. Is
#    the distance between dense and sparse larger than between seeds?
