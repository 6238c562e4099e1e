"""moekit data list | describe | fetch | check."""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

DATA_VERBS = ("list", "describe", "fetch", "check")


@dataclass
class List:
    """Mixtures, suites, corpora and hub sources, and which are here."""

    json: bool = False

    def run(self) -> tuple[object, str]:
        root = _folder()
        rows = list(_found(root))
        keys = ("kind", "name", "here", "about")
        lines = [f"{k:11} {n:24} {'here' if here else '-':5} {a[:70]}" for k, n, here, a in rows]
        text = "\n".join([f"data folder: {root or 'none (set MOEKIT_DATA)'}", *lines])
        return [dict(zip(keys, row, strict=True)) for row in rows], text


def _found(root: Path | None) -> Iterator[tuple[str, str, bool, str]]:
    """Kind, name, whether it is here, and what it has or lacks."""
    from moekit.data.collection import MIXTURES
    from moekit.data.hub import copies, sources
    from moekit.data.sources import TEXT_DOMAINS
    from moekit.data.suites import SUITES, suite

    yield "mixture", "builtin", True, ""
    groups = _groups()
    for name, parts in MIXTURES.items():
        sizes = {part: sum(groups.get(g, 0) for g in sub.groups) for part, sub in parts.items()}
        about = ", ".join(f"{part} {n} tasks" for part, n in sizes.items())
        yield "mixture", name, any(sizes.values()), about
    for name in SUITES:
        try:
            yield "suite", name, True, f"{len(suite(name).tasks)} tasks"
        except (OSError, ValueError) as problem:
            yield "suite", name, False, str(problem)
    for part in ("builtin", *TEXT_DOMAINS):
        here = part == "builtin" or bool(root and (root / "text" / part).is_dir())
        yield "corpus", part, here, ""
    for name, each in sources().items():
        here = bool(copies(each, next(iter(each.splits)), root))
        yield "hub source", name, here, f"{each.path}, {each.group or 'evaluation'}"


def _folder() -> Path | None:
    from moekit.data.sources import data_dir

    try:
        return data_dir()
    except FileNotFoundError:
        return None


def _groups() -> dict[str, int]:
    """Tasks of each group in the data folder."""
    from moekit.data.flan import tasks_of

    try:
        return {group: len(tasks) for group, tasks in tasks_of("mirror", None).items()}
    except FileNotFoundError:
        return {}


@dataclass
class Describe:
    """What training on a mixture, a task or a corpus will see, with samples."""

    mixture: str = "builtin"
    """builtin, flan2022, flan-t5 or flan-ablation."""
    source: str = "mirror"
    """Where FLAN's tasks come from: mirror, hub (ready-made) or hub-raw."""
    corpus: str = ""
    """Describe text to pretrain on instead: builtin, mirror, or parts such as books,speeches."""
    task: str = ""
    """This task alone."""
    by: str = "cluster"
    """One line a cluster or a task."""
    hold_out: str = ""
    """Suites that will be asked, such as mmlu,bbh: tasks that overlap are left out."""
    tokenizer: str = ""
    """Path of a SentencePiece model that counts tokens; default bytes."""
    tokens: int = 0
    """Tokens of the run (steps x tokens of a batch) that repeats are told for; default an epoch."""
    limit: int = 0
    """Stream so many rows of each hub set instead of downloading all."""
    samples: int = 3
    seed: int = 0
    plot: Path | None = None
    """Write the picture there."""
    on_error: str = "stop"
    json: bool = False

    def run(self) -> tuple[object, str]:
        import moekit as mk
        from moekit.data.packing import propose_lengths
        from moekit.errors import unknown

        if self.by not in ("cluster", "task"):
            raise unknown("way to list", self.by, ("cluster", "task"))
        if self.corpus:
            return _corpus(mk.corpus(self.corpus))
        mixture = mk.flan_mixture(
            {self.task: 1.0} if self.task else self.mixture,
            source=self.source,
            hold_out=tuple(filter(None, self.hold_out.split(","))),
            limit=self.limit,
            on_error=self.on_error,
        )
        tokenizer = mk.load_tokenizer(self.tokenizer) if self.tokenizer else None
        seen = mixture.describe(tokenizer, self.tokens)
        if self.plot:
            seen.plot().savefig(self.plot)
        prompts = mixture.sample(self.samples, seed=self.seed)
        shown = [f"--- {p.task}\n{p.input}\n>>> {p.target}" for p in prompts]
        samples = [{"task": p.task, "input": p.input, "target": p.target} for p in prompts]
        lengths = propose_lengths(mixture, tokenizer or mk.ByteTokenizer())
        found = seen.to_dict() | {"rates": mixture.rates, "lengths": asdict(lengths)}
        text = "\n".join([seen.table(self.by), str(lengths), *shown])
        return found | {"samples": samples}, text


def _corpus(corpus) -> tuple[object, str]:
    found = {}
    for split in ("train", "valid"):
        for document in corpus.documents(split):
            row = found.setdefault((document.domain, split), [0, 0])
            row[0] += 1
            row[1] += len(document.text)
    rows = [
        {"domain": domain, "split": split, "documents": n, "characters": size}
        for (domain, split), (n, size) in sorted(found.items())
    ]
    lines = [
        f"{r['domain']:20} {r['split']:6} {r['documents']:7,} documents "
        f"{r['characters']:12,} characters"
        for r in rows
    ]
    return rows, "\n".join(lines)


@dataclass
class Fetch:
    """Mirror hub sources into the data folder; sizes are shown first."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional]
    """As `moekit data list` names them, such as cot gsm8k."""
    to: Path | None = None
    """The data folder; default MOEKIT_DATA. It is made if it is not there."""
    origin: str = ""
    """A folder or file:// address with <repository>/<files> in place of the hub."""
    yes: bool = False
    """Fetch without asking."""
    json: bool = False

    def run(self) -> tuple[object, str]:
        from moekit.data.fetch import as_text, fetch, plan
        from moekit.data.sources import data_dir

        if not self.names:
            raise ValueError("name the sources to fetch, as `moekit data list` names them")
        items = plan(self.names, self.origin)
        print(as_text(items), file=sys.stderr)
        if self.to:
            self.to.mkdir(parents=True, exist_ok=True)
        root = data_dir(self.to)
        asked = not self.yes and sys.stdin.isatty() and input("fetch? [y/N] ")
        if not (self.yes or (asked and asked.strip().lower().startswith("y"))):
            raise ValueError("nothing was fetched: answer y, or use --yes")
        entries = fetch(items, root, self.origin)
        return (
            entries,
            f"{len(entries)} files are in {root / 'hub'}; `moekit data check` checks them",
        )


@dataclass
class Check:
    """Check a data folder: every file against its manifest, every row against its schema."""

    folder: Annotated[Path | None, tyro.conf.Positional] = None
    """Default MOEKIT_DATA."""
    json: bool = False

    def run(self) -> tuple[object, str, int]:
        from moekit.data.check import check

        report = check(self.folder)
        return asdict(report), str(report), 1 if report.faults else 0


_Verb = (
    Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Describe, tyro.conf.subcommand("describe")]
    | Annotated[Fetch, tyro.conf.subcommand("fetch")]
    | Annotated[Check, tyro.conf.subcommand("check")]
)


@dataclass
class Data:
    """Data sources: what there is, what training sees, mirroring, checking."""

    verb: Annotated[_Verb, tyro.conf.OmitSubcommandPrefixes, tyro.conf.arg(name="")]

    @property
    def json(self) -> bool:
        return self.verb.json

    def run(self) -> tuple:
        return self.verb.run()
