# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 08 Expert specialization
#
# **What you will see**: which domains, tasks and tokens an expert processes, compared with chance;
# which experts are chosen together; how early routing settles; what instruction tuning changes.
# **Time**: about a minute after notebooks 03 and 05, whose models it uses.

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
from moekit.analysis.specialization import repetition
from moekit.commands.runtime import describe_runtime

SETTING = "small"  # "colab": ten minutes on one TPU v5e or T4; "full": longer, a TPU VM
setup = mk.StudySetup(mk.StudyConfig.named(SETTING))
print(describe_runtime())
pretrained = setup.pretrain("st")
tuned = setup.tune(pretrained.model)

# %% [markdown]
# ## Domains
# Held-out documentation, the same number of pieces of each package. A bar is the share of a
# domain's tokens that chose an expert; chance is k / E. The p-value comes from shuffling the labels
# of whole pieces: a small sample always *looks* specialised, and the null distribution shows how
# much of that is chance. Packages differ in words and layout as well as in topic.

# %%
before, after = setup.trace(pretrained.model), setup.trace(tuned.model)
mk.show(mk.plot_domain_specialization(before), "08-domains")

# %%
result = mk.domain_specialization(before)
for layer, p_value in enumerate(result.p_value):
    share = result.share[layer]
    expert, label = divmod(int(share.argmax()), share.shape[1])
    print(
        f"layer {layer}: most one-sided is expert {expert} with {share.max():.0%} of the tokens of "
        f"{result.labels[label]} (chance {result.chance[layer]:.0%}), p = {p_value:.3f}"
    )
mk.show(mk.plot_domain_distance(before), "08-domain-distance")

# %% [markdown]
# ## Tokens
# For each expert, the frequent tokens that it receives most often, as a share of all their
# occurrences. In models of this size the router mostly depends on the token itself: punctuation for
# one expert, beginnings of words for another.

# %%
mk.show(mk.plot_token_specialization(before, setup.tokenizer), "08-tokens")

# %% [markdown]
# The same in running text, before and after tuning: a colour is an expert, a paler one a smaller
# weight. Dropped tokens are struck out. Move the mouse over a token to see its experts.

# %%
mk.plot_tokens({"pretrained": before, "tuned": after}, setup.tokenizer, examples=2)

# %% [markdown]
# ## Tasks
# Instruction prompts by cluster after tuning: darker than chance (1.0) means an expert that is used
# more for this kind of task.

# %%
prompts = setup.mixture.sample(600)
of_tasks = mk.trace_routing(tuned.model, prompts, input_length=128, target_length=32)
mk.show(mk.plot_task_specialization(of_tasks, by="cluster"), "08-tasks")

# %%
mk.show(mk.plot_task_specialization(of_tasks, "decoder", by="cluster"), "08-tasks-decoder")

# %% [markdown]
# ## Which experts are chosen together?
# Of the tokens that chose the expert of a row, the share that also chose the column's. All pairs of
# choices count, whatever their rank.

# %%
mk.show(mk.plot_coactivation(before), "08-coactivation")

# %% [markdown]
# ## When does routing settle, and what does tuning change?
# The share of the later model's choices that the earlier one made as well, for the same text.

# %%
steps = pretrained.config.save_every * 2
early = setup.trace(mk.load(pretrained.workdir, step=steps))
agreement = {
    "encoder": {
        f"step {steps} / end of pretraining": float(mk.saturation(early, before).mean()),
        "pretrained / tuned": float(mk.saturation(before, after).mean()),
    }
}
cfg = pretrained.model.cfg
chance = ("chance k/E", cfg.active_experts("encoder") / cfg.num_experts)
fig = mk.plot_bars(agreement, "share of choices in common", "Saturation of routing", chance)
mk.show(fig, "08-saturation")

# %%
for name, trace in {"pretrained": before, "tuned": after}.items():
    same, luck = repetition(trace)
    print(f"{name}: {same[0]:.0%} of neighbouring tokens share an expert (chance {luck[0]:.0%})")
    print(mk.balance_table(trace), "\n")

# %%
mk.show(mk.plot_domain_specialization(after), "08-domains-tuned")

# %% [markdown]
# ## Exercises
# 1. Shuffle the domains of `before` (`dataclasses.replace(before, domains=...)`) and draw the first
#    figure again. What remains of the specialization?
# 2. The balance loss counteracts specialization. Train with `setup.pretrain("st", name="free",
#    balance_loss=0.0)` and compare p-values and distances.
# 3. Expert Choice (`setup.pretrain("ec")`) lets a token have any number of experts. Which tokens
#    get many?
