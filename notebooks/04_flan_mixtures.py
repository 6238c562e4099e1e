# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 04 FLAN mixtures
#
# **What you will see**: clusters, templates and formats; what rates and caps do; how examples are
# packed; what the model reads. **Time**: under a minute.

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
import collections

import numpy as np

import moekit as mk
from moekit.commands.runtime import describe_runtime
from moekit.data.collection import FORMATS, MIXTURES

SETTING = "small"  # "full", with a data folder in MOEKIT_DATA: FLAN 2022's sub-mixtures
mixture = mk.flan_mixture({"small": "builtin", "colab": "builtin", "full": "flan2022"}[SETTING])
print(describe_runtime())
tokenizer = mk.ByteTokenizer()

# %% [markdown]
# ## Clusters
# Tasks of one kind form a cluster. Some clusters are held out completely: none of their tasks is
# trained on, so their scores are about tasks of a new *kind*.

# %%
mixture.describe()

# %%
held_out = collections.defaultdict(list)
for task in mk.suite("builtin").tasks:
    held_out[task.cluster].append(task.name)
for cluster, names in held_out.items():
    print(f"held out: {cluster:22} {', '.join(names)}")
mk.show(mk.plot_rates(mixture), "04-rates")

# %% [markdown]
# ## One example, many forms
# Each task has ten templates. A prompt is written with or without options, with lettered options
# whose letter is the answer, with solved exemplars before the question, with a rationale before the
# answer, or inverted: from the answer to the question.

# %%
tasks = {task.name: task for task in mk.flan_mixture("builtin").tasks}
task = tasks["word_problem"]
example, *others = task.examples("train")[:3]
forms = {
    "zero-shot": {"options": False},
    "options": {"template": 3, "option_style": 0},
    "lettered options": {"template": 1, "option_style": 3},
    "one exemplar": {"template": 5, "options": False, "shots": others[:1]},
    "chain of thought": {"options": False, "chain_of_thought": True},
    "inverted": {"inverted": True},
}
for name, form in forms.items():
    prompt = mk.format_prompt(task, example, **form)
    print(f"[{name}]\n{prompt.input}\n-> {prompt.target}\n")

# %% [markdown]
# ## Rates and caps
# A task's share of its sub-mixture is min(cap, examples) over the sum of these, so that a task of
# ten million rows does not dominate one of a thousand. The rates of the sub-mixtures and their caps
# are those of FLAN 2022 (the public release for the rates; Chung et al. 2022, Table 23, for the
# caps).

# %%
for name, part in MIXTURES["flan2022"].items():
    print(f"{name:10} share {part.share:4.0%}   cap {part.cap:7,}   {FORMATS[part.groups[0]]}")
sizes = {"tiny": 1_000, "small": 20_000, "large": 400_000, "huge": 10_000_000}
rates = {}
for cap in (1_000, 30_000, 10**9):
    capped = {task: min(cap, size) for task, size in sizes.items()}
    name = "no cap" if cap == 10**9 else f"cap {cap:,}"
    rates[name] = {task: count / sum(capped.values()) for task, count in capped.items()}
title = "What a cap does to four tasks of 1 k to 10 M examples"
mk.show(mk.plot_bars(rates, "share of the mixture", title), "04-caps")

# %% [markdown]
# ## The stream
# The order is a function of seed and position: the same on every machine, and resumable at any
# step.

# %%
prompts = mixture.sample(2000)
drawn = collections.Counter(prompt.task for prompt in prompts)
most = max(abs(drawn[task] / 2000 - rate) for task, rate in mixture.rates.items())
print(f"largest deviation of 2,000 draws from the rates: {most:.2%}")
print(f"with exemplars: {np.mean([p.shots > 0 for p in prompts]):.0%}")
for prompt in prompts[:3]:
    print(f"--- {prompt.task}\n{prompt.input}\n>>> {prompt.target}")

# %% [markdown]
# ## Packing
# Several examples share a row, so that there is little padding. Attention does not cross their
# boundaries and positions restart: a packed example has the same outputs as an unpacked one (a test
# checks it).

# %%
lengths = {"input_length": 512, "target_length": 96}
stream = mk.batches(mixture, tokenizer, batch_size=16, seed=0, **lengths)
batch = next(stream)
mk.show(mk.plot_packing(batch), "04-packing")

# %% [markdown]
# ## Your own data
# `mk.task` makes a task of rows: a list of dicts as here, a pandas DataFrame, a `datasets.Dataset`,
# or the path of a .jsonl, .csv or .parquet file. Columns with usual names are found, others are
# named. A part of the rows validates. `mk.mixture` mixes own tasks with others at the rates given.

# %%
rows = [{"frage": f"{n} + {n + 1} = ?", "antwort": str(2 * n + 1)} for n in range(200)]
mine = mk.task(rows, input="frage", target="antwort", name="sums")
both = mk.mixture({mine: 0.3, mixture: 0.7})
prompt = next(prompt for prompt in both.sample(50) if prompt.task == "sums")
print("input: ", prompt.input)
print("target:", prompt.target)
print({split: len(mine.examples(split)) for split in mine.splits}, "metric:", mine.metric)
drawn = sum(prompt.task == "sums" for prompt in both.sample(1000)) / 1000
print(f"share of sums among 1,000 prompts: {drawn:.1%}; its rate is {both.rates['sums']:.1%}")

# %% [markdown]
# A column that does not exist, an empty file or a row without an answer gives one error that shows
# the columns found or the row.

# %%
try:
    mk.task(rows, input="question", target="antwort")
except ValueError as error:
    print(error)

# %% [markdown]
# ## Exercises
# 1. Build a mixture of two tasks at rates 3 to 1: `mk.flan_mixture({"addition": 3, "parity": 1})`.
#    Check the draws.
# 2. Put a held-out task into a mixture. What does the error say, and why is that the default?
# 3. With half the input length, how much of the batch is padding, and which examples suffer?
