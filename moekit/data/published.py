"""Benchmarks with published prompts, word for word: BIG-Bench Hard (Suzgun 2022) and the
chain-of-thought prompts of MMLU (Chung 2022)."""

import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moekit.data.datasets import Access, dataset, dataset_task
from moekit.data.files import MAX_FILE, OnError, files_digest, read_rows
from moekit.data.niv2 import MAX_LABELS
from moekit.data.paths import require_file
from moekit.data.tasks import LETTERS, Example, Task, templates

CUE = "Let's think step by step."
_QUESTION = "\n\nQ: "


@dataclass(frozen=True, eq=False)
class PublishedPrompt:
    """A description and solved questions; called with an example, exemplars and whether to reason
    first, it gives the input text."""

    description: str
    shots: tuple[Example, ...]

    @classmethod
    def parse(cls, name: str, text: str) -> "PublishedPrompt":
        """A published text: the description, then questions with reasoning and answers."""
        description, *blocks = text.strip().split(_QUESTION)
        shots = [_solved(f"{name}/shot/{index}", block) for index, block in enumerate(blocks)]
        return cls(description, tuple(shots))

    def __call__(self, example: Example, shots: Sequence[Example], chain_of_thought: bool) -> str:
        blocks = [self.description] if self.description else []
        for shot in shots:
            reasons = chain_of_thought and shot.rationale
            answer = CUE + shot.rationale if reasons else shot.answer
            blocks.append(f"Q: {shot.fields['question']}\nA: {answer}")
        question = f"Q: {example.fields['question']}\nA:"
        blocks.append(f"{question} {CUE}" if chain_of_thought else question)
        return "\n\n".join(blocks)


def _solved(identity: str, text: str) -> Example:
    """A solved question of a published prompt; the rationale keeps its white space."""
    question, _, rationale = text.partition(f"\nA: {CUE}")
    answer = rationale.strip().rpartition("he answer is ")[2].removesuffix(".")
    return Example(identity, {"question": question}, answer, rationale=rationale)


def _prompt_table(path: Path, column: str, on_error: OnError) -> dict[str, str]:
    """Published prompts by the name in a column."""
    if not os.path.lexists(path):
        return {}
    rows = read_rows(path, {column: str, "prompt": str}, on_error=on_error)
    return {row[column]: row["prompt"] for row in rows}


# BIG-Bench Hard
def bbh_tasks(root: Path, on_error: OnError = "stop") -> list[Task]:
    """Its 23 tasks, never trained on: two of them come in three sizes, a file each. The "train"
    split holds the published exemplars."""
    prompts = _bbh_prompts(root, on_error)
    sizes: dict[str, dict[str, Path]] = {}
    for path in sorted((root / "bbh").glob("*")):
        if path.name.endswith((".jsonl.gz", ".json")):
            name = path.name.split(".")[0]
            task = re.sub(r"_(three|five|seven)_objects$", "", name)
            sizes.setdefault(task, {})[name] = path
    tasks = []
    for name, files in sizes.items():
        text = prompts.get(next(iter(files)), "")
        tasks.append(_bbh_task(name, files, text, on_error))
    return tasks


def _bbh_prompts(root: Path, on_error: OnError) -> dict[str, str]:
    """Chain-of-thought prompts by file name, from a table or the original text files."""
    found = _prompt_table(root / "bbh/prompts/cot_prompts.jsonl.gz", "task", on_error)
    if found:
        return found
    for folder in (root / "bbh/cot-prompts", root / "cot-prompts"):
        for path in sorted(folder.glob("*.txt")):
            require_file(path, MAX_FILE)
            found[path.stem] = path.read_text("utf-8").partition("-----\n")[2]
    return found


def _bbh_task(name: str, files: Mapping[str, Path], text: str, on_error: OnError) -> Task:
    prompt = PublishedPrompt.parse(name, text)

    def load(split: str) -> list[Example]:
        if split == "train":
            return list(prompt.shots)
        examples = []
        for part, path in files.items():
            examples += _bbh_examples(part, path, on_error)
        return examples

    return Task(
        f"bbh/{name}",
        "bbh",
        load,
        templates("question"),
        metric="exact_match",
        splits=("train", "test") if prompt.shots else ("test",),
        origin=lambda: files_digest(files.values()) + text,
        held_out=True,
        published_prompt=prompt,
    )


def _bbh_examples(name: str, path: Path, on_error: OnError) -> list[Example]:
    rows = read_rows(path, {"input": str, "target": str}, on_error=on_error)
    labels = tuple(sorted({row["target"] for row in rows}))
    if not 1 < len(labels) <= MAX_LABELS:
        labels = ()
    examples = []
    for index, row in enumerate(rows):
        options = _listed_options(row["input"]) or labels
        usable = row["target"] in options and len(set(options)) == len(options)
        fields = {"question": row["input"]}
        options = options if usable else ()
        examples.append(Example(f"{name}/{index}", fields, row["target"], options=options))
    return examples


def _listed_options(question: str) -> tuple[str, ...]:
    """The options that a question lists: their letters, else their texts."""
    listed = question.partition("\nOptions:\n")[2]
    pairs = re.findall(r"^(?:(\([A-Z]\))|-) ?(.+)$", listed, flags=re.M)
    return tuple(letter or text.strip() for letter, text in pairs)


# MMLU
def mmlu_tasks(access: Access) -> list[Task]:
    """One task a subject. With the published prompts (mmlu/cot_prompts.jsonl.gz) the exemplars
    are theirs, else the five development rows."""
    whole = dataset_task(dataset("mmlu"), access)
    if whole is None:
        return []
    prompts: dict[str, str] = {}
    if access.root:
        path = access.root / "mmlu/cot_prompts.jsonl.gz"
        prompts = _prompt_table(path, "subject", access.on_error)
    subjects = sorted(_by_subject(whole, "test"))
    return [_subject_task(whole, subject, prompts.get(subject, "")) for subject in subjects]


@functools.lru_cache(maxsize=8)
def _by_subject(whole: Task, split: str) -> dict[str, list[Example]]:
    groups: dict[str, list[Example]] = {}
    for example in whole.examples(split):
        groups.setdefault(example.domain, []).append(example)
    return groups


def _subject_task(whole: Task, subject: str, text: str) -> Task:
    prompt = PublishedPrompt.parse(subject, text) if text else None

    def load(split: str) -> list[Example]:
        if prompt and split == "train":
            return list(prompt.shots)
        examples = _by_subject(whole, split).get(subject, [])
        return [_lettered(example) for example in examples] if prompt else examples

    return replace(
        whole,
        name=f"mmlu/{subject}",
        load=load,
        splits=tuple(dict.fromkeys(("train", *whole.splits))) if prompt else whole.splits,
        origin=lambda: whole.origin() + text,
        published_prompt=prompt,
    )


def _lettered(example: Example) -> Example:
    """A question with its options in one line, as in the published prompts; a letter answers."""
    letters = tuple(f"({letter})" for letter in LETTERS[: len(example.options)])
    pairs = zip(letters, example.options, strict=True)
    shown = " ".join(f"{letter} {option}" for letter, option in pairs)
    answer = letters[example.options.index(example.answer)]
    fields = {"question": f"{example.fields['question']}\n{shown}"}
    return replace(example, fields=fields, answer=answer, references=(), options=letters)
