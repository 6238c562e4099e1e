"""The layout of the data folder: its files as tasks.

Two layouts are read: the mirror's own (gzipped JSON lines, one schema a family) and the original
files of the sources (Super-NaturalInstructions task JSON with split lists, FLAN's chain-of-thought
TSV, BIG-Bench Hard JSON, MMLU CSV).
"""

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from moekit.data.sources import BadRow, data_dir, read_json, read_rows
from moekit.data.tasks import LETTERS, Example, Task, templates
from moekit.errors import unknown

BBH_CUE = "Let's think step by step."
MAX_LABELS = 8  # a task with at most so many distinct answers is a classification

_NIV2, _QUESTION, _READING, _DIALOG = map(templates, ("niv2", "question", "reading", "dialog"))
_INVERTED = templates("question", target="{question}")


@functools.lru_cache(maxsize=4)
def _manifest(root: Path) -> dict[str, int]:
    """Rows of each file, where the folder has a manifest."""
    path = root / "manifest.json"
    entries = read_json(path) if path.is_file() else []
    return {entry["path"]: entry["rows"] for entry in entries if entry.get("rows")}


class Mirror:
    """The tasks of a data folder, in either layout; nothing is read before it is asked for.

    Args:
      on_error: "stop" or "skip" malformed rows.
    """

    def __init__(self, folder: str | Path | None = None, on_error: str = "stop"):
        self.root, self.on_error = data_dir(folder), on_error
        if on_error not in ("stop", "skip"):
            raise unknown("on_error", on_error, ("stop", "skip"))

    def _rows(self, name: str, schema: dict, columns=()) -> list[dict]:
        return read_rows(self.root / name, schema, columns=columns, on_error=self.on_error)

    def _task(self, name, cluster, files: dict[str, str], build: Callable, templates, **kwargs):
        """A task over {split: file}; build(file) gives its examples."""
        files = {split: f for split, f in files.items() if (self.root / f).exists()}
        if not files:
            return None

        def load(split: str) -> Sequence[Example]:
            if split not in files:
                raise ValueError(f"task {name} has no split {split!r}; it has {sorted(files)}")
            return build(files[split])

        size = _manifest(self.root).get(files.get("train", ""))
        return Task(name, cluster, load, templates, size=size, **kwargs)

    # Super-NaturalInstructions
    def niv2(self, split: str) -> list[Task]:
        """Tasks of the official split "train" or "test" (other categories, held out)."""
        if (self.root / "niv2/splits/default").is_dir():
            return self._niv2_raw(split)
        meta = self._rows("niv2/tasks.jsonl.gz", {"task": str, "split": str, "definition": str})
        tasks = []
        for row in sorted((r for r in meta if r["split"] == split), key=lambda r: r["task"]):
            name, definition = row["task"], row["definition"]
            folders = ("train", "valid") if split == "train" else ("test",)
            files = {f: f"niv2/{f}/{name}.jsonl.gz" for f in folders}
            tasks.append(self._niv2_task(name, definition, row, files, split == "test"))
        return [task for task in tasks if task]

    def _niv2_task(self, name, definition, meta, files, held_out) -> Task | None:
        labels_file = files["test" if held_out else "train"]
        schema = {"input": str, "output": list}

        @functools.cache
        def labels() -> tuple[str, ...]:
            rows = self._rows(labels_file, schema)
            found = {row["output"][0].strip() for row in rows if row["output"]}
            return tuple(sorted(found)) if len(found) <= MAX_LABELS else ()

        def build(file: str) -> list[Example]:
            examples = []
            for i, row in enumerate(self._rows(file, schema)):
                answers = [a.strip() for a in row["output"] if isinstance(a, str) and a.strip()]
                if not answers:
                    raise ValueError(f"{self.root / file}: row {i + 1} has no output text")
                fits = answers[0] in labels()
                examples.append(
                    Example(
                        id=str(row.get("id", i)),
                        fields={"definition": definition, "input": row["input"]},
                        answer=answers[0],
                        references=tuple(answers),
                        options=labels() if fits and len(labels()) > 1 else (),
                        domain=(meta.get("domains") or meta.get("categories") or [""])[0],
                    )
                )
            return examples

        cluster = (meta.get("categories") or ["niv2"])[0]
        return self._task(
            f"niv2/{name}", cluster, files, build, _NIV2, metric="rouge_l", held_out=held_out
        )

    def _niv2_raw(self, split: str) -> list[Task]:
        listed = (self.root / f"niv2/splits/default/{split}_tasks.txt").read_text().split()
        tasks = []
        for name in listed:
            path = self.root / f"niv2/tasks/{name}.json"
            if path.is_file():
                tasks.append(self._niv2_raw_task(name, path, split == "test"))
        return tasks

    def _niv2_raw_task(self, name: str, path: Path, held_out: bool) -> Task:
        def load(split: str) -> list[Example]:
            content = read_json(path)
            examples = []
            for i, row in enumerate(content["Instances"], 1):
                if not row.get("output") or "input" not in row:
                    raise ValueError(f"{path}: instance {i} lacks input or output")
                fields = {"definition": " ".join(content["Definition"]), "input": row["input"]}
                answers = tuple(row["output"])
                examples.append(Example(row.get("id", str(i)), fields, answers[0], answers))
            cut = max(1, len(examples) // 10)
            parts = {"train": examples[2 * cut :], "valid": examples[:cut]}
            return examples if held_out else parts.get(split, examples[cut : 2 * cut])

        content = read_json(path)
        missing = {"Definition", "Instances"} - content.keys()
        if missing:
            raise ValueError(f"{path}: no {' and '.join(sorted(missing))}")
        cluster = content.get("Categories", ["niv2"])[0]
        return Task(f"niv2/{name}", cluster, load, _NIV2, metric="rouge_l", held_out=held_out)

    # chain of thought
    def cot(self) -> list[Task]:
        """Questions with rationales; only the training split exists."""
        tasks = []
        for path in sorted((self.root / "cot").glob("*")):
            if path.name.endswith((".jsonl.gz", ".tsv")):
                name = path.name.split(".")[0].removesuffix("_train")
                file = f"cot/{path.name}"
                tasks.append(
                    self._task(
                        f"cot/{name}",
                        "chain of thought",
                        {"train": file},
                        self._cot_examples,
                        _QUESTION,
                        inverted=_INVERTED,
                        metric="exact_match",
                    )
                )
        return tasks

    def _cot_examples(self, file: str) -> list[Example]:
        names = ("question", "answer", "rationale")
        columns = names if file.endswith(".tsv") else ()
        return [
            Example(
                id=f"{file}:{i}",
                fields={"question": row["question"]},
                answer=row["answer"],
                rationale=row["rationale"].strip().rstrip(".") + ".",
            )
            for i, row in enumerate(self._rows(file, dict.fromkeys(names, str), columns))
        ]

    # questions with choices
    def choices(self, name: str, folder: str, cluster: str, *, held_out=False) -> Task | None:
        """A multiple-choice set {question, choices, answer index, perhaps context}."""
        test = f"{folder}/test.jsonl.gz"
        train = next(
            (
                f
                for f in ("train", "dev", "valid")
                if (self.root / folder / f"{f}.jsonl.gz").exists()
            ),
            "train",
        )
        files = {"train": f"{folder}/{train}.jsonl.gz", "valid": test, "test": test}

        def build(file: str) -> list[Example]:
            schema = {"question": str, "choices": list, "answer": int}
            return [
                self._choice_example(file, i, row)
                for i, row in enumerate(self._rows(file, schema), 1)
            ]

        templates = _READING if name == "boolq" else _QUESTION
        return self._task(name, cluster, files, build, templates, held_out=held_out)

    def _choice_example(self, file: str, number: int, row: dict, domain: str = "") -> Example:
        choices, answer = [str(c).strip() for c in row["choices"]], row["answer"]
        if not 0 <= answer < len(choices):
            raise ValueError(
                f"{self.root / file}:{number}: answer {answer} is not one of {len(choices)} choices"
            )
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
        if (self.root / "mmlu/dev").is_dir():
            return self._mmlu_raw()
        schema = {"subject": str, "question": str, "choices": list, "answer": int}

        @functools.cache
        def by_subject(file: str) -> dict[str, list[Example]]:
            groups: dict[str, list[Example]] = {}
            for i, row in enumerate(self._rows(file, schema), 1):
                groups.setdefault(row["subject"], []).append(self._choice_example(file, i, row))
            return groups

        dev, test = "mmlu/dev.jsonl.gz", "mmlu/test.jsonl.gz"
        return [
            self._task(
                f"mmlu/{subject}",
                "mmlu",
                {"train": dev, "test": test},
                lambda file, subject=subject: by_subject(file)[subject],
                _QUESTION,
                held_out=True,
            )
            for subject in sorted(by_subject(test))
        ]

    def _mmlu_raw(self) -> list[Task]:
        columns = ("question", "a", "b", "c", "d", "answer")

        def build(file: str) -> list[Example]:
            examples = []
            for i, row in enumerate(self._rows(file, dict.fromkeys(columns, str), columns), 1):
                if row["answer"] == "answer":
                    continue  # some copies carry a header
                letter = row["answer"].strip()
                index = LETTERS.find(letter) if letter.isalpha() else int(letter)
                row = {"question": row["question"], "choices": [row[c] for c in "abcd"]}
                examples.append(self._choice_example(file, i, row | {"answer": index}))
            return examples

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

    def _bbh_rows(self, file: str) -> list[dict]:
        if not file.endswith(".json"):
            return self._rows(file, {"input": str, "target": str})
        rows = read_json(self.root / file)["examples"]
        for i, row in enumerate(rows, 1):
            if "input" not in row or "target" not in row:
                raise BadRow(f"{self.root / file}: example {i} lacks input or target")
        return rows

    def _bbh_task(self, name: str, parts: dict[str, str], prompt: str) -> Task:
        description, *shots = re.split(r"\n\nQ: ", prompt.strip())

        def load(split: str) -> list[Example]:
            if split == "train":
                return [_bbh_shot(f"{name}/shot/{i}", shot) for i, shot in enumerate(shots)]
            examples = []
            for part, file in parts.items():
                rows = self._bbh_rows(file)
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

        kind = {"metric": "exact_match", "held_out": True, "ask": ask}
        return Task(f"bbh/{name}", "bbh", load, _QUESTION, **kind)

    # the rest
    def dolly(self) -> Task | None:
        """Open-ended requests with written responses."""

        def build(file: str) -> list[Example]:
            schema = {"instruction": str, "context": str, "response": str}
            return [
                Example(
                    id=f"{file}:{i}",
                    fields={
                        "instruction": "\n".join(filter(None, (r["instruction"], r["context"]))),
                        "question": r["instruction"],
                    },
                    answer=r["response"],
                    domain=r.get("category", ""),
                )
                for i, r in enumerate(self._rows(file, schema), 1)
                if r["response"].strip()
            ]

        files = {split: f"dolly/{split}.jsonl.gz" for split in ("train", "valid")}
        return self._task(
            "dolly", "dialog", files, build, _DIALOG, inverted=_INVERTED, metric="rouge_l"
        )

    def arithmetic(self, name: str, *, held_out: bool = False) -> Task | None:
        """gsm8k (with solutions as rationales) or svamp."""

        def build(file: str) -> list[Example]:
            rows = self._rows(file, {"question": str, "answer": (str, int, float)})
            return [
                Example(
                    id=str(row.get("id", i)),
                    fields={"question": row["question"]},
                    answer=str(row["answer"]),
                    rationale=_solution(row.get("solution", "")),
                )
                for i, row in enumerate(rows, 1)
            ]

        files = {split: f"{name}/{split}.jsonl.gz" for split in ("train", "test")}
        files["valid"] = files["test"]
        return self._task(
            name, "arithmetic", files, build, _QUESTION, metric="exact_match", held_out=held_out
        )

    def strategyqa(self) -> Task | None:
        """Yes-no questions that need several facts; the facts are the rationale."""

        def build(file: str) -> list[Example]:
            return [
                Example(
                    id=str(row.get("id", i)),
                    fields={"question": row["question"]},
                    answer=row["answer"],
                    options=("no", "yes"),
                    rationale=" ".join(row.get("facts") or ()),
                )
                for i, row in enumerate(self._rows(file, {"question": str, "answer": str}), 1)
            ]

        files = {split: f"strategyqa/{split}.jsonl.gz" for split in ("train", "test")}
        files["valid"] = files["test"]
        return self._task("strategyqa", "multi-hop", files, build, _QUESTION)


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
