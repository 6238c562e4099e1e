"""The stages of the paper's experiment, and the study that runs them end to end.

Every recipe is a few lines over `train`: pretraining by span corruption, instruction tuning on a
FLAN mixture, finetuning on one task. `study` does all of it for a dense and a sparse model of
equal FLOPs per token and records one JSON; `figures` draws from such records.
"""

import functools
import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moekit.analysis import plots as draw
from moekit.analysis.balance import balance_table, expert_load
from moekit.analysis.specialization import Specialization, domain_specialization
from moekit.analysis.trace import RouterTrace, text_prompts, trace_routing
from moekit.config import ModelConfig, TrainConfig, preset
from moekit.data.batch import batches, unigram_entropy
from moekit.data.flan import flan_mixture
from moekit.data.mixture import Formats, Mixture
from moekit.data.sources import corpus as open_corpus, data_dir
from moekit.data.span_corruption import Corpus
from moekit.data.suites import suite
from moekit.data.tasks import Task
from moekit.data.tokenizer import load_tokenizer, train_sentencepiece
from moekit.errors import unknown
from moekit.evaluation.evaluator import evaluate
from moekit.evaluation.scores import Scores
from moekit.model.transformer import EncoderDecoder, with_config
from moekit.training.loop import Run, train
from moekit.training.metrics import Metrics


@dataclass(frozen=True)
class StudyConfig:
    """A dense and a sparse model of one size through all stages; by default that of the notebooks.

    Args:
      source: "builtin", or "mirror" for the data folder (MOEKIT_DATA).
      size: "nano" or "mini".
      flavours: the models to compare.
      pretrain_steps, tune_steps: of batch_tokens each.
      limits: questions a task of suites with more than 20 tasks, and of smaller ones.
      options: show a question's options when asking (they are ranked all the same).
      out: results go to out/results, figures to out/figures; workdir keeps checkpoints.
    """

    source: str = "builtin"
    size: str = "nano"
    flavours: tuple[str, ...] = ("t5", "st")
    pretrain_steps: int = 400
    tune_steps: int = 800
    batch_tokens: int = 2560
    input_length: int = 128
    target_length: int = 32
    limits: tuple[int, int] = (6, 150)
    options: bool = True
    seed: int = 0
    name: str = ""
    out: Path = Path("assets")
    workdir: Path = Path("runs/study")

    def __post_init__(self):
        if self.source not in ("builtin", "mirror"):
            raise unknown("source", self.source, ("builtin", "mirror"))
        if self.size not in ("nano", "mini"):
            raise unknown("size", self.size, ("nano", "mini"))
        for flavour in self.flavours:
            preset(f"{flavour}-{self.size}")

    @property
    def vocab_size(self) -> int:
        return 1024 if self.size == "nano" else 8192

    @property
    def title(self) -> str:
        return self.name or f"{self.source}-{self.size}-seed{self.seed}"


# Adafactor multiplies by the scale of each parameter; the rate falls as 1 / sqrt(step)
PRETRAIN = TrainConfig(learning_rate=5e-2, schedule="rsqrt", warmup_steps=50)
TUNE = TrainConfig(learning_rate=1e-2, schedule="constant", warmup_steps=20)
FLAN_DROPOUT = {"dropout": 0.05, "expert_dropout": 0.2}  # Shen 2023
# in its two minutes a nano model underfits: a higher rate that falls to zero, and no dropout
NANO_TUNE = TUNE.replace(learning_rate=6e-2, schedule="linear", warmup_steps=50)


def pretrain(model: EncoderDecoder, corpus: Corpus, config: TrainConfig = PRETRAIN, **kw) -> Run:
    """Span corruption; validates on the corpus's own "valid" split."""
    return train(model, corpus, config, eval_source=corpus, **kw)


def instruction_tune(
    model: EncoderDecoder, mixture: Mixture, config: TrainConfig = TUNE, **kw
) -> Run:
    """The FLAN stage: all parameters, the whole mixture."""
    return train(model, mixture, config, **kw)


def finetune(model: EncoderDecoder, task: Task, config: TrainConfig = TUNE, **kw) -> Run:
    """One downstream task alone: setups (i), from pretraining, and (iii), after the FLAN stage."""
    return instruction_tune(model, single_task(task), config, **kw)


def single_task(task: Task) -> Mixture:
    """A mixture of one task, zero-shot with options, as it will be asked."""
    formats = Formats(few_shot=0.0, no_options=0.0)
    return Mixture(task.name, (task,), (1.0,), (formats,), ("finetuning",))


_HELD_IN = {"builtin": ("builtin-heldin",), "mirror": ("niv2-valid", "boolq", "arc_easy")}
_HELD_OUT = {"builtin": ("builtin",), "mirror": ("niv2-test", "bbh")}


class Lab:
    """What the stages of a study share: text, tokenizer, mixture, suites, settings.

    Stages keep their checkpoints in the study's workdir: asked for again, they take up what is
    there instead of training twice.

    Raises:
      FileNotFoundError: source "mirror" without a data folder.
    """

    def __init__(self, config: StudyConfig):
        self.config = config
        self.corpus = open_corpus(config.source)
        self.mixture = flan_mixture("flan2022" if config.source == "mirror" else "builtin")
        self.held_in = [suite(name) for name in _HELD_IN[config.source]]
        self.held_out = [suite(name) for name in _HELD_OUT[config.source]]
        config.workdir.mkdir(parents=True, exist_ok=True)
        path = config.workdir / f"tokenizer-{config.vocab_size}.model"
        if not path.exists():
            train_sentencepiece(self._tokenizer_texts(), path, config.vocab_size)
        self.tokenizer_path, self.tokenizer = path, load_tokenizer(path)

    def _tokenizer_texts(self) -> list[str]:
        """Every seventh document, which is plenty for a unigram model; and of the embedded tasks
        some prompts, for their words are not those of the embedded text."""
        texts = [document.text for document in self.corpus.documents("train")[::7]]
        if self.config.source == "builtin":
            texts += [f"{p.input}\n{p.target}" for p in self.mixture.sample(3000)]
        return texts

    @functools.cached_property
    def unigram_entropy(self) -> float:
        """Of the span-corruption targets of held-out text, nats a token."""
        lengths = {"input_length": self.config.input_length, "batch_size": 16}
        lengths["target_length"] = self.config.target_length
        stream = batches(
            self.corpus, self.tokenizer, seed=0, split="valid", repeat=False, **lengths
        )
        some = [batch for batch, _ in zip(stream, range(64), strict=False)]
        return unigram_entropy(some, self.tokenizer.vocab_size)

    def model_config(self, flavour: str, **changes) -> ModelConfig:
        cfg = preset(f"{flavour}-{self.config.size}")
        spec = {"tokenizer": str(self.tokenizer_path), "vocab_size": self.tokenizer.vocab_size}
        return cfg.replace(**spec | changes)

    def stage(self, base: TrainConfig, steps: int) -> TrainConfig:
        """A stage's settings: six evaluations, three checkpoints."""
        return base.replace(
            steps=steps,
            batch_tokens=self.config.batch_tokens,
            input_length=self.config.input_length,
            target_length=self.config.target_length,
            eval_every=-(-steps // 6),
            save_every=-(-steps // 3),
            seed=self.config.seed,
        )

    def pretrain(self, flavour: str, **changes) -> Run:
        """Span corruption from a fresh model; `changes` go to its configuration, `name` among them
        (it also names the folder)."""
        model = EncoderDecoder(self.model_config(flavour, **changes), seed=self.config.seed)
        stage = self.stage(PRETRAIN, self.config.pretrain_steps)
        return pretrain(
            model, self.corpus, stage, workdir=self.config.workdir / model.cfg.name / "pretrain"
        )

    def tune(self, model: EncoderDecoder, **kw) -> Run:
        """The FLAN stage on a copy of the model: dropout belongs to this stage alone."""
        nano = self.config.size == "nano"
        model = with_config(model, model.cfg.replace(**{} if nano else FLAN_DROPOUT))
        return instruction_tune(
            model,
            self.mixture,
            self.stage(NANO_TUNE if nano else TUNE, self.config.tune_steps),
            workdir=self.config.workdir / model.cfg.name / "tune",
            eval_source=_validated(self.mixture),
            **kw,
        )

    def scores(self, model: EncoderDecoder) -> list[Scores]:
        """Zero-shot scores on the held-in suites, then on the held-out ones."""
        few, many = self.config.limits
        return [
            evaluate(
                model,
                each,
                shots=0,
                limit=few if len(each.tasks) > 20 else many,
                max_new_tokens=24,
                options=self.config.options,
            )
            for each in (*self.held_in, *self.held_out)
        ]

    def trace(self, model: EncoderDecoder) -> RouterTrace:
        """The routing of held-out text, as many pieces of each domain."""
        per_domain = 96 if len(self.corpus.domains) < 6 else 32
        length = self.config.input_length
        prompts = text_prompts(self.corpus, per_domain, characters=min(600, length * 3))
        return trace_routing(model, prompts, input_length=length, target_length=8)

    def facts(self) -> dict[str, Any]:
        """Digests and sizes of the data."""
        facts = {
            "corpus": self.corpus.digest(),
            "tokenizer": self.tokenizer.digest(),
            "mixture": self.mixture.digest(),
            "documents": len(self.corpus.documents("train")),
            "tasks": len(self.mixture.tasks),
        }
        manifest = self.config.source == "mirror" and data_dir() / "manifest.json"
        if manifest and manifest.is_file():
            facts["manifest"] = hashlib.sha256(manifest.read_bytes()).hexdigest()[:12]
        return facts


def study(config: StudyConfig) -> dict:
    """Run everything, write the results JSON and its figures; returns the results.

    A second call with the same workdir takes up where the first one stopped.

    Raises:
      FileNotFoundError: source "mirror" without a data folder.
    """
    started = time.time()
    lab = Lab(config)
    for folder in (config.out / "results", config.out / "figures"):
        folder.mkdir(parents=True, exist_ok=True)
    models = {flavour: _one_model(lab, flavour) for flavour in config.flavours}
    results = {
        "kind": "study",
        "config": json.loads(json.dumps(asdict(config), default=str)),
        "environment": environment(),
        "data": lab.facts(),
        "unigram_entropy": lab.unigram_entropy,
        "models": models,
        "seconds": round(time.time() - started, 1),
    }
    results["config"] |= {"out": config.out.name, "workdir": config.workdir.name}
    path = config.out / "results" / f"{config.title}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    results["path"] = str(path)
    results["figures"] = [str(p) for p in study_figures(results, config.out / "figures")]
    return results


def _one_model(lab: Lab, flavour: str) -> dict:
    """One model through pretraining and the FLAN stage, asked before and after."""
    pretrained = lab.pretrain(flavour)
    model, folder = pretrained.model, pretrained.workdir.parent
    before = [scores.to_dict() for scores in lab.scores(model)]
    routing_before = _routing(lab, model, folder / "pretrain")
    tuned = lab.tune(model)
    cfg, pre = model.cfg, pretrained.config
    encoder, decoder = cfg.flops_per_token()
    rows = (pre.steps + tuned.config.steps) * pre.batch_size
    per_row = encoder * pre.input_length + decoder * pre.target_length
    return {
        "config": cfg.to_dict() | {"tokenizer": lab.tokenizer_path.name},
        "parameters": cfg.num_parameters()._asdict(),
        "flops_per_token": {"encoder": encoder, "decoder": decoder},
        "tokens": rows * (pre.input_length + pre.target_length),
        "training_flops": 3.0 * rows * per_row,  # a backward pass is two forward ones
        "pretrain": pretrained.metrics.rows,
        "tune": tuned.metrics.rows,
        "before": before,
        "after": [scores.to_dict() for scores in lab.scores(tuned.model)],
        "routing_before": routing_before,
        "routing_after": _routing(lab, tuned.model, folder / "tune"),
    }


def summary(results: dict) -> str:
    """What a study found, in a few lines."""
    lines = [f"results: {results['path']}"]
    for model in results["models"].values():
        name = model["config"]["name"]
        losses = [row["valid_loss"] for row in model["pretrain"] if "valid_loss" in row]
        lines.append(
            f"{name}: validation loss {losses[-1]:.3f} nats a token (unigram entropy "
            f"{results['unigram_entropy']:.3f})"
        )
        for before, after in zip(model["before"], model["after"], strict=True):
            a, b = before["mean"], after["mean"]
            lines.append(
                f"  {after['name']}: {a['score']:.1%} before, {b['score']:.1%} after tuning "
                f"({b['low']:.1%} to {b['high']:.1%}; chance {b['chance']:.1%}, "
                f"majority {b['majority']:.1%})"
            )
    return "\n".join([*lines, *results["figures"]])


def _validated(mixture: Mixture) -> Mixture:
    def has(task: Task) -> bool:
        try:
            return bool(task.examples("valid"))
        except ValueError:
            return False

    keep = [i for i, task in enumerate(mixture.tasks) if has(task)]
    pick = {
        field: tuple(getattr(mixture, field)[i] for i in keep)
        for field in ("tasks", "weights", "formats", "parts")
    }
    return replace(mixture, **pick)


def _routing(lab: Lab, model: EncoderDecoder, folder: Path) -> dict | None:
    """Balance and domain specialization of the encoder on labelled text."""
    if not model.cfg.num_experts:
        return None
    trace = lab.trace(model)
    trace.save(folder / "trace.npz")
    result = domain_specialization(trace)
    return {
        "balance": list(balance_table(trace).rows),
        "load": {stack: expert_load(trace, stack).tolist() for stack in trace.stacks},
        "domains": {
            key: value if key == "labels" else np.round(value, 5).tolist()
            for key, value in asdict(result).items()
        },
    }


def environment() -> dict[str, str]:
    """What a result depends on besides data and configuration."""
    device = jax.devices()[0]
    try:
        commit = subprocess.run(
            # "-dirty" tells that the working tree held changes
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "device": f"{jax.device_count()} x {device.device_kind}",
        "platform": device.platform,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "commit": commit,
    }


def study_figures(results: dict, folder: Path) -> list[Path]:
    """Draw everything that a study recorded; returns the files."""
    models = results["models"]
    name = Path(results["path"]).stem if "path" in results else results["config"]["name"]
    paths = []

    def keep(fig, what: str) -> None:
        paths.append(draw.save_figure(fig, folder / f"{name}-{what}.png"))

    titles = {flavour: m["config"]["name"] for flavour, m in models.items()}
    curves = {titles[f]: Metrics(rows=m["pretrain"]) for f, m in models.items()}
    entropy = [("unigram entropy of the targets", results["unigram_entropy"])]
    label = "validation loss (nats a target token)"
    keep(
        draw.plot_learning_curves(curves, "valid_loss", label, "Pretraining", entropy),
        "pretraining",
    )
    curves = {titles[f]: Metrics(rows=m["tune"]) for f, m in models.items()}
    keep(draw.plot_learning_curves(curves, "valid_loss", label, "Instruction tuning"), "tuning")
    groups = {
        f"{titles[f]}, {stage} tuning": m[stage]
        for stage in ("before", "after")
        for f, m in models.items()
    }
    keep(draw.plot_scores(groups, "Zero-shot, before and after instruction tuning"), "scores")
    for flavour, m in models.items():
        for stage in ("before", "after"):
            if routing := m[f"routing_{stage}"]:
                title = f"{titles[flavour]}, {stage} tuning"
                loads = {stack: np.array(load) for stack, load in routing["load"].items()}
                keep(draw.plot_load(loads, title), f"{flavour}-load-{stage}")
                keep(
                    draw.plot_specialization(_recorded(routing), title),
                    f"{flavour}-domains-{stage}",
                )
    return paths


def _recorded(routing: dict) -> Specialization:
    values = routing["domains"]
    arrays = {k: np.array(v) for k, v in values.items() if k != "labels"}
    return Specialization(labels=tuple(values["labels"]), **arrays)


def figures(
    results: Path = Path("assets/results"), out: Path = Path("assets/figures")
) -> list[Path]:
    """Redraw the figures of every recorded study and evaluation.

    Raises:
      FileNotFoundError: no results there.
    """
    paths: list[Path] = []
    found: Sequence[Path] = sorted(Path(results).glob("*.json"))
    for path in found:
        record = json.loads(path.read_text())
        if record.get("kind") == "study":
            paths += study_figures(record | {"path": str(path)}, Path(out))
        elif record.get("kind") == "evaluation":
            average = record["normalised_average"]["score"]
            title = f"{record['model']}, normalised average {average:.1%}"
            fig = draw.plot_scores({record["model"]: record["suites"]}, title)
            paths.append(draw.save_figure(fig, Path(out) / f"{path.stem}-scores.png"))
    if not paths:
        raise FileNotFoundError(f"no recorded study in {results}: `moekit study` makes one")
    return paths
