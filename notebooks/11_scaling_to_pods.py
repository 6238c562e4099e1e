# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 11 Scaling to pods
#
# **What you will see**: training steps compiled for TPU slices that are not here; how to read what
# the compiler says of memory, time and traffic; other meshes compared; the 32B model of the paper
# on several slices, the bottleneck of its step and its cost; how a pod is launched. **Time**:
# about three minutes, a few seconds without the TPU compiler.

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
import math
from pathlib import Path

import moekit as mk
from moekit.planning.sweep import ranking

SETTING = "small"  # "colab": the base model is compiled anew; "full", an hour: the 32B model too
LIVE = util.find_spec("libtpu") is not None
places = [Path("assets/plans"), Path("../assets/plans"), Path("moekit-plans/assets/plans")]
if not any(place.is_dir() for place in places):  # on Colab
    clone = f"git clone -q --depth 1 --branch {TAG} {REPOSITORY} moekit-plans"
    subprocess.run(clone.split(), check=True)
PLANS = next(place for place in places if place.is_dir())
if not LIVE:
    print("Skipped: nothing is compiled here, recorded plans are shown instead, because libtpu,")
    print("the TPU compiler, is not installed. It needs no TPU: pip install -e '.[tpu]' (Linux).")

# %% [markdown]
# ## A plan
# `mk.plan` compiles the *real* training step (forward, backward, optimizer) ahead of time for a
# named slice, with the compiler that would compile it there, and reads the program that comes out.
#
# - Memory and collectives are those of the program that would run.
# - Times are **estimates**, not measurements: matmuls by the compiler's own cycles, other work by
#   its memory traffic, collectives by the links that their devices span. The low estimate of a step
#   assumes that communication fully overlaps with computation, the high one that nothing overlaps.
#
# The small setting plans the nano model, whose plans compile fast; it is far too small for a TPU,
# which its MFU shows.


# %%
def planned(record, model, **options):
    """Compiled here if that is possible and quick or requested, else as recorded."""
    if LIVE and (SETTING != "small" or model == "st-nano"):
        return mk.plan(model, "v5e:2x4", batch=64, **options)
    return mk.Plan.load(PLANS / f"{record}.json")


nano = planned("st-nano-v5e-2x4", "st-nano", mesh={"expert": 8})
print(nano)

# %% [markdown]
# The base model on the same eight chips needs minutes of compiling, so its plan is a recorded one
# (`moekit plan st-base --topology v5e:2x4 --mesh expert=8 --batch 64 --json`).

# %%
base = planned("st-base-v5e-2x4", "st-base", mesh={"expert": 8})
print(base)

# %%
mk.show(base.plot(), "11-base")

# %% [markdown]
# ## Reading it
# - **Memory per chip**: *arguments* are the chip's shard of parameters and optimizer state,
#   *temporaries* activations and gathered weights at their peak, *program* the code. Their sum must
#   stay below the chip's memory (the dashed line). Gaps between buffers come on top; the compiler
#   refuses a step that does not fit with them.
# - **Time**: the stack is the time of a step in which nothing overlaps; the dotted lines are the
#   two bounds. *matmuls* are matrix products, *memory* is work that is bound by memory traffic,
#   *interconnect* is communication between chips.
# - **MFU** is the model's FLOPs over the peak of the chips for that time. Rematerialized FLOPs,
#   padded slots and attention scores take time and do not count.
# - **Collectives**: over `expert`, all-to-alls dispatch tokens; weights are all-gathered just
#   before use, and their gradients are reduce-scattered. Notebook 02 shows them.
# - **Verdict**: whether it fits, the bottleneck, what to change.

# %%
for plan in (nano, base):
    low, high = (1e3 * s for s in plan.step_seconds)
    print(f"{plan.preset}: {low:.2f} to {high:.2f} ms a step (estimate)")
    print(f"  MFU {100 * plan.mfu[0]:.1f} to {100 * plan.mfu[1]:.1f} % (estimate)")
    print(f"  bottleneck: {plan.bottleneck}; {'; '.join(plan.advice)}")

# %% [markdown]
# ## Other meshes, other remat
# The same step with half the expert parallelism, and without rematerialization. `moekit plan
# --sweep` tries more of them and ranks them; here are three, on eight chips.

# %%
fewer = planned("st-nano-v5e-2x4-expert4", "st-nano", mesh={"expert": 4})
kept = planned("st-nano-v5e-2x4-none", "st-nano", mesh={"expert": 8}, remat="none")
plans = {
    "expert 8\nremat full": nano,
    "expert 4, data 2\nremat full": fewer,
    "expert 8\nremat none": kept,
}
bounds = {"full overlap": 0, "no overlap": 1}
times = {b: {n: 1e3 * p.step_seconds[i] for n, p in plans.items()} for b, i in bounds.items()}
title = f"{nano.preset} on {nano.topology}: step time (an estimate)"
mk.show(mk.plot_bars(times, "ms a step (estimate)", title), "11-meshes")

# %%
kinds = ("arguments", "temporaries", "program")
memory = {k: {n: p.hbm_gib_per_chip[k] for n, p in plans.items()} for k in kinds}
title = f"{nano.preset} on {nano.topology}: memory"
mk.show(mk.plot_bars(memory, "GiB a chip", title), "11-meshes-memory")

# %% [markdown]
# Less expert parallelism sends fewer bytes of tokens. Rematerialization costs matmuls and
# communication, and saves nothing here: nano's stacks have two layers. It pays off in deep models
# (see the end of notebook 02).

# %% [markdown]
# ## The 32B model
# The paper's largest, as rebuilt here: 269 B parameters, 64 experts in every fourth layer. Its step
# is a batch of 256 rows of 2,048 + 512 tokens with Adafactor, float32 parameters and bfloat16
# compute. A compile takes many minutes and gigabytes, so these plans are recorded (`assets/plans`,
# each the output of `moekit plan st-32b .. --json`); `SETTING = "full"` compiles all of them again.

# %%
recorded = [mk.Plan.load(path) for path in sorted(PLANS.glob("st-32b-*.json"))]
if SETTING == "full" and LIVE:
    same = ("mesh", "batch", "input_length", "target_length", "optimizer", "remat")
    recorded = [
        mk.plan(p.preset, p.topology, **{name: getattr(p, name) for name in same}) for p in recorded
    ]
print(ranking(recorded))

# %%
big = {f"{p.topology}\nexpert {p.mesh['expert']}\nremat {p.remat}": p for p in recorded}
memory = {
    "needed": {n: p.hbm_gib_per_chip["total"] for n, p in big.items()},
    "the chip has": {n: p.hbm_limit_gib for n, p in big.items()},
}
mk.show(mk.plot_bars(memory, "GiB a chip", "32B: memory of a chip"), "11-32b-memory")

# %% [markdown]
# The step time. A plan that does not fit has none: the compiler stops where memory runs out.

# %%
timed = {name: p for name, p in big.items() if p.step_seconds}
times = {b: {n: p.step_seconds[i] for n, p in timed.items()} for b, i in bounds.items()}
title = "32B: step time (an estimate)"
mk.show(mk.plot_bars(times, "seconds a step (estimate)", title), "11-32b-step")

# %%
parts = ("matmuls", "memory", "interconnect")
split = {part: {n: p.split_seconds[part] for n, p in timed.items()} for part in parts}
title = "32B: step time by kind (an estimate)"
mk.show(mk.plot_bars(split, "seconds a step (estimate)", title), "11-32b-split")

# %%
fastest = min(timed.values(), key=lambda p: p.step_seconds[1])
mk.show(fastest.plot(), "11-32b-plan")

# %% [markdown]
# All-gathers and reduce-scatters of *weights* send by far the most bytes, over the expert axis,
# because dense parameters are fully sharded. The all-to-alls of tokens, the cost of sparsity, are a
# small part of that. At this scale the sharding of dense weights matters most.

# %% [markdown]
# ## Which mesh and which remat policy
# The meshes and remat policies that a sweep tries on one of these slices, ranked; also recorded:
# `moekit plan st-32b --topology v5p:4x8x8 --batch 256 --input-length 2048 --target-length 512
# --sweep --json`.

# %%
swept = json.loads((PLANS / "sweeps/st-32b-v5p-4x8x8.json").read_text())
swept = [mk.Plan.from_dict(values) for values in swept]
print(ranking(swept))

# %%
meshes = {f"{p.mesh['expert']} x {p.mesh['model']}\n{p.remat}": p for p in swept if p.step_seconds}
times = {b: {n: p.step_seconds[i] for n, p in meshes.items()} for b, i in bounds.items()}
title = "32B on v5p:4x8x8: step time by expert x model axis and remat (an estimate)"
mk.show(mk.plot_bars(times, "seconds a step (estimate)", title), "11-32b-sweep")

# %% [markdown]
# If memory is left, storing the results of the large matmuls (remat `dots`) is the best use of it.
# A model axis does not help here: the step fits without it, and its communication comes on top of
# the gathers over the expert axis, which send as many bytes as before (`p.collectives`).

# %% [markdown]
# ## What a step costs
# Chips times seconds. Set the tokens of a run; positions count, padding included. Chip-hours are
# estimates between the two bounds of the step. Enter the price that you pay.

# %%
TOKENS = 100e9  # of the run
PRICE = None  # of one chip for an hour, in your currency

for p in timed.values():
    chips = math.prod(p.mesh.values())
    steps = TOKENS / (p.batch * (p.input_length + p.target_length))
    hours = [steps * s / 3600 for s in p.step_seconds]
    spent = [chips * s for s in p.step_seconds]
    print(f"{p.topology}, remat {p.remat}: {chips} chips")
    print(f"  {spent[0]:.0f} to {spent[1]:.0f} chip-seconds a step (estimate)")
    print(f"  {steps:,.0f} steps take {hours[0]:,.0f} to {hours[1]:,.0f} hours (estimate)")
    print(f"  {chips * hours[0]:,.0f} to {chips * hours[1]:,.0f} chip-hours (estimate)")
    if PRICE is not None:
        print(f"  {PRICE * chips * hours[0]:,.0f} to {PRICE * chips * hours[1]:,.0f} in money")

# %% [markdown]
# ## Launching it
# A slice of more than one host runs the same command on every host: each process drives its own
# chips, and XLA makes one program of all. On Cloud TPU VMs `--worker=all` starts them together
# (on one worker alone it would wait for the others). The slice's type counts cores on v4 and v5p,
# two to a chip, and chips on v5e and v6e. The commands follow from the fastest plan (`SHARED` is a
# folder that every host sees, `RUNTIME` the TPU software version of that generation):

# %%
axes = ",".join(f"{name}={size}" for name, size in fastest.mesh.items() if size > 1)
tokens = fastest.batch * (fastest.input_length + fastest.target_length)
chip, chips = fastest.topology.split(":")[0], math.prod(fastest.mesh.values())
kind = f"{chip}-{2 * chips}" if chip in ("v4", "v5p") else f"{chip}-{chips}"
kind = kind.replace("v5e", "v5litepod")
clone_from = REPOSITORY or "REPOSITORY"  # the address or folder of the repository
print(f"""gcloud compute tpus tpu-vm create pod --zone ZONE --accelerator-type {kind} \\
    --version RUNTIME
gcloud compute tpus tpu-vm ssh pod --zone ZONE --worker=all --command="
    git clone {clone_from} moekit && cd moekit &&
    python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu]'"
gcloud compute tpus tpu-vm ssh pod --zone ZONE --worker=all --command="
    cd moekit && .venv/bin/moekit train --preset {fastest.preset} --mesh {axes} \\
        --tokenizer SHARED/tokenizer.model --corpus builtin --workdir SHARED/runs/32b \\
        --batch-tokens {tokens} --input-length {fastest.input_length} \\
        --target-length {fastest.target_length} --optimizer {fastest.optimizer} \\
        --remat {fastest.remat} --steps {TOKENS / tokens:.0f}\"""")

# %% [markdown]
# ## Exercises
# 1. Which slice would you rent for the 32B model if you pay for chip-hours, which if you wait for
#    the result? Does the answer change between the two bounds?
# 2. With libtpu: `mk.plan("st-nano", "v5e:2x4", mesh={"expert": 8}, batch=1024)`. How do MFU and
#    memory change, and what is the bottleneck now?
# 3. `moekit plan st-32b --topology v5p --sweep` looks for the smallest v5p slice that holds the
#    model. Could it be smaller than the ones above? Guess first: 269 B parameters in float32,
#    gradients, and one layer's activations.
