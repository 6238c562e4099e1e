"""The data of a study: text, instruction mixture, held-out questions, finetuning tasks, tokenizer.

`StudyData` reads them from the embedded data or the data folder. `PackedStudyData` has the same as
arrays in one file, for a machine without these data.
"""

import functools
import json
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from moekit.data.builtin.tasks import builtin_tasks
from moekit.data.corpora import corpus as open_corpus
from moekit.data.flan import flan_mixture
from moekit.data.loader import batches
from moekit.data.mixture import Mixture, PromptFormats
from moekit.data.packed_rows import FIELDS, PackedRows
from moekit.data.paths import require_file
from moekit.data.suites import Suite, suite
from moekit.data.tasks import Example, Task, stable_random
from moekit.data.tokenizer import EOS, load_tokenizer, train_sentencepiece
from moekit.errors import unknown
from moekit.evaluation.evaluator import suite_questions
from moekit.experiment.design import PRETRAINED, Design, Setup
from moekit.train_config import TrainConfig

SETS = ("choosing", "reporting", "final")
LOCAL_SUITES = ("niv2-test", "bbh")  # where the held-out clusters of "local" are looked up
VALIDATION_ROWS = 1024  # that a packed study holds
MAX_BYTES = 1 << 30  # of a packed study


class StudyQuestion(NamedTuple):
    """A question as token ids, each text ending in end of sequence.

    Args:
      options: that are ranked; a question without options has its answer alone.
      answer: index of the right option.
    """

    task: str
    cluster: str
    input_ids: list[int]
    options: list[list[int]]
    answer: int


class StudyData:
    """The data that a design names. Nothing is read before it is needed, except names.

    Raises:
      FileNotFoundError: source "local" without a data folder.
      ValueError: a cluster or task that the data do not have.
    """

    def __init__(self, design: Design, workdir: Path):
        self.design = design
        self.corpus = open_corpus(design.source)
        self.pool = _pool(design.source)
        clusters = {task.cluster for task in self.pool.values()}
        for cluster in design.held_out.clusters:
            if cluster not in clusters:
                raise unknown("cluster of held_out", cluster, clusters)
        self.mixture = self._without_held_out(design.source)
        for setup in design.setups.values():
            self._check_tasks(setup)
        self.tokenizer_path = workdir / f"tokenizer-{design.vocab_size}.model"
        if not self.tokenizer_path.exists():
            workdir.mkdir(parents=True, exist_ok=True)
            train_sentencepiece(self._texts(), self.tokenizer_path, design.vocab_size)
        self.tokenizer = load_tokenizer(self.tokenizer_path)
        self._questions: dict[tuple[str, int], list[StudyQuestion]] = {}

    def source(self, setup: str, task: str = "") -> Any:
        """What a setup trains on.

        Args:
          task: that it finetunes on.
        """
        if setup == PRETRAINED:
            return self.corpus
        if task:
            # zero-shot and without the options, as it is evaluated
            formats = PromptFormats(few_shot=0.0, no_options=1.0)
            return Mixture(task, (self.pool[task],), (1.0,), (formats,), ("finetuning",))
        return self._tuning_mixture(self.design.setups[setup])

    @property
    def validation(self) -> Any:
        """What pretraining is validated on."""
        return self.corpus

    def questions(self, name: str, shots: int) -> list[StudyQuestion]:
        """The questions of a set of held-out tasks ("choosing", "reporting", "final"), or of a
        task."""
        key = (name, shots)
        if key not in self._questions:
            self._questions[key] = self._read_questions(name, shots)
        return self._questions[key]

    def _read_questions(self, name: str, shots: int) -> list[StudyQuestion]:
        if name in SETS:
            tasks = self.held_out_tasks(name)
        elif name in self.pool:
            tasks = [self.pool[name]]
        else:
            raise unknown("set of held-out tasks, or task,", name, (*SETS, *self.pool))
        if not tasks:
            return []
        found = suite_questions(
            Suite(name, tuple(tasks), shots=shots, options=False),
            self.tokenizer,
            limit=self.design.held_out.questions,
            seed=0,
            max_length=min(model.config.max_length for model in self.design.models.values()),
        )
        questions = []
        for each in found:
            options = each.prompt.options or (each.prompt.target,)
            questions.append(
                StudyQuestion(
                    task=each.task.name,
                    cluster=each.task.cluster,
                    input_ids=each.input_ids,
                    options=[[*self.tokenizer.encode(option), EOS] for option in options],
                    answer=options.index(each.prompt.target),
                )
            )
        return questions

    def held_out_tasks(self, name: str) -> list[Task]:
        """The tasks of a set."""
        clusters = getattr(self.design.held_out, name)
        return [task for task in self.pool.values() if task.cluster in clusters]

    def digest(self) -> dict[str, str]:
        """Digests of text, tokenizer and mixture."""
        return {
            "corpus": self.corpus.digest(),
            "tokenizer": self.tokenizer.digest(),
            "mixture": self.mixture.digest(),
        }

    def _without_held_out(self, source: str) -> Mixture:
        mixture = flan_mixture("flan2022" if source == "local" else "builtin")
        held_out = set(self.design.held_out.clusters)
        kept = [i for i, task in enumerate(mixture.tasks) if task.cluster not in held_out]
        return mixture.select(kept)

    def _check_tasks(self, setup: Setup) -> None:
        for name in setup.tasks:
            if name not in self.pool:
                raise unknown(f"task of setups.{setup.name}", name, self.pool)
            if "train" not in self.pool[name].splits:
                raise ValueError(f"setups.{setup.name}: task {name} has no training examples")
        if setup.mixture_tasks > len(self.mixture.tasks):
            raise ValueError(
                f"setups.{setup.name}: mixture_tasks is {setup.mixture_tasks}, but the mixture has "
                f"{len(self.mixture.tasks)} tasks without the held-out ones"
            )

    def _texts(self) -> list[str]:
        """Every seventh document, and of the embedded tasks some prompts: their words are not those
        of the embedded text."""
        texts = [document.text for document in self.corpus.documents("train")[::7]]
        if self.design.source == "builtin":
            for prompt in self.mixture.sample(3000):
                texts.append(f"{prompt.input}\n{prompt.target}")
        return texts

    def _tuning_mixture(self, setup: Setup) -> Mixture:
        """The instruction mixture of a setup."""
        mixture = self.mixture
        if setup.mixture_tasks:
            order = sorted(range(len(mixture.tasks)), key=lambda i: _order(mixture.tasks[i].name))
            mixture = mixture.select(sorted(order[: setup.mixture_tasks]))
        if setup.shuffled_targets:
            shuffled = tuple(shuffled_targets(task) for task in mixture.tasks)
            mixture = replace(mixture, name=f"{mixture.name}-shuffled", tasks=shuffled)
        return mixture


class PackedStudyData:
    """The data of a design in the file that `pack_study` wrote.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, or was written for another design.
    """

    def __init__(self, design: Design, path: Path, workdir: Path):
        require_file(path, MAX_BYTES)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                self._arrays = dict(arrays)
            self._header = json.loads(self._arrays["header"].tobytes())
            tokenizer = self._arrays["tokenizer"].tobytes()
        except (KeyError, ValueError, OSError, EOFError, BadZipFile, zlib.error) as error:
            raise ValueError(
                f"{path} is no packed study, or is damaged ({error}): pack it again"
            ) from None
        if self._header["data"] != describe_data(design):
            raise ValueError(f"{path} was packed for another design: pack it again")
        self.tokenizer_path = workdir / f"tokenizer-{design.vocab_size}.model"
        workdir.mkdir(parents=True, exist_ok=True)
        self.tokenizer_path.write_bytes(tokenizer)
        self.tokenizer = load_tokenizer(self.tokenizer_path)

    def source(self, setup: str, task: str = "") -> PackedRows:
        """The rows that a setup trains on."""
        return self._rows(_name_of_rows(setup, task))

    @property
    def validation(self) -> PackedRows:
        """The rows that pretraining is validated on."""
        return self._rows("validation")

    def questions(self, name: str, shots: int) -> list[StudyQuestion]:
        """The questions of a set of held-out tasks, or of a task."""
        return [StudyQuestion(*each) for each in self._header["questions"][f"{name}/{shots}"]]

    def digest(self) -> dict[str, str]:
        """Digests of text, tokenizer and mixture."""
        return self._header["digest"]

    def _rows(self, name: str) -> PackedRows:
        return PackedRows(**{field: self._arrays[f"{name}/{field}"] for field in FIELDS})


def pack_study(design: Design, data: StudyData, path: Path, max_rows: int) -> None:
    """Write all data of a design into one file.

    Args:
      max_rows: rows of a setup's training, at most; a longer training reads them again.
    """
    arrays: dict[str, Any] = {}

    def add_rows(name: str, source: Any, config: TrainConfig, split: str, num_rows: int) -> None:
        stream = batches(
            source,
            data.tokenizer,
            input_length=config.input_length,
            target_length=config.target_length,
            batch_size=config.batch_size,
            seed=0,
            split=split,
            repeat=split == "train",
        )
        rows = PackedRows.of_stream(stream, num_rows)
        stream.close()
        arrays.update({f"{name}/{field}": array for field, array in rows.arrays().items()})

    add_rows("validation", data.validation, design.pretrain, "valid", VALIDATION_ROWS)
    questions = {}
    for setup in (PRETRAINED, *design.setups):
        config = design.pretrain if setup == PRETRAINED else design.setups[setup].training
        num_rows = min(config.steps * config.batch_size, max_rows)
        tasks = () if setup == PRETRAINED else design.setups[setup].tasks
        for task in tasks or ("",):
            name = _name_of_rows(setup, task)
            add_rows(name, data.source(setup, task), config, "train", num_rows)
            if task:
                questions[f"{task}/0"] = data.questions(task, 0)
    for name in SETS:
        for shots in design.held_out.shots:
            questions[f"{name}/{shots}"] = data.questions(name, shots)
    header = {"data": describe_data(design), "digest": data.digest(), "questions": questions}
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    arrays["tokenizer"] = np.frombuffer(data.tokenizer_path.read_bytes(), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)


def describe_data(design: Design) -> list[Any]:
    """What the packed data of a design depend on."""
    held_out = design.held_out
    described: list[Any] = [
        [design.source, design.vocab_size],
        [list(held_out.choosing), list(held_out.reporting), list(held_out.final)],
        [held_out.questions, list(held_out.shots)],
        [design.pretrain.input_length, design.pretrain.target_length],
    ]
    for setup in design.setups.values():
        lengths = [setup.training.input_length, setup.training.target_length]
        settings = [setup.mixture_tasks, setup.shuffled_targets]
        described.append([setup.name, list(setup.tasks), *settings, *lengths])
    return described


def _name_of_rows(setup: str, task: str) -> str:
    return f"{setup}/{task}" if task else setup


def _order(name: str) -> float:
    return stable_random("mixture tasks", name).random()


@functools.cache
def _pool(source: str) -> dict[str, Task]:
    """All tasks that can be held out, by name."""
    if source == "builtin":
        return builtin_tasks()
    return {task.name: task for name in LOCAL_SUITES for task in suite(name).tasks}


def shuffled_targets(task: Task) -> Task:
    """A task whose answers in training belong to other examples, or are random options.

    What is left to learn from it is the format: which words answer such questions.
    """

    def load(split: str) -> Sequence[Example]:
        examples = task.examples(split)
        if split != "train":
            return examples
        random = stable_random("shuffled targets", task.name)
        answers = [example.answer for example in examples]
        random.shuffle(answers)
        shuffled = []
        for example, answer in zip(examples, answers, strict=True):
            if example.options:
                answer = random.choice(example.options)
            shuffled.append(replace(example, answer=answer, references=(), rationale=""))
        return shuffled

    return replace(task, load=load, origin=None)
