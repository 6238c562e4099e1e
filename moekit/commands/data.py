"""moekit data list | describe | fetch | check."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import tyro

from moekit.commands.flags import names, require_at_least, require_seed
from moekit.commands.output import AsJson, print_result


def list_data(json: AsJson = False) -> int:
    """List mixtures, suites, corpora and hub sources, and which of them are here."""
    from moekit.data.catalogue import catalogue

    root = _data_folder()
    rows = catalogue(root)
    lines = [f"data folder: {root or 'none (set MOEKIT_DATA)'}"]
    for row in rows:
        here = "here" if row.here else "-"
        lines.append(f"{row.kind:11} {row.name:24} {here:5} {row.about[:70]}")
    print_result([row._asdict() for row in rows], "\n".join(lines), json)
    return 0


def _data_folder() -> Path | None:
    from moekit.data.files import data_dir

    try:
        return data_dir()
    except FileNotFoundError:
        return None


def describe(
    *,
    mixture: str = "builtin",
    source: str = "local",
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
      source: Source of the mixture: local (the data folder), hub (ready-made) or hub-raw (raw
        sets of the hub with our templates).
      corpus: Describe text for pretraining instead: builtin, local, or parts such as
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
    from moekit.data.datasets import licences
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
    restricted = licences(mix.tasks)
    notes = [f"licence of {name}: {licence}" for name, licence in restricted.items()]
    result = overview.to_dict()
    result["rates"] = mix.rates
    result["lengths"] = asdict(lengths)
    result["licences"] = restricted
    result["samples"] = [
        {"task": each.task, "input": each.input, "target": each.target} for each in prompts
    ]
    print_result(result, "\n".join([overview.table(by), *notes, str(lengths), *shown]), json)
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
    from moekit.data.files import data_dir

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
    """Whether the user agrees; without a terminal the answer is no."""
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
