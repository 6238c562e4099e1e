"""The stages of the paper's experiment, and the study that runs them end to end.

Every recipe is a few lines over `train`: pretraining by span corruption, instruction tuning on a
FLAN mixture, finetuning on one task. `study` does all of it for a dense and a sparse model of
equal FLOPs per token and records one JSON; `figures` draws from such records.
"""

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

from moekit.analysis import figures as draw
from moekit.analysis.balance import balance_table, expert_load
from moekit.analysis.specialization import Specialization, domain_specialization
from moekit.analysis.trace import text_prompts, trace_routing
from moekit.config import ModelConfig, StudyConfig, TrainConfig, preset
from moekit.data.corruption import Corpus
from moekit.data.flan import Mixture, flan_mixture
from moekit.data.pipeline import batches, unigram_entropy
from moekit.data.sources import corpus as open_corpus
from moekit.data.sources import data_dir
from moekit.data.suites import suite
from moekit.data.tasks import Task
from moekit.data.tokenizer import load_tokenizer, train_sentencepiece
from moekit.evaluate import evaluate
from moekit.metrics import Metrics
from moekit.model.transformer import EncoderDecoder
from moekit.train import Run, train

# Adafactor multiplies by the scale of each parameter; the rate falls as 1 / sqrt(step)
PRETRAIN = TrainConfig(learning_rate=5e-2, schedule="rsqrt", warmup_steps=50)
TUNE = TrainConfig(learning_rate=1e-2, schedule="constant", warmup_steps=20)
FLAN_DROPOUT = {"dropout": 0.05, "expert_dropout": 0.2}  # Shen 2023


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
    from moekit.data.flan import Formats

    formats = Formats(few_shot=0.0, no_options=0.0)
    return Mixture(task.name, (task,), (1.0,), (formats,), ("finetuning",))


def _stage(study: StudyConfig, base: TrainConfig, steps: int) -> TrainConfig:
    return base.replace(
        steps=steps,
        batch_tokens=study.batch_tokens,
        input_length=study.input_length,
        target_length=study.target_length,
        eval_every=max(1, steps // 6),
        save_every=max(1, steps // 3),
        seed=study.seed,
    )


_HELD_IN = {"builtin": ("builtin-heldin",), "mirror": ("niv2-valid", "boolq", "arc_easy")}
_HELD_OUT = {"builtin": ("builtin",), "mirror": ("niv2-test", "bbh")}


def study(config: StudyConfig) -> dict:
    """Run everything, write the results JSON and its figures; returns the results.

    A second call with the same workdir takes up where the first one stopped.

    Raises:
      FileNotFoundError: source "mirror" without a data folder.
    """
    started = time.time()
    data = _Data(config)
    for folder in (config.out / "results", config.out / "figures", config.workdir):
        folder.mkdir(parents=True, exist_ok=True)
    models = {}
    for flavour in config.flavours:
        models[flavour] = _one_model(config, data, data.model_config(flavour))
    results = {
        "kind": "study",
        "config": json.loads(json.dumps(asdict(config), default=str)),
        "environment": environment(),
        "data": data.facts(),
        "unigram_entropy": data.entropy,
        "models": models,
        "seconds": round(time.time() - started, 1),
    }
    results["config"] |= {"out": config.out.name, "workdir": config.workdir.name}
    path = config.out / "results" / f"{config.title}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    results["path"] = str(path)
    results["figures"] = [str(p) for p in study_figures(results, config.out / "figures")]
    return results


class _Data:
    """Corpus, tokenizer, mixture and suites of a study."""

    def __init__(self, config: StudyConfig):
        self.config = config
        mirror = config.source == "mirror"
        self.corpus = open_corpus(config.source)
        self.mixture = flan_mixture("flan2022" if mirror else "builtin")
        names = (*_HELD_IN[config.source], *_HELD_OUT[config.source])
        self.suites = {name: suite(name) for name in names}
        self.tokenizer_spec = str(self._tokenizer(config)) if mirror else "byte"
        self.tokenizer = load_tokenizer(self.tokenizer_spec)
        lengths = {"input_length": config.input_length, "target_length": config.target_length}
        stream = batches(
            self.corpus,
            self.tokenizer,
            batch_size=16,
            seed=0,
            split="valid",
            repeat=False,
            **lengths,
        )
        some = [batch for batch, _ in zip(stream, range(64), strict=False)]
        self.entropy = unigram_entropy(some, self.tokenizer.vocab_size)

    def _tokenizer(self, config: StudyConfig) -> Path:
        """Trained once on every seventh document, which is plenty for a unigram model."""
        path = config.workdir / f"tokenizer-{config.vocab_size}.model"
        if not path.exists():
            texts = (d.text for d in self.corpus.documents("train")[::7])
            train_sentencepiece(texts, path, config.vocab_size)
        return path

    def model_config(self, flavour: str) -> ModelConfig:
        cfg = preset(f"{flavour}-{self.config.size}")
        return cfg.replace(tokenizer=self.tokenizer_spec, vocab_size=self.tokenizer.vocab_size)

    def facts(self) -> dict[str, Any]:
        facts = {
            "corpus": self.corpus.digest(),
            "tokenizer": self.tokenizer.digest(),
            "mixture": self.mixture.digest(),
            "documents": len(self.corpus.documents("train")),
            "tasks": len(self.mixture.tasks),
        }
        manifest = self.config.source == "mirror" and data_dir() / "manifest.json"
        if manifest and manifest.is_file():
            import hashlib

            facts["manifest"] = hashlib.sha256(manifest.read_bytes()).hexdigest()[:12]
        return facts


def _one_model(config: StudyConfig, data: _Data, cfg: ModelConfig) -> dict:
    """One model through pretraining and the FLAN stage, asked before and after."""
    folder = config.workdir / cfg.name
    pre, tune = (
        _stage(config, PRETRAIN, config.pretrain_steps),
        _stage(config, TUNE, config.tune_steps),
    )
    model = EncoderDecoder(cfg, seed=config.seed)
    pretrained = pretrain(model, data.corpus, pre, workdir=folder / "pretrain")
    before = _scores(config, data, model)
    routing_before = _routing(data, model, folder / "pretrain")
    # dropout belongs to the FLAN stage alone: a fresh module around the same parameters
    model = _with_config(model, cfg.replace(**FLAN_DROPOUT))
    tuned = instruction_tune(
        model, data.mixture, tune, workdir=folder / "tune", eval_source=_Valid(data.mixture)
    )
    encoder, decoder = cfg.flops_per_token()
    steps = pre.steps + tune.steps
    return {
        "config": cfg.to_dict() | {"tokenizer": Path(str(cfg.tokenizer)).name},
        "parameters": cfg.num_parameters()._asdict(),
        "flops_per_token": {"encoder": encoder, "decoder": decoder},
        "tokens": steps * pre.batch_size * (pre.input_length + pre.target_length),
        "training_flops": 3.0
        * steps
        * pre.batch_size
        * (encoder * pre.input_length + decoder * pre.target_length),
        "pretrain": pretrained.metrics.rows,
        "tune": tuned.metrics.rows,
        "before": before,
        "after": _scores(config, data, model),
        "routing_before": routing_before,
        "routing_after": _routing(data, model, folder / "tune"),
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


def _with_config(model: EncoderDecoder, cfg: ModelConfig) -> EncoderDecoder:
    from flax import nnx

    changed = EncoderDecoder(cfg, mesh=model.mesh)
    nnx.update(changed, nnx.state(model))
    return changed


@dataclass(frozen=True)
class _Valid:
    """The validation split of those tasks that have one."""

    mixture: Mixture

    def token_pairs(self, tokenizer, **kwargs):
        return _validated(self.mixture).token_pairs(tokenizer, **kwargs)


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


def _scores(config: StudyConfig, data: _Data, model: EncoderDecoder) -> list[dict]:
    scores = []
    for each in data.suites.values():
        limit = config.limits[0] if len(each.tasks) > 20 else config.limits[1]
        scores.append(evaluate(model, each, limit=limit, max_new_tokens=24).to_dict())
    return scores


def _routing(data: _Data, model: EncoderDecoder, folder: Path) -> dict | None:
    """Balance and domain specialization of the encoder on labelled text."""
    if not model.cfg.num_experts:
        return None
    per_domain = 96 if len(data.corpus.domains) < 6 else 32
    prompts = text_prompts(
        data.corpus, per_domain, characters=min(600, data.config.input_length * 3)
    )
    trace = trace_routing(model, prompts, input_length=data.config.input_length, target_length=8)
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
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
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
    """Redraw the figures of every recorded study.

    Raises:
      FileNotFoundError: no results there.
    """
    paths: list[Path] = []
    found: Sequence[Path] = sorted(Path(results).glob("*.json"))
    for path in found:
        record = json.loads(path.read_text())
        if record.get("kind") == "study":
            paths += study_figures(record | {"path": str(path)}, Path(out))
    if not paths:
        raise FileNotFoundError(f"no recorded study in {results}: `moekit study` makes one")
    return paths
