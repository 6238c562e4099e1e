"""The layout of the data folder: its files as tasks.

Two layouts are read: the mirror's own (gzipped JSON lines, one schema a family) and the original
files of the sources (Super-NaturalInstructions task JSON with split lists, FLAN's chain-of-thought
TSV, BIG-Bench Hard JSON, MMLU CSV). Where a family has a training file and none for validation,
one training row in 20 validates, chosen by the hash of its question.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moekit.data.niv2 import MAX_LABELS, niv2_tasks
from moekit.data.rows import cut as divide
from moekit.data.sources import (
    BadRow,
    OnError,
    check_policy,
    data_dir,
    files_digest,
    read,
    read_manifest,
    read_rows,
)
from moekit.data.tasks import LETTERS, Example, Task, templates

BBH_CUE = "Let's think step by step."
_QUESTION, _READING, _DIALOG = map(templates, ("question", "reading", "dialog"))
_INVERTED = templates("question", target="{question}")
_CHOICE = {"question": str, "choices": [str], "answer": int, "context?": str, "subject?": str}


@functools.lru_cache(maxsize=4)
def _rows_and_bytes(manifest: Path, stamp: int) -> dict[str, tuple[int, int]]:
    entries = read_manifest(manifest)
    return {path: (e["rows"], e["bytes"]) for path, e in entries.items() if e.get("rows")}


def _counted(root: Path, path: Path) -> int | None:
    """Rows of a file, where the folder's manifest has them for a file of this size."""
    manifest = root / "manifest.json"
    if not manifest.is_file():
        return None
    known = _rows_and_bytes(manifest, manifest.stat().st_mtime_ns)
    rows, size = known.get(str(path.relative_to(root)), (None, 0))
    return rows if size == path.stat().st_size else None


class Mirror:
    """The tasks of a data folder, in either layout; nothing is read before it is asked for.

    Args:
      on_error: what to do with malformed rows: "stop", "skip", or a function to be told of them.
    """

    def __init__(self, folder: str | Path | None = None, on_error: OnError = "stop"):
        check_policy(on_error)
        self.root, self.on_error = data_dir(folder), on_error

    def _rows(self, name: str, schema: dict, columns=()) -> list[dict]:
        return read_rows(self.root / name, schema, columns=columns, on_error=self.on_error)

    def read(self, path: Path, schema: dict, make: Callable, columns=()) -> list:
        """make(row, number) of every good row of a file."""
        return list(read(path, schema, make, columns=columns, on_error=self.on_error))

    def task(
        self,
        name: str,
        cluster: str,
        files: Mapping[str, Path],
        build: Callable[[Path], Sequence[Example]],
        templates: tuple,
        exemplars: Callable[[], list[Example]] | None = None,
        facts: str = "",
        **kwargs: Any,
    ) -> Task | None:
        """A task over {split: file}; build(file) gives its examples. None without any file.

        Args:
          exemplars: the "train" split of a task that has no file for it.
          facts: what the examples depend on besides the files.
        """
        files = {split: path for split, path in files.items() if path.is_file()}
        if not files:
            return None
        cut = "train" in files and "valid" not in files and not kwargs.get("held_out")
        extra = (("valid",) if cut else ()) + (("train",) if exemplars else ())

        def load(split: str) -> Sequence[Example]:
            if split not in files and split == "train":
                return exemplars()
            found = build(files["train" if cut and split == "valid" else split])
            return divide(found, split) if cut and split in ("train", "valid") else found

        whole = "train" in files and not cut and not kwargs.get("held_out")
        size = _counted(self.root, files["train"]) if whole else None
        return Task(
            name,
            cluster,
            load,
            templates,
            splits=(*files, *extra),
            origin=lambda: files_digest(set(files.values())) + facts,
            size=size,
            **kwargs,
        )

    def _task(self, name, cluster, files: dict[str, str], build: Callable, templates, **kwargs):
        """`task` with names of files in the folder."""
        paths = {split: self.root / file for split, file in files.items()}
        return self.task(
            name, cluster, paths, lambda path: build(self._name(path)), templates, **kwargs
        )

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.root))

    def niv2(self, split: str) -> list[Task]:
        """Super-NaturalInstructions: its tasks for "train" or "test" (held out)."""
        return niv2_tasks(self, split)

    # chain of thought
    def cot(self) -> list[Task]:
        """Questions with rationales, from cot/*.jsonl.gz or FLAN's own cot_data/*_train.tsv."""
        tasks: dict[str, Task] = {}
        files = [p for folder in ("cot", "cot_data") for p in (self.root / folder).glob("*")]
        for path in sorted(files):
            if path.name.endswith((".jsonl", ".jsonl.gz", ".tsv")):
                name = f"cot/{path.name.split('.')[0].removesuffix('_train')}"
                tasks[name] = self.task(
                    name,
                    "chain of thought",
                    {"train": path},
                    self._cot_examples,
                    _QUESTION,
                    inverted=_INVERTED,
                    metric="exact_match",
                )
        return list(tasks.values())

    def _cot_examples(self, path: Path) -> list[Example]:
        names = ("question", "answer", "rationale")

        def make(row: dict, number: int) -> Example:
            rationale = row["rationale"].strip()
            return Example(
                id=f"{self._name(path)}:{number}",
                fields={"question": row["question"].strip()},
                answer=row["answer"].strip(),
                rationale=f"{rationale.rstrip('.')}." if rationale else "",
            )

        columns = names if path.suffix == ".tsv" else ()
        return self.read(path, dict.fromkeys(names, str), make, columns)

    # questions with choices
    def choices(self, name: str, folder: str, cluster: str, *, held_out=False) -> Task | None:
        """A multiple-choice set {question, choices, answer index, perhaps context}."""
        names = [
            f for f in ("train", "dev", "valid") if (self.root / folder / f"{f}.jsonl.gz").exists()
        ]
        files = {split: f"{folder}/{split}.jsonl.gz" for split in ("valid", "test")}
        files["train"] = f"{folder}/{(names or ['train'])[0]}.jsonl.gz"
        build, wordings = self._choice_examples, _READING if name == "boolq" else _QUESTION
        return self._task(name, cluster, files, build, wordings, held_out=held_out)

    def _choice_examples(self, file: str) -> list[Example]:
        return self.read(
            self.root / file, _CHOICE, lambda row, number: self._choice_example(file, number, row)
        )

    def _choice_example(self, file: str, number: int, row: dict, domain: str = "") -> Example:
        choices, answer = [str(c).strip() for c in row["choices"]], row["answer"]
        if not 0 <= answer < len(choices):
            raise BadRow(f"answer {answer} is not one of {len(choices)} choices")
        fields = {"question": row["question"], "context": row.get("context") or ""}
        options = tuple(dict.fromkeys(choices))
        domain = row.get("subject", domain)
        identity = str(row.get("id", f"{file}:{number}"))
        return Example(
            identity,
            fields,
            choices[answer],
            options=options,
            rationale=row.get("rationale") or "",
            domain=domain,
        )

    def mmlu(self) -> list[Task]:
        """One task a subject; the five development rows are the exemplars."""
        if (self.root / "mmlu/test").is_dir():
            return self._mmlu_raw()
        dev, test = "mmlu/dev.jsonl.gz", "mmlu/test.jsonl.gz"
        return [
            self._task(
                f"mmlu/{subject}",
                "mmlu",
                {"train": dev, "test": test},
                lambda file, subject=subject: _by_subject(self, file).get(subject, []),
                _QUESTION,
                held_out=True,
            )
            for subject in sorted(_by_subject(self, test))
        ]

    def _mmlu_raw(self) -> list[Task]:
        columns = ("question", "a", "b", "c", "d", "answer")

        def subject_of(file: str) -> str:
            return re.sub(r".*/|_(dev|test)\.csv$", "", file)

        def build(file: str) -> list[Example]:
            def make(row: dict, number: int) -> Example | None:
                letter, choices = row["answer"].strip(), [row[c] for c in "abcd"]
                if letter == "answer":
                    return None  # some copies carry a header
                if not re.fullmatch(r"[A-D]|[0-3]", letter):
                    raise BadRow(f"answer {letter[:60]!r} is no letter from A to D")
                index = LETTERS.find(letter) if letter.isalpha() else int(letter)
                row = {"question": row["question"], "choices": choices, "answer": index}
                return self._choice_example(file, number, row, domain=subject_of(file))

            schema = dict.fromkeys(columns, str)
            return [e for e in self.read(self.root / file, schema, make, columns) if e]

        tasks = []
        for path in sorted((self.root / "mmlu/test").glob("*_test.csv")):
            subject = path.name.removesuffix("_test.csv")
            files = {"train": f"mmlu/dev/{subject}_dev.csv", "test": f"mmlu/test/{path.name}"}
            name = f"mmlu/{subject}"
            tasks.append(self._task(name, "mmlu", files, build, _QUESTION, held_out=True))
        return tasks

    # BIG-Bench Hard
    def bbh(self) -> list[Task]:
        """Its 23 tasks, never trained on: two of them come in three sizes, a file each. "train" has
        the published exemplars, which are asked in the published wording."""
        prompts, sizes = self._bbh_prompts(), {}
        for path in sorted((self.root / "bbh").iterdir()):
            if path.name.endswith((".jsonl.gz", ".json")):
                name = path.name.split(".")[0]
                base = re.sub(r"_(three|five|seven)_objects$", "", name)
                sizes.setdefault(base, {})[name] = f"bbh/{path.name}"
        return [
            self._bbh_task(name, parts, prompts.get(next(iter(parts)), ""))
            for name, parts in sizes.items()
        ]

    def _bbh_prompts(self) -> dict[str, str]:
        """Chain-of-thought prompts by file name, from a table or the original text files."""
        table = "bbh/prompts/cot_prompts.jsonl.gz"
        if (self.root / table).exists():
            return {r["task"]: r["prompt"] for r in self._rows(table, {"task": str, "prompt": str})}
        folders = (self.root / "bbh/cot-prompts", self.root / "cot-prompts")
        return {
            path.stem: path.read_text("utf-8").partition("-----\n")[2]
            for folder in folders
            for path in sorted(folder.glob("*.txt"))
        }

    def _bbh_task(self, name: str, parts: dict[str, str], prompt: str) -> Task:
        description, *shots = re.split(r"\n\nQ: ", prompt.strip())

        def load(split: str) -> list[Example]:
            if split == "train":
                return [_bbh_shot(f"{name}/shot/{i}", shot) for i, shot in enumerate(shots)]
            examples = []
            for part, file in parts.items():
                rows = self._rows(file, {"input": str, "target": str})
                labels = tuple(sorted({row["target"] for row in rows}))
                labels = labels if 1 < len(labels) <= MAX_LABELS else ()
                examples += [_bbh_example(f"{part}/{i}", r, labels) for i, r in enumerate(rows)]
            return examples

        def ask(example: Example, shots: Sequence[Example], thought: bool) -> str:
            blocks = [description] if description else []
            for shot in shots:
                said = BBH_CUE + shot.rationale if thought else shot.answer
                blocks.append(f"Q: {shot.fields['question']}\nA: {said}")
            asked = f"Q: {example.fields['question']}\nA:"
            return "\n\n".join([*blocks, f"{asked} {BBH_CUE}" if thought else asked])

        return Task(
            f"bbh/{name}",
            "bbh",
            load,
            _QUESTION,
            metric="exact_match",
            splits=("train", "test") if shots else ("test",),
            origin=lambda: files_digest(self.root / file for file in parts.values()) + prompt,
            held_out=True,
            published_prompt=ask,
        )

    # the rest
    def dolly(self) -> Task | None:
        """Open-ended requests with written responses."""

        def make(row: dict, number: int) -> Example:
            request = "\n".join(filter(None, (row["instruction"], row["context"])))
            return Example(
                id=f"dolly:{number}",
                fields={"instruction": request, "question": row["instruction"]},
                answer=row["response"],
                domain=row.get("category") or "",
            )

        schema = dict.fromkeys(("instruction", "context", "response", "category?"), str)
        files = {split: self.root / f"dolly/{split}.jsonl.gz" for split in ("train", "valid")}
        kinds = {"inverted": _INVERTED, "metric": "rouge_l"}
        return self.task(
            "dolly", "dialog", files, lambda path: self.read(path, schema, make), _DIALOG, **kinds
        )

    def arithmetic(self, name: str, *, held_out: bool = False) -> Task | None:
        """gsm8k (with solutions as rationales) or svamp."""

        def make(row: dict, number: int) -> Example:
            return Example(
                id=str(row.get("id", number)),
                fields={"question": row["question"]},
                answer=str(row["answer"]),
                rationale=_solution(row.get("solution") or ""),
            )

        schema = {"question": str, "answer": (str, int, float), "solution?": str}
        files = {split: self.root / f"{name}/{split}.jsonl.gz" for split in ("train", "test")}
        kinds = {"metric": "exact_match", "held_out": held_out}
        return self.task(
            name,
            "arithmetic",
            files,
            lambda path: self.read(path, schema, make),
            _QUESTION,
            **kinds,
        )

    def strategyqa(self) -> Task | None:
        """Yes-no questions that need several facts; the facts are the rationale."""

        def make(row: dict, number: int) -> Example:
            return Example(
                id=str(row.get("id", number)),
                fields={"question": row["question"]},
                answer=row["answer"],
                options=("no", "yes"),
                rationale=" ".join(row.get("facts") or ()),
            )

        schema = {"question": str, "answer": str, "facts?": [str]}
        files = {split: self.root / f"strategyqa/{split}.jsonl.gz" for split in ("train", "test")}
        return self.task(
            "strategyqa",
            "multi-hop",
            files,
            lambda path: self.read(path, schema, make),
            _QUESTION,
        )


@functools.lru_cache(maxsize=4)
def _by_subject(mirror: Mirror, file: str) -> dict[str, list[Example]]:
    groups: dict[str, list[Example]] = {}
    for example in mirror._choice_examples(file):
        groups.setdefault(example.domain, []).append(example)
    return groups


def _solution(text: str) -> str:
    """GSM8K's solution without calculator marks and final answer line."""
    text = re.sub(r"<<[^>]*>>", "", text).split("####")[0]
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _bbh_shot(identity: str, text: str) -> Example:
    """A solved question of a published prompt; the rationale keeps its white space."""
    question, _, rationale = text.partition(f"\nA: {BBH_CUE}")
    answer = rationale.strip().rpartition("So the answer is ")[2].removesuffix(".")
    return Example(identity, {"question": question}, answer, rationale=rationale)


def _bbh_example(identity: str, row: dict, labels: tuple[str, ...]) -> Example:
    """The options are those that the question lists, as they are to be said, else the few labels
    of the task."""
    question, answer = row["input"], row["target"]
    listed = question.partition("\nOptions:\n")[2]
    pairs = re.findall(r"^(?:(\([A-Z]\))|-) ?(.+)$", listed, flags=re.M)
    options = tuple(letter or text.strip() for letter, text in pairs) or labels
    fits = answer in options and len(set(options)) == len(options)
    return Example(identity, {"question": question}, answer, options=options if fits else ())
