"""moekit data list | describe | fetch | check."""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from moekit.commands.flags import names, require_at_least, require_seed
from moekit.commands.output import AsJson, print_result


class Available(NamedTuple):
    """A line of `moekit data list`: what exists, whether it is here, what it has or lacks."""

    kind: str
    name: str
    here: bool
    about: str


def list_data(json: AsJson = False) -> int:
    """List mixtures, suites, corpora and hub sources, and which of them are here."""
    root = _data_folder()
    rows = list(_available(root))
    lines = [f"data folder: {root or 'none (set MOEKIT_DATA)'}"]
    for row in rows:
        here = "here" if row.here else "-"
        lines.append(f"{row.kind:11} {row.name:24} {here:5} {row.about[:70]}")
    print_result([row._asdict() for row in rows], "\n".join(lines), json)
    return 0


def _available(root: Path | None) -> Iterator[Available]:
    from moekit.data.collection import MIXTURES
    from moekit.data.hub import copies, sources
    from moekit.data.sources import TEXT_DOMAINS
    from moekit.data.suites import SUITES, suite

    yield Available("mixture", "builtin", True, "")
    tasks_by_group = _tasks_by_group()
    for name, parts in MIXTURES.items():
        sizes = {}
        for part, submixture in parts.items():
            sizes[part] = sum(tasks_by_group.get(group, 0) for group in submixture.groups)
        about = ", ".join(f"{part} {size} tasks" for part, size in sizes.items())
        yield Available("mixture", name, any(sizes.values()), about)
    for name in SUITES:
        try:
            yield Available("suite", name, True, f"{len(suite(name).tasks)} tasks")
        except (OSError, ValueError) as problem:
            yield Available("suite", name, False, str(problem))
    for part in ("builtin", *TEXT_DOMAINS):
        here = part == "builtin" or bool(root and (root / "text" / part).is_dir())
        yield Available("corpus", part, here, "")
    for name, source in sources().items():
        split = next(iter(source.splits))
        here = bool(copies(source, split, root))
        about = f"{source.path}, {source.group or 'evaluation'}"
        yield Available("hub source", name, here, about)


def _data_folder() -> Path | None:
    from moekit.data.sources import data_dir

    try:
        return data_dir()
    except FileNotFoundError:
        return None


def _tasks_by_group() -> dict[str, int]:
    """Number of tasks of each group in the data folder."""
    from moekit.data.flan import tasks_of

    try:
        groups = tasks_of("mirror", None)
    except FileNotFoundError:
        return {}
    return {group: len(tasks) for group, tasks in groups.items()}


def describe(
    *,
    mixture: str = "builtin",
    source: str = "mirror",
    corpus: str = "",
    task: str = "",
    by: str = "cluster",
    hold_out: str = "",
    tokenizer: str = "",
    tokens: int = 0,
    limit: int = 0,
    samples: int = 3,
    seed: int = 0,
    plot: Path | None = None,
    on_error: str = "stop",
    json: AsJson = False,
) -> int:
    """Show what training on a mixture, a task or a corpus will see, with samples.

    Args:
      mixture: builtin, flan2022, flan-t5 or flan-ablation.
      source: Source of the mixture: mirror (the data folder), hub (ready-made) or hub-raw (raw
        sets of the hub with our templates).
      corpus: Describe text for pretraining instead: builtin, mirror, or parts such as
        books,speeches.
      task: Describe this task alone.
      by: Rows of the table: cluster or task.
      hold_out: Leave out tasks that overlap with these suites, such as mmlu,bbh.
      tokenizer: Path of a SentencePiece model that counts tokens; by default bytes are counted.
      tokens: Training length in tokens (steps x batch_tokens), for the repeats column; by default
        one epoch.
      limit: Stream this many rows of each hub set instead of downloading all; 0 is all.
      samples: Number of sample prompts to show.
      seed: Seed of the samples.
      plot: Write a picture of the mixture to this file.
      on_error: What to do with malformed rows: stop or skip.
    """
    import moekit as mk
    from moekit.data.packing import propose_lengths
    from moekit.errors import unknown

    if by not in ("cluster", "task"):
        raise unknown("way to list", by, ("cluster", "task"))
    require_at_least(0, tokens=tokens, limit=limit, samples=samples)
    require_seed(seed)
    if corpus:
        rows = _corpus_sizes(corpus)
        print_result(rows, _corpus_text(rows), json)
        return 0
    mix = mk.flan_mixture(
        {task: 1.0} if task else mixture,
        source=source,
        hold_out=names(hold_out),
        limit=limit,
        on_error=on_error,
    )
    counter = mk.load_tokenizer(tokenizer) if tokenizer else mk.ByteTokenizer()
    overview = mix.describe(counter, tokens)
    if plot:
        overview.plot().savefig(plot)
    lengths = propose_lengths(mix, counter)
    prompts = mix.sample(samples, seed=seed)
    shown = [f"--- {each.task}\n{each.input}\n>>> {each.target}" for each in prompts]
    result = overview.to_dict()
    result["rates"] = mix.rates
    result["lengths"] = asdict(lengths)
    result["samples"] = [
        {"task": each.task, "input": each.input, "target": each.target} for each in prompts
    ]
    print_result(result, "\n".join([overview.table(by), str(lengths), *shown]), json)
    return 0


def _corpus_sizes(name: str) -> list[dict[str, Any]]:
    """Documents and characters of each domain and split of a corpus."""
    import moekit as mk

    rows: dict[tuple[str, str], dict[str, Any]] = {}
    corpus = mk.corpus(name)
    for split in ("train", "valid"):
        for document in corpus.documents(split):
            new = {"domain": document.domain, "split": split, "documents": 0, "characters": 0}
            row = rows.setdefault((document.domain, split), new)
            row["documents"] += 1
            row["characters"] += len(document.text)
    return [rows[key] for key in sorted(rows)]


def _corpus_text(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        lines.append(
            f"{row['domain']:20} {row['split']:6} {row['documents']:7,} documents "
            f"{row['characters']:12,} characters"
        )
    return "\n".join(lines)


def fetch(
    sources: Annotated[tuple[str, ...], tyro.conf.Positional],
    *,
    to: Path | None = None,
    origin: str = "",
    yes: bool = False,
    json: AsJson = False,
) -> int:
    """Download hub sources into the data folder; their sizes are shown first.

    Args:
      sources: Names of hub sources, as `moekit data list` shows them, such as cot gsm8k.
      to: The data folder, which is created if missing; by default MOEKIT_DATA.
      origin: Folder or file:// address that holds <repository>/<files>, used instead of the hub.
      yes: Download without a question.
    """
    from moekit.data.fetch import as_text, fetch as download, plan
    from moekit.data.sources import data_dir

    if not sources:
        raise ValueError("name the sources to fetch, as `moekit data list` names them")
    items = plan(sources, origin)
    print(as_text(items), file=sys.stderr)
    if to:
        to.mkdir(parents=True, exist_ok=True)
    root = data_dir(to)
    if not (yes or _confirmed()):
        raise ValueError("nothing was fetched: answer y, or use --yes")
    entries = download(items, root, origin)
    text = f"{len(entries)} files are in {root / 'hub'}; `moekit data check` checks them"
    print_result(entries, text, json)
    return 0


def _confirmed() -> bool:
    """Whether the user agrees; a program that cannot be asked does not."""
    if not sys.stdin.isatty():
        return False
    return input("fetch? [y/N] ").strip().lower().startswith("y")


def check(
    folder: Annotated[Path | None, tyro.conf.Positional] = None, *, json: AsJson = False
) -> int:
    """Check a data folder: every file against its manifest, every row against its schema.

    The exit code is 1 where faults were found.

    Args:
      folder: The data folder; by default MOEKIT_DATA.
    """
    from moekit.data.check import check as check_folder

    report = check_folder(folder)
    print_result(asdict(report), str(report), json)
    return 1 if report.faults else 0


COMMAND = {"list": list_data, "describe": describe, "fetch": fetch, "check": check}
