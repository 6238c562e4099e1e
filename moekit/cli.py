"""moekit <verb>: every verb is a dataclass whose fields are its flags; each takes --json."""

import ctypes
import importlib.util
import inspect
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import jax
import tyro

from moekit.commands.data import DATA_VERBS, Data
from moekit.config import TrainConfig, preset
from moekit.errors import unknown
from moekit.studies import StudyConfig


@dataclass
class Doctor:
    """Versions, devices, data found and what is missing; or the table of presets."""

    presets: bool = False
    json: bool = False

    def run(self) -> tuple[object, str]:
        from moekit.commands import doctor

        if self.presets:
            rows = doctor.presets()
            digits = lambda v: f"{v:.4g}" if isinstance(v, float) else v  # noqa: E731
            return rows, _columns([{k: digits(v) for k, v in row.items()} for row in rows])
        found = doctor.report()
        return found, doctor.as_text(found)


@dataclass
class Tour:
    """Execute the notebooks in their small setting; `make tour` calls this."""

    out: Path = Path("tour")
    in_place: bool = False
    """Store the outputs in notebooks/ as well."""
    only: str = ""
    """Prefix of the notebooks to run, such as 01."""
    json: bool = False

    def run(self) -> tuple[object, str]:
        from moekit.commands.tour import tour

        _keep_freed_memory()  # kernels inherit it
        rows = tour(self.out, in_place=self.in_place, only=self.only)
        total = sum(row["seconds"] for row in rows)
        text = (
            f"{len(rows)} notebooks ran in {total / 60:.1f} minutes.\n"
            f"Executed notebooks: {self.out}/*.ipynb\nFigures: {self.out}/figures/*.png"
        )
        return rows, text


@dataclass
class Train:
    """Train a preset (or go on from a checkpoint) on a mixture or a corpus."""

    workdir: Path
    preset: str = "st-nano"
    mixture: str = "builtin"
    """A FLAN mixture: builtin, flan2022, flan-t5 or flan-ablation."""
    source: str = "mirror"
    """Of the mixture: mirror (the data folder), hub (ready-made) or hub-raw (in our wordings)."""
    hold_out: str = ""
    """Leave out tasks that overlap with these suites, such as mmlu,bbh."""
    corpus: str = ""
    """Pretrain on this text instead: builtin, mirror, or parts such as books,speeches."""
    checkpoint: Path | None = None
    """Start from this model instead of a fresh preset."""
    router: str = ""
    """Another router: switch, top2, gshard, expert-choice, loss-free, hash, random."""
    tokenizer: str = ""
    """Path of a SentencePiece model; default the preset's."""
    on_error: str = "stop"
    """What to do with malformed rows: stop or skip."""
    mesh: str = ""
    """Shard over all devices: axis sizes such as expert=8 or expert=4,model=2."""
    coordinator: str = ""
    """host:port of process 0 of a run on several hosts; TPU slices need none of these three."""
    processes: int | None = None
    process_id: int | None = None
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: TrainConfig(steps=100, batch_tokens=8192)
    )
    json: bool = False

    def run(self) -> tuple[object, str]:
        import moekit as mk
        from moekit import distributed

        _keep_freed_memory()
        distributed.start(self.coordinator, self.processes, self.process_id)
        sharded = self.mesh or jax.process_count() > 1
        mesh = mk.make_mesh(**_axes(self.mesh)) if sharded else None
        if self.checkpoint:
            model = mk.load(self.checkpoint, mesh=mesh)
        cfg = model.cfg if self.checkpoint else mk.preset(self.preset)
        if self.router:
            cfg = cfg.replace(router=self.router)
        if self.tokenizer:
            size = mk.load_tokenizer(self.tokenizer).vocab_size
            cfg = cfg.replace(tokenizer=self.tokenizer, vocab_size=size)
        if self.corpus:
            source = mk.corpus(self.corpus)
        else:
            hold_out = tuple(filter(None, self.hold_out.split(",")))
            options = {"source": self.source, "hold_out": hold_out, "on_error": self.on_error}
            source = mk.flan_mixture(self.mixture, **options)
        if not self.checkpoint:
            model = mk.EncoderDecoder(cfg, seed=self.train.seed, mesh=mesh)
        run = mk.train(model, source, self.train, workdir=self.workdir)
        if not distributed.is_first():
            return None, ""  # one process speaks
        last = run.metrics.rows[-1]
        text = f"step {last['step']}: loss {last['loss']:.4f}; checkpoints in {self.workdir}"
        return {"workdir": str(self.workdir), **last}, text


def _axes(text: str) -> dict[str, int]:
    """{"expert": 64} of "expert=64,model=2"."""
    axes = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in ("data", "expert", "model") or not size.isdigit():
            raise ValueError(f"mesh {text!r}: write axes (data, expert, model) as expert=8,model=2")
        axes[name] = int(size)
    return axes


@dataclass
class Plan:
    """Compile a training step for a TPU slice, without one: memory, time, collectives, verdict."""

    preset: Annotated[str, tyro.conf.Positional] = "st-base"
    topology: str = "v5e:2x4"
    """chip:slice, for v4, v5e, v5p, v6e; with --sweep a chip alone looks for its smallest slice."""
    mesh: str = ""
    """Axis sizes such as expert=64,model=2; the rest of the chips goes to data."""
    batch: int = 256
    """Rows a step."""
    input_length: int = 512
    target_length: int = 128
    optimizer: str = "adafactor"
    remat: str = "full"
    sweep: bool = False
    """Try meshes and remat policies, or slices, and rank them."""
    json: bool = False

    def run(self) -> tuple[object, str]:
        from moekit.planning.compile_step import compile_in_child
        from moekit.planning.request import PlanRequest
        from moekit.planning.sweep import ranking, sweep

        cfg = preset(self.preset)
        if not self.sweep:
            request = PlanRequest(
                cfg=cfg,
                topology=self.topology,
                mesh=_axes(self.mesh),
                batch=self.batch,
                input_length=self.input_length,
                target_length=self.target_length,
                optimizer=self.optimizer,
                remat=self.remat,
            )
            found = compile_in_child(request)
            return found.to_dict(), str(found)
        plans = sweep(
            cfg,
            self.topology,
            batch=self.batch,
            input_length=self.input_length,
            target_length=self.target_length,
            optimizer=self.optimizer,
            remat=self.remat,
        )
        return [p.to_dict() for p in plans], ranking(plans)


@dataclass
class Eval:
    """Evaluate a checkpoint on suites, each in its benchmark's own way, and average them."""

    checkpoint: Path
    suite: str = "builtin"
    """Names joined with commas (mmlu, mmlu-cot, bbh, reasoning, niv2/task..), or paper."""
    harness: str = ""
    """Run these tasks of the lm-evaluation-harness instead."""
    shots: int | None = None
    """Exemplars; default the suite's own number, as of the next two."""
    chain_of_thought: bool | None = None
    options: bool | None = None
    limit: int | None = None
    """At most so many questions a task."""
    seed: int = 0
    out: Path | None = None
    """Write the record here as JSON; `moekit figures` draws those of its folder."""
    json: bool = False

    def run(self) -> tuple[object, str]:
        import moekit as mk

        if self.harness:
            found, text = self._harness()
        else:
            asked = mk.suites(self.suite)
            model = mk.load(self.checkpoint)
            kind = {"shots": self.shots, "limit": self.limit, "seed": self.seed}
            kind |= {"chain_of_thought": self.chain_of_thought, "options": self.options}
            results = [mk.evaluate(model, suite, **kind) for suite in asked]
            found = mk.report(results)
            tables = [scores.table() for scores in results]
            text = "\n\n".join([*tables, str(mk.normalised_average(results))])
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(found, indent=1, default=str) + "\n")
        return found, text

    def _harness(self) -> tuple[dict, str]:
        import moekit as mk
        from moekit.evaluation.lm_harness import harness, make_table

        tasks, shots = self.harness.split(","), self.shots
        model = mk.load(self.checkpoint)
        found = harness(model, tasks, shots=shots, limit=self.limit, log_samples=False)
        kept = ("results", "n-shot", "n-samples", "versions")
        return {name: found[name] for name in kept}, make_table(found)


# benchmark: module and function; a flag of `Bench` goes to the parameter of its name
BENCHMARKS = {
    "layer": ("bench.timings", "layer"),
    "step": ("bench.timings", "step"),
    "input": ("bench.input", "input_pipeline"),
    "peers": ("bench.baselines", "peers"),
}


@dataclass
class Bench:
    """Timings. layer: an MoE layer against the dense FFN of equal FLOPs; step: a training step
    against its dense twin; input: an epoch of instructions of the data folder through the
    pipeline; peers: our models beside those of transformers.

    Flags that are not given have the benchmark's own defaults."""

    what: Annotated[str, tyro.conf.Positional] = "layer"
    tokens: int | None = None
    d_model: int | None = None
    d_ff: int | None = None
    capacity_factor: float | None = None
    preset: str | None = None
    batch: int | None = None
    """Rows a step."""
    input_length: int | None = None
    target_length: int | None = None
    vocab_size: int | None = None
    mesh: str | None = None
    """Axis sizes such as expert=8."""
    remat: str | None = None
    dispatch: str | None = None
    """capacity or dropless."""
    tokenizer: str | None = None
    """Path of a SentencePiece model for input; default one trained on the data folder and kept."""
    workers: int | None = None
    """Processes that read ahead, for input."""
    repeats: int | None = None
    json: bool = False

    def run(self) -> tuple[object, str]:
        if self.what not in BENCHMARKS:
            raise unknown("benchmark", self.what, BENCHMARKS)
        module, name = BENCHMARKS[self.what]
        from moekit.sharding import make_mesh

        function = getattr(importlib.import_module(f"moekit.{module}"), name)
        flags = {k: v for k, v in vars(self).items() if k not in ("what", "json") and v is not None}
        for flag in flags.keys() - inspect.signature(function).parameters.keys():
            raise ValueError(f"bench {self.what} has no --{flag.replace('_', '-')}: leave it out")
        if self.what in ("step", "peers"):  # as in training
            _keep_freed_memory()
        if self.mesh:
            flags["mesh"] = make_mesh(**_axes(self.mesh))
        found = function(**flags)
        return found if isinstance(found, tuple) else (found, _columns(found))


def _columns(rows: list[dict]) -> str:
    """Rows of equal keys as a table."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(lines)


@dataclass
class Study:
    """The whole experiment, dense against sparse, recorded as one JSON with its figures."""

    study: Annotated[StudyConfig, tyro.conf.arg(name="")] = field(default_factory=StudyConfig)
    json: bool = False

    def run(self) -> tuple[object, str]:
        from moekit.studies import study, summary

        _keep_freed_memory()
        results = study(self.study)
        return {"path": results["path"], "figures": results["figures"]}, summary(results)


@dataclass
class Figures:
    """Redraw the figures of recorded results."""

    results: Path = Path("assets/results")
    out: Path = Path("assets/figures")
    json: bool = False

    def run(self) -> tuple[object, str]:
        from moekit.studies import figures

        paths = [str(path) for path in figures(self.results, self.out)]
        return paths, "\n".join(paths)


_CLASSES = (Doctor, Tour, Train, Eval, Plan, Data, Bench, Study, Figures)
VERBS = {verb.__name__.lower(): verb for verb in _CLASSES}


def _accelerated() -> bool:
    """Whether a TPU or GPU is here, seen before jax has started."""
    return any(any(Path("/dev").glob(d)) for d in ("accel*", "vfio/*", "nvidia*", "kfd"))


def _leave_libtpu_alone() -> None:
    """Where the TPU compiler is installed but neither TPU nor GPU is: jax would try it and fill the
    screen with its complaints."""
    if importlib.util.find_spec("libtpu") and not _accelerated():
        # for kernels that start from here, and for this process
        jax.config.update("jax_platforms", os.environ.setdefault("JAX_PLATFORMS", "cpu"))


def _keep_freed_memory() -> None:
    """Training on a CPU under glibc: what a step frees is kept for the next one, in one heap.

    Given back and asked for again, its pages would be filled with zeros in every step. To be called
    before jax starts threads, which choose their heaps then.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt and not _accelerated():
        # the variables are for processes that start from here, the numbers are those of malloc.h
        for name, option, value in (
            ("MALLOC_ARENA_MAX", -8, 1),
            ("MALLOC_MMAP_MAX_", -4, 0),  # blocks outside of the heap
            ("MALLOC_TRIM_THRESHOLD_", -1, 2**31 - 1),
        ):
            os.environ.setdefault(name, str(value))
            mallopt(option, int(os.environ[name]))


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 1 where a check found faults, or 2 with one line for a mistake of the user's
    (MOEKIT_TRACEBACK=1 shows all)."""
    argv = sys.argv[1:] if argv is None else argv
    _leave_libtpu_alone()
    try:
        if argv and not argv[0].startswith("-") and argv[0] not in VERBS:
            raise unknown("verb", argv[0], VERBS)
        if argv[:1] == ["data"] and argv[1:] and argv[1] not in (*DATA_VERBS, "-h", "--help"):
            raise unknown("verb of data", argv[1], DATA_VERBS)
        command = tyro.extras.subcommand_cli_from_dict(
            VERBS, args=argv, prog="moekit", description=__doc__
        )
        found, text, *code = command.run()
        if found is not None:
            print(json.dumps(found, default=str) if command.json else text)
        return code[0] if code else 0
    except KeyboardInterrupt as stop:
        print(f"stopped: {stop}" if str(stop) else "stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except (ValueError, OSError) as error:
        if os.environ.get("MOEKIT_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
