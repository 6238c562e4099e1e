# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 10 From real checkpoints
#
# **What you will see**: a T5 checkpoint in the files of the Hugging Face hub is loaded, turned into
# a Mixture-of-Experts model (sparse upcycling), tuned on a FLAN mixture beside its dense twin,
# evaluated, exported and loaded again; its routing before and after. **Time**: two minutes.

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
import shutil
from pathlib import Path

import numpy as np

import moekit as mk
from moekit.commands.runtime import describe_runtime
from moekit.training.validation import evaluate_loss

SETTING = "small"  # "colab": ten minutes on one TPU v5e or T4; "full": a TPU VM and MOEKIT_DATA
FOLDER = Path(f"runs/{SETTING}/real")
DENSE, SWITCH, MIXTURE, SUITE, AXES = {
    "small": (FOLDER / "t5", FOLDER / "switch", "builtin", "builtin-heldin", {}),
    "colab": ("google/flan-t5-small", "google/switch-base-8", "builtin", "builtin-heldin", {}),
    "full": ("google/flan-t5-base", "google/switch-base-8", "flan2022", "bbh", {"expert": 8}),
}[SETTING]
STEPS, BATCH_TOKENS = {"small": (90, 2560), "colab": (300, 16_384), "full": (10_000, 65_536)}[
    SETTING
]
print(describe_runtime())

# %% [markdown]
# ## What the public checkpoints have learned
#
# | on the hub | trained on | answers questions? |
# | --- | --- | --- |
# | `google-t5/t5-small` .. `t5-11b` (v1.0) | span corruption, supervised tasks | of those tasks |
# | `google/t5-v1_1-small` .. `xxl` | span corruption | no |
# | `google/flan-t5-small` .. `xxl` | span corruption, then FLAN | yes |
# | `google/switch-base-8` .. `switch-c-2048` | span corruption | no |
#
# **Public Switch checkpoints are pretrained only: they speak gibberish until they are tuned.**
# Nobody has published the weights of FLAN-MoE. This notebook is one way to such weights: from a
# dense model that follows instructions to a sparse one, which is then tuned further.
#
# The small setting needs no network: it writes two checkpoints itself, in the same files as the
# hub's: a dense T5 that has seen a few batches of the mixture, and a Switch Transformer with random
# weights.

# %%
mixture = mk.flan_mixture(MIXTURE)
config = mk.TrainConfig(
    steps=STEPS,
    batch_tokens=BATCH_TOKENS,
    input_length=128 if SETTING == "small" else 512,
    target_length=32 if SETTING == "small" else 128,
    learning_rate=5e-2 if SETTING == "small" else 1e-3,
    schedule="rsqrt" if SETTING == "small" else "constant",
    warmup_steps=20,
)
shutil.rmtree(FOLDER, ignore_errors=True)  # of an earlier run: exports replace nothing

# %%
if SETTING == "small":
    FOLDER.mkdir(parents=True)
    texts = [f"{prompt.input}\n{prompt.target}" for prompt in mixture.sample(3000)]
    tokenizer = mk.train_sentencepiece(texts, FOLDER / "spiece.model", 1024)
    words = {"tokenizer": str(tokenizer.path), "vocab_size": tokenizer.vocab_size}
    started = mk.EncoderDecoder(mk.preset("t5-nano").replace(**words), seed=0, mesh=mk.make_mesh())
    mk.train(started, mixture, config.replace(steps=150))
    mk.export(DENSE, started)
    as_published = {"activation": "relu", "tied_logits": True, "dispatch": "dropless"}
    switch = mk.preset("switch-nano").replace(**as_published, **words)
    mk.export(SWITCH, mk.EncoderDecoder(switch, seed=0))
    for path in sorted(FOLDER.glob("*/*")):
        print(f"{path.relative_to(FOLDER)}: {path.stat().st_size:,} bytes")

# %% [markdown]
# ## In
# `mk.load` reads a hub id, a folder of these files, or a checkpoint of moekit's own, straight into
# the shards of a mesh. Architecture, tokenizer and generation settings come along.

# %%
mesh = mk.make_mesh(**AXES)
dense = mk.load(DENSE, mesh=mesh)
questions = ["What is 3 + 4?", "Which is larger, 12 or 7?"]
for name, model in {"dense T5": dense, "Switch, not tuned": mk.load(SWITCH)}.items():
    cfg = model.cfg
    total = cfg.num_parameters().total
    print(f"{name}: {cfg.encoder_layers} + {cfg.decoder_layers} layers, {total / 1e6:.1f} M")
    for question in questions:
        answer = mk.generate(model, question, max_new_tokens=12)
        print(f"  {question} -> {answer!r}")

# %% [markdown]
# ## Sparse upcycling
# Komatsuzaki et al. (2022) start an MoE model from a dense one: each expert $E_i$ is a copy of the
# dense FFN of its layer, the router is new. A sparse layer computes, with the combine weights $w_i$
# of the chosen experts,
#
# $$y = \sum_{i \in \text{top } k} w_i\, E_i(x) = \Big(\sum_{i \in \text{top } k} w_i\Big)\,
# \text{FFN}(x),$$
#
# so that nothing changes at step 0 if the weights add up to 1 (`normalise=True`) and no token is
# dropped. Raw probabilities, as in Switch, add up to about $k / E$ under a new router: the layer's
# output shrinks, and the model is another one at step 0.

# %%
sparse = {"num_experts": 8, "dispatch": "dropless"}
sparse["encoder_moe_layers"] = dense.cfg.encoder_layers // 2  # every second layer
sparse["decoder_moe_layers"] = dense.cfg.decoder_layers // 2
routers = {"top-2, normalised": mk.TopK(k=2, normalise=True), "Switch, raw": mk.Switch()}
models = {"dense": dense}
for name, router in routers.items():
    models[name] = mk.upcycle(dense, dense.cfg.replace(name="upcycled", router=router, **sparse))
upcycled = models["top-2, normalised"]
for name in ("dense", "top-2, normalised"):
    parameters, flops = models[name].cfg.num_parameters(), models[name].cfg.flops_per_token()
    print(
        f"{name}: {parameters.total / 1e6:.2f} M parameters, {parameters.active / 1e6:.2f} M "
        f"active, {flops[0] / 1e6:.2f} / {flops[1] / 1e6:.2f} MFLOPs per encoder / decoder token"
    )

# %%
lengths = {"input_length": config.input_length, "target_length": config.target_length}
tokenizer = mk.load_tokenizer(dense.cfg.tokenizer)
batch = next(mk.batches(mixture, tokenizer, batch_size=config.batch_size, seed=1, **lengths))
losses = {name: evaluate_loss(model, [batch])["valid_loss"] for name, model in models.items()}
added = {name: losses[name] - losses["dense"] for name in routers}
label = "loss above the dense model's (nats)"
mk.show(mk.plot_bars({"a batch of the mixture": added}, label, "Upcycled, step 0"), "10-step-0")

# %%
print(f"dense: {losses['dense']:.4f} nats a target token; upcycled, before any training:")
for name in routers:
    print(f"{name:18} {losses[name]:.4f} ({added[name]:+.4f})")
assert abs(added["top-2, normalised"]) < 1e-3

# %% [markdown]
# ## Tune
# The upcycled model and its dense twin continue with the same batches. The routers learn from the
# first step on; the experts, equal at first, become different because they see different tokens.
# The upcycled model spends more FLOPs on a token, as printed above: two experts of the dense width.

# %%
prompts = mixture.sample(400)
before = mk.trace_routing(upcycled, prompts, **lengths)
runs = {}
for name, model in {"dense": dense, "upcycled": upcycled}.items():
    runs[name] = mk.train(model, mixture, config)
curves = {name: run.metrics for name, run in runs.items()}
label = "training loss (nats a target token)"
mk.show(mk.plot_learning_curves(curves, "loss", label, "FLAN tuning"), "10-loss")

# %%
last = {name: float(np.mean(metrics["loss"][1][-3:])) for name, metrics in curves.items()}
print(f"last losses: dense {last['dense']:.3f}, upcycled {last['upcycled']:.3f}")
experts = upcycled.encoder.blocks[-1].moe.experts.wi_edf[...][0]
mean = experts.mean(0)
distance = float(np.linalg.norm(experts - mean) / np.linalg.norm(experts))
print(f"the experts of the first sparse layer differ from their mean by {distance:.1%}")

# %% [markdown]
# ## Evaluate
# The same questions for both, so the difference is paired. This is one seed and a short training.

# %%
limit = 6 if SETTING == "small" else 100  # questions of a task
scores = {name: mk.evaluate(run.model, SUITE, limit=limit) for name, run in runs.items()}
groups = {name: [each.to_dict()] for name, each in scores.items()}
mk.show(mk.plot_scores(groups, "After tuning"), "10-scores")

# %%
for name, each in scores.items():
    mean = each.mean
    print(
        f"{name}: {mean.score:.1%} ({mean.low:.1%} to {mean.high:.1%}; chance {mean.chance:.1%}, "
        f"the most common answer {mean.majority:.1%})"
    )
print(f"upcycled less dense: {mk.compare(scores['dense'], scores['upcycled'])}")

# %% [markdown]
# ## Routing before and after
# A new router is nearly undecided ($w \approx 1/2$ for each of two experts), and its load is
# uneven by accident. The balance loss evens it out; the choices become the model's own.

# %%
after = mk.trace_routing(upcycled, prompts, **lengths)
loads = {"before": mk.balance_table(before).rows, "after": mk.balance_table(after).rows}
uneven = {
    when: {f"{row['stack']} {row['layer']}": row["max_violation"] for row in rows}
    for when, rows in loads.items()
}
label = "largest load over mean load, less 1"
mk.show(mk.plot_bars(uneven, label, "Load of the experts, before and after tuning"), "10-load")

# %%
kept = mk.saturation(before, after).mean()
chance = upcycled.cfg.router.k / upcycled.cfg.num_experts
for when, rows in loads.items():
    worst = max(row["max_violation"] for row in rows)
    print(f"{when}: the busiest expert of a layer has at most {1 + worst:.2f} times the mean load")
print(f"{kept:.0%} of the encoder's choices after tuning were made before as well")
print(f"(by chance {chance:.0%})")

# %%
mk.show(mk.plot_task_specialization(after, by="cluster"), "10-tasks")

# %% [markdown]
# ## Out
# `mk.export` writes a folder that transformers loads with `from_pretrained`. Its one MoE of this
# kind is Switch: top-1, raw probabilities, ReLU. Other MoE models are kept in moekit's own format
# with `mk.save`; `mk.load` reads both.

# %%
mk.export(FOLDER / "dense-tuned", dense)
mk.save(FOLDER / "upcycled-tuned", upcycled)
for name, model in {"dense-tuned": dense, "upcycled-tuned": upcycled}.items():
    again = mk.load(FOLDER / name, mesh=mesh)
    answers = mk.generate(model, questions, max_new_tokens=12)
    same = answers == mk.generate(again, questions, max_new_tokens=12)
    print(f"{name}: {answers}, loaded again the same text: {same}")
    assert same

# %% [markdown]
# ## Exercises
# 1. Upcycle with raw probabilities (`models["Switch, raw"]`) and tune it with the same
#    settings. After how many steps has it caught up?
# 2. Train the routers alone: `config.replace(freeze=("all_but_router",))`. How much of the
#    improvement remains, and why can it not be large while the experts are equal?
# 3. Tune the Switch checkpoint (`mk.load(SWITCH)`) on the mixture and export it: that folder loads
#    in transformers as an MoE. What does it answer before and after?
