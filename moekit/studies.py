"""The stages of the paper's experiment, and the settings in which the notebooks run them.

Every stage is one call of `train`: pretraining by span corruption, instruction tuning on a FLAN
mixture, finetuning on one task. Studies over seeds are in `moekit.experiment`.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekit.analysis.trace import RouterTrace, text_prompts, trace_routing
from moekit.checks import check_integers
from moekit.config import ModelConfig, TrainConfig
from moekit.data.batch import unigram_entropy
from moekit.data.corpora import corpus as open_corpus
from moekit.data.flan import flan_mixture
from moekit.data.loader import batches
from moekit.data.mixture import Mixture, PromptFormats
from moekit.data.tasks import Task
from moekit.data.text import Corpus
from moekit.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from moekit.errors import unknown
from moekit.model.transformer import EncoderDecoder, with_config
from moekit.presets import preset
from moekit.training.loop import Run, train
from moekit.training.trainer import Callback, OnLog

SOURCES = ("builtin", "local")
FORMER_LOCAL = "mirror"  # the former name of "local"
SETTINGS = ("small", "colab", "full")  # of the notebooks
VOCAB_SIZES = {"nano": 1024, "mini": 8192}


@dataclass(frozen=True)
class StudyConfig:
    """The stages of models of one size, as the notebooks run them.

    Args:
      source: builtin, or local for the data folder (MOEKIT_DATA).
      size: nano or mini.
      pretrain_steps: Steps of pretraining.
      tune_steps: Steps of instruction tuning.
      batch_tokens: Tokens of a batch, inputs and targets together.
      input_length: Tokens of an encoder row.
      target_length: Tokens of a decoder row.
      seed: Seed of the models and of the data order.
      workdir: Folder for tokenizer and checkpoints.

    Raises:
      ValueError: an unknown source or size, or a number below 1.
    """

    source: str = "builtin"
    size: str = "nano"
    pretrain_steps: int = 400
    tune_steps: int = 800
    batch_tokens: int = 2560
    input_length: int = 128
    target_length: int = 32
    seed: int = 0
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
    """What the stages share: text, tokenizer, mixture, settings.

    Each stage saves its checkpoints in a folder of its own, named by model and seed. A second call
    resumes from there instead of training twice.

    Raises:
      FileNotFoundError: source "local" without a data folder.
    """

    def __init__(self, config: StudyConfig):
        self.config = config
        self.corpus = open_corpus(config.source)
        self.mixture = flan_mixture("flan2022" if config.source == "local" else "builtin")
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

    def trace(self, model: EncoderDecoder) -> RouterTrace:
        """The routing of held-out text, equally many pieces of each domain."""
        per_domain = 96 if len(self.corpus.domains) < 6 else 32
        length = self.config.input_length
        prompts = text_prompts(self.corpus, per_domain, characters=min(600, length * 3))
        return trace_routing(model, prompts, input_length=length, target_length=8)


def _with_validation(mixture: Mixture) -> Mixture:
    """The tasks of a mixture that have validation examples."""
    kept = [index for index, task in enumerate(mixture.tasks) if _has_validation(task)]
    return mixture.select(kept)


def _has_validation(task: Task) -> bool:
    try:
        return bool(task.examples("valid"))
    except ValueError:
        return False
