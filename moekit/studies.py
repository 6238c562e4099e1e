"""The stages of the paper's experiment, and the study that runs them end to end.

Every recipe is one call of `train`: pretraining by span corruption, instruction tuning on a FLAN
mixture, finetuning on one task. `study` runs all of it for a dense and a sparse model of equal
FLOPs per token and records one JSON; `moekit.analysis.recorded` draws its figures.
"""

import functools
import hashlib
import itertools
import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moekit.analysis.balance import balance_table, expert_load
from moekit.analysis.recorded import draw_study
from moekit.analysis.specialization import domain_specialization
from moekit.analysis.trace import RouterTrace, text_prompts, trace_routing
from moekit.checks import bad_field, check_integers
from moekit.config import ModelConfig, TrainConfig
from moekit.data.batch import unigram_entropy
from moekit.data.corpora import corpus as open_corpus
from moekit.data.files import data_dir
from moekit.data.flan import flan_mixture
from moekit.data.loader import batches
from moekit.data.mixture import Mixture, PromptFormats
from moekit.data.paths import require_file_name
from moekit.data.suites import suite
from moekit.data.tasks import Task
from moekit.data.text import Corpus
from moekit.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from moekit.errors import unknown
from moekit.evaluation.evaluator import evaluate
from moekit.evaluation.scores import Scores
from moekit.model.transformer import EncoderDecoder, with_config
from moekit.presets import preset
from moekit.training.loop import Run, train
from moekit.training.run_folder import git_commit
from moekit.training.trainer import Callback, OnLog

SOURCES = ("builtin", "local")
FORMER_LOCAL = "mirror"  # the former name of "local"
SETTINGS = ("small", "colab", "full")  # of the notebooks
VOCAB_SIZES = {"nano": 1024, "mini": 8192}
HELD_IN_SUITES = {
    "builtin": ("builtin-heldin",),
    "local": ("niv2-valid", "boolq", "arc_easy"),
}
HELD_OUT_SUITES = {"builtin": ("builtin",), "local": ("niv2-test", "bbh")}


@dataclass(frozen=True)
class StudyConfig:
    """A dense and a sparse model of one size through all stages.

    Args:
      source: builtin, or local for the data folder (MOEKIT_DATA).
      size: nano or mini.
      families: Families of presets to compare, such as t5 and st.
      pretrain_steps: Steps of pretraining.
      tune_steps: Steps of instruction tuning.
      batch_tokens: Tokens of a batch, inputs and targets together.
      input_length: Tokens of an encoder row.
      target_length: Tokens of a decoder row.
      limits: Questions per task of suites with more than 20 tasks, and of smaller suites.
      options: Whether prompts show a question's options, which are ranked in either case.
      seed: Seed of the models and of the data order.
      name: Name of the results; by default source, size and seed.
      out: Results are written to out/results, figures to out/figures.
      workdir: Folder for tokenizer and checkpoints.

    Raises:
      ValueError: an unknown source, size or family, a number below 1, or a name that is no file
        name.
    """

    source: str = "builtin"
    size: str = "nano"
    families: tuple[str, ...] = ("t5", "st")
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

    def __post_init__(self) -> None:
        if self.source == FORMER_LOCAL:
            object.__setattr__(self, "source", "local")
        if self.source not in SOURCES:
            raise unknown("source", self.source, SOURCES)
        if self.size not in VOCAB_SIZES:
            raise unknown("size", self.size, VOCAB_SIZES)
        sizes = ("pretrain_steps", "tune_steps", "batch_tokens", "input_length", "target_length")
        check_integers(self, "StudyConfig", 1, sizes)
        if min(self.limits) < 1:
            raise bad_field(self, "StudyConfig", "limits", "use 1 or more")
        require_file_name(self.title, "the study's name")
        if not self.families:
            raise ValueError("StudyConfig: there are no families; use some such as t5 and st")
        for family in self.families:
            preset(f"{family}-{self.size}")

    @classmethod
    def named(cls, setting: str) -> "StudyConfig":
        """The configuration of the notebooks' setting "small", "colab" or "full"."""
        if setting == "small":  # minutes on two CPU cores
            return cls(pretrain_steps=300, tune_steps=500, workdir=Path("runs/small"))
        if setting == "colab":  # about ten minutes on one TPU v5e or T4
            return cls(
                size="mini",
                pretrain_steps=600,
                tune_steps=600,
                batch_tokens=16_384,
                input_length=256,
                target_length=64,
                workdir=Path("runs/colab"),
            )
        if setting == "full":
            return cls(
                size="mini",
                pretrain_steps=20_000,
                tune_steps=10_000,
                batch_tokens=65_536,
                input_length=512,
                target_length=128,
                workdir=Path("runs/full"),
            )
        raise unknown("setting", setting, SETTINGS)

    @property
    def vocab_size(self) -> int:
        return VOCAB_SIZES[self.size]

    @property
    def title(self) -> str:
        """Name of the results file and of its figures."""
        return self.name or f"{self.source}-{self.size}-seed{self.seed}"


# Adafactor multiplies by the scale of each parameter; the rate falls as 1 / sqrt(step)
PRETRAIN = TrainConfig(learning_rate=5e-2, schedule="rsqrt", warmup_steps=50)
TUNE = TrainConfig(learning_rate=1e-2, schedule="constant", warmup_steps=20)
FLAN_DROPOUT, FLAN_EXPERT_DROPOUT = 0.05, 0.2  # Shen et al. 2023
# a nano model underfits in its two minutes: a higher rate that falls to zero, and no dropout
NANO_TUNE = TUNE.replace(learning_rate=6e-2, schedule="linear", warmup_steps=50)


def pretrain(
    model: EncoderDecoder,
    corpus: Corpus,
    config: TrainConfig = PRETRAIN,
    *,
    workdir: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    callbacks: Sequence[Callback] = (),
    on_log: OnLog | Sequence[OnLog] = (),
    resume: bool = True,
) -> Run:
    """Pretrain by span corruption, validated on the corpus's own "valid" split; see `train`."""
    return train(
        model,
        corpus,
        config,
        workdir=workdir,
        tokenizer=tokenizer,
        eval_source=corpus,
        callbacks=callbacks,
        on_log=on_log,
        resume=resume,
    )


def instruction_tune(
    model: EncoderDecoder,
    mixture: Mixture,
    config: TrainConfig = TUNE,
    *,
    workdir: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    eval_source: Mixture | None = None,
    callbacks: Sequence[Callback] = (),
    on_log: OnLog | Sequence[OnLog] = (),
    resume: bool = True,
) -> Run:
    """The FLAN stage: train all parameters on the whole mixture; see `train`."""
    return train(
        model,
        mixture,
        config,
        workdir=workdir,
        tokenizer=tokenizer,
        eval_source=eval_source,
        callbacks=callbacks,
        on_log=on_log,
        resume=resume,
    )


def finetune(
    model: EncoderDecoder,
    task: Task,
    config: TrainConfig = TUNE,
    *,
    workdir: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    eval_source: Mixture | None = None,
    callbacks: Sequence[Callback] = (),
    on_log: OnLog | Sequence[OnLog] = (),
    resume: bool = True,
) -> Run:
    """Finetune on one downstream task; see `train`.

    The paper's setup (i) after pretraining, its setup (iii) after the FLAN stage.
    """
    return instruction_tune(
        model,
        single_task(task),
        config,
        workdir=workdir,
        tokenizer=tokenizer,
        eval_source=eval_source,
        callbacks=callbacks,
        on_log=on_log,
        resume=resume,
    )


def single_task(task: Task) -> Mixture:
    """A mixture of one task, zero-shot and with its options, as evaluation prompts it."""
    formats = PromptFormats(few_shot=0.0, no_options=0.0)
    return Mixture(task.name, (task,), (1.0,), (formats,), ("finetuning",))


class StudySetup:
    """What the stages of a study share: text, tokenizer, mixture, suites, settings.

    Each stage saves its checkpoints in a folder of its own, named by model and seed. A second call
    resumes from there instead of training twice.

    Raises:
      FileNotFoundError: source "local" without a data folder.
    """

    def __init__(self, config: StudyConfig):
        self.config = config
        self.corpus = open_corpus(config.source)
        self.mixture = flan_mixture("flan2022" if config.source == "local" else "builtin")
        self.held_in = [suite(name) for name in HELD_IN_SUITES[config.source]]
        self.held_out = [suite(name) for name in HELD_OUT_SUITES[config.source]]
        config.workdir.mkdir(parents=True, exist_ok=True)
        name = f"tokenizer-{config.source}-{config.vocab_size}.model"
        self.tokenizer_path = config.workdir / name
        if not self.tokenizer_path.exists():
            texts = self._tokenizer_texts()
            train_sentencepiece(texts, self.tokenizer_path, config.vocab_size)
        self.tokenizer = load_tokenizer(self.tokenizer_path)

    def _tokenizer_texts(self) -> list[str]:
        """Every seventh document, which is enough for a unigram model.

        Of the embedded tasks also some prompts, whose words are not those of the embedded text.
        """
        texts = [document.text for document in self.corpus.documents("train")[::7]]
        if self.config.source == "builtin":
            for prompt in self.mixture.sample(3000):
                texts.append(f"{prompt.input}\n{prompt.target}")
        return texts

    @functools.cached_property
    def unigram_entropy(self) -> float:
        """Unigram entropy of the span-corruption targets of held-out text, in nats per token."""
        stream = batches(
            self.corpus,
            self.tokenizer,
            seed=0,
            split="valid",
            repeat=False,
            input_length=self.config.input_length,
            target_length=self.config.target_length,
            batch_size=16,
        )
        held_out = list(itertools.islice(stream, 64))
        return unigram_entropy(held_out, self.tokenizer.vocab_size)

    def model_config(self, family: str) -> ModelConfig:
        """The family's preset of the study's size, with the study's tokenizer."""
        cfg = preset(f"{family}-{self.config.size}")
        vocab_size = self.tokenizer.vocab_size
        return cfg.replace(tokenizer=str(self.tokenizer_path), vocab_size=vocab_size)

    def folder(self, cfg: ModelConfig, stage: str) -> Path:
        """Where a stage of a model keeps its checkpoints."""
        return self.config.workdir / f"{cfg.name}-seed{self.config.seed}" / stage

    def stage(self, base: TrainConfig, steps: int) -> TrainConfig:
        """The settings of a stage with six evaluations and three checkpoints."""
        return base.replace(
            steps=steps,
            batch_tokens=self.config.batch_tokens,
            input_length=self.config.input_length,
            target_length=self.config.target_length,
            eval_every=math.ceil(steps / 6),
            save_every=math.ceil(steps / 3),
            seed=self.config.seed,
        )

    def pretrain(self, family: str, **changes: Any) -> Run:
        """Pretrain a new model by span corruption.

        Args:
          changes: fields of its `ModelConfig`; give a `name` with them, which names the folder.
        """
        cfg = self.model_config(family).replace(**changes)
        model = EncoderDecoder(cfg, seed=self.config.seed)
        stage = self.stage(PRETRAIN, self.config.pretrain_steps)
        return pretrain(model, self.corpus, stage, workdir=self.folder(cfg, "pretrain"))

    def tune(self, model: EncoderDecoder, callbacks: Sequence[Callback] = ()) -> Run:
        """The FLAN stage on a copy of the model: dropout belongs to this stage alone."""
        cfg, base = model.cfg, NANO_TUNE
        if self.config.size != "nano":
            cfg = cfg.replace(dropout=FLAN_DROPOUT, expert_dropout=FLAN_EXPERT_DROPOUT)
            base = TUNE
        return instruction_tune(
            with_config(model, cfg),
            self.mixture,
            self.stage(base, self.config.tune_steps),
            workdir=self.folder(cfg, "tune"),
            eval_source=_with_validation(self.mixture),
            callbacks=callbacks,
        )

    def scores(self, model: EncoderDecoder) -> list[Scores]:
        """Zero-shot scores on the held-in suites, then on the held-out ones."""
        limit_of_many, limit_of_few = self.config.limits
        results = []
        for each in (*self.held_in, *self.held_out):
            limit = limit_of_many if len(each.tasks) > 20 else limit_of_few
            scores = evaluate(
                model,
                each,
                shots=0,
                limit=limit,
                max_new_tokens=24,
                options=self.config.options,
            )
            results.append(scores)
        return results

    def trace(self, model: EncoderDecoder) -> RouterTrace:
        """The routing of held-out text, equally many pieces of each domain."""
        per_domain = 96 if len(self.corpus.domains) < 6 else 32
        length = self.config.input_length
        prompts = text_prompts(self.corpus, per_domain, characters=min(600, length * 3))
        return trace_routing(model, prompts, input_length=length, target_length=8)

    def data_summary(self) -> dict[str, Any]:
        """Digests and sizes of the data."""
        summary = {
            "corpus": self.corpus.digest(),
            "tokenizer": self.tokenizer.digest(),
            "mixture": self.mixture.digest(),
            "documents": len(self.corpus.documents("train")),
            "tasks": len(self.mixture.tasks),
        }
        if self.config.source == "local":
            manifest = data_dir() / "manifest.json"
            if manifest.is_file():
                summary["manifest"] = hashlib.sha256(manifest.read_bytes()).hexdigest()[:12]
        return summary


def study(config: StudyConfig) -> dict[str, Any]:
    """Run everything, write the results JSON and its figures; returns the results.

    A second call with the same workdir resumes.

    Raises:
      FileNotFoundError: source "local" without a data folder.
    """
    start = time.time()
    setup = StudySetup(config)
    results_folder, figures_folder = config.out / "results", config.out / "figures"
    results_folder.mkdir(parents=True, exist_ok=True)
    figures_folder.mkdir(parents=True, exist_ok=True)
    models = {family: _record_model(setup, family) for family in config.families}
    recorded_config = asdict(config)
    recorded_config |= {"out": config.out.name, "workdir": config.workdir.name}
    results = {
        "kind": "study",
        "config": recorded_config,
        "environment": environment(),
        "data": setup.data_summary(),
        "unigram_entropy": setup.unigram_entropy,
        "models": models,
        "seconds": round(time.time() - start, 1),
    }
    path = results_folder / f"{config.title}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    paths = draw_study(results, config.title, figures_folder)
    results["path"] = str(path)
    results["figures"] = [str(path) for path in paths]
    return results


def _record_model(setup: StudySetup, family: str) -> dict[str, Any]:
    """One model through pretraining and the FLAN stage, evaluated before and after."""
    pretrained = setup.pretrain(family)
    model = pretrained.model
    before = [scores.to_dict() for scores in setup.scores(model)]
    routing_before = _record_routing(setup, model, "pretrain")
    tuned = setup.tune(model)
    after = [scores.to_dict() for scores in setup.scores(tuned.model)]
    routing_after = _record_routing(setup, tuned.model, "tune")
    encoder_flops, decoder_flops = model.cfg.flops_per_token()
    config = pretrained.config
    rows = (config.steps + tuned.config.steps) * config.batch_size
    row_flops = encoder_flops * config.input_length + decoder_flops * config.target_length
    return {
        "config": _recorded_config(setup, model.cfg),
        "tuned_config": _recorded_config(setup, tuned.model.cfg),
        "pretrain_config": asdict(config),
        "tune_config": asdict(tuned.config),
        "parameters": model.cfg.num_parameters()._asdict(),
        "flops_per_token": {"encoder": encoder_flops, "decoder": decoder_flops},
        "tokens": rows * (config.input_length + config.target_length),
        "training_flops": 3.0 * rows * row_flops,  # a backward pass costs two forward passes
        "pretrain": pretrained.metrics.rows,
        "tune": tuned.metrics.rows,
        "before": before,
        "after": after,
        "routing_before": routing_before,
        "routing_after": routing_after,
    }


def _recorded_config(setup: StudySetup, cfg: ModelConfig) -> dict[str, Any]:
    """A model's configuration without the folder of this machine."""
    return cfg.to_dict() | {"tokenizer": setup.tokenizer_path.name}


def summary(results: dict[str, Any]) -> str:
    """The findings of a study in a few lines."""
    lines = [f"results: {results['path']}"]
    for model in results["models"].values():
        name = model["config"]["name"]
        losses = [row["valid_loss"] for row in model["pretrain"] if "valid_loss" in row]
        lines.append(
            f"{name}: validation loss {losses[-1]:.3f} nats per token (unigram entropy "
            f"{results['unigram_entropy']:.3f})"
        )
        for before, after in zip(model["before"], model["after"], strict=True):
            old, new = before["mean"], after["mean"]
            lines.append(
                f"  {after['name']}: {old['score']:.1%} before, {new['score']:.1%} after tuning "
                f"({new['low']:.1%} to {new['high']:.1%}; chance {new['chance']:.1%}, "
                f"majority {new['majority']:.1%})"
            )
    return "\n".join([*lines, *results["figures"]])


def _with_validation(mixture: Mixture) -> Mixture:
    """The tasks of a mixture that have validation examples."""
    kept = [index for index, task in enumerate(mixture.tasks) if _has_validation(task)]
    return mixture.select(kept)


def _has_validation(task: Task) -> bool:
    try:
        return bool(task.examples("valid"))
    except ValueError:
        return False


def _record_routing(setup: StudySetup, model: EncoderDecoder, stage: str) -> dict[str, Any] | None:
    """Balance and domain specialization of the encoder on labelled text; None if dense."""
    if not model.cfg.num_experts:
        return None
    trace = setup.trace(model)
    trace.save(setup.folder(model.cfg, stage) / "trace.npz")
    domains: dict[str, Any] = {}
    for name, value in asdict(domain_specialization(trace)).items():
        domains[name] = value if name == "labels" else np.round(value, 5).tolist()
    return {
        "balance": list(balance_table(trace).rows),
        "load": {stack: expert_load(trace, stack).tolist() for stack in trace.stacks},
        "domains": domains,
    }


def environment() -> dict[str, str]:
    """What a result depends on besides data and configuration."""
    device = jax.devices()[0]
    return {
        "device": f"{jax.device_count()} x {device.device_kind}",
        "platform": device.platform,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "commit": git_commit() or "unknown",
    }
