"""Real English text that every installation carries: the language reference of `pydoc_data` and the
docstrings of the standard library and of installed packages, read with `ast` and never imported.

Objects (a topic, a function, a class, a module) fall into "train", "valid" or "test" by the hash of
their text, here once for corpus and tasks alike: nothing that is tested is ever trained on.
"""

import ast
import hashlib
import importlib.util
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

PACKAGES = ("jax", "numpy", "flax", "optax", "orbax", "matplotlib", "grain")
REFERENCE = "language reference"
CAP = 900_000  # characters of each domain
SKIP = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "testing"}


@dataclass(frozen=True)
class Entry:
    """A documented object."""

    kind: str  # "topic", "module", "function" or "class"
    name: str
    module: str
    text: str
    domain: str

    @property
    def split(self) -> str:
        return split_of(self.text)

    @property
    def summary(self) -> str:
        """The first sentence."""
        first = " ".join(self.text.split("\n\n")[0].split())
        return re.split(r"(?<=[.!?])\s", first)[0]


def split_of(key: str) -> str:
    """ "train" (80 %), "valid" or "test" (10 % each), by the hash of a key."""
    bucket = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 10
    return {0: "test", 1: "valid"}.get(bucket, "train")


def _topics() -> Iterator[Entry]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        title, _, rest = text.strip().partition("\n")
        body = rest.lstrip("*=-~^\n ")
        if body:
            yield Entry("topic", title.strip(), name, body, REFERENCE)


def _roots() -> Iterator[tuple[str, Path]]:
    """Domain and folder of each package, found without importing it."""
    yield "python", Path(sysconfig.get_path("stdlib"))
    for package in PACKAGES:
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            spec = None
        if spec and spec.submodule_search_locations:
            yield package, Path(next(iter(spec.submodule_search_locations)))


def _documented(tree: ast.Module, module: str, domain: str) -> Iterator[Entry]:
    kinds = {ast.FunctionDef: "function", ast.ClassDef: "class", ast.Module: "module"}
    for node in ast.walk(tree):
        kind = kinds.get(type(node))
        if kind and (text := ast.get_docstring(node)) and text.isascii():
            name = module.rpartition(".")[2] if kind == "module" else node.name
            if not name.startswith("_"):
                yield Entry(kind, name, module, text, domain)


def _package(domain: str, root: Path) -> Iterator[Entry]:
    total = 0
    files = (p for p in root.rglob("*.py") if not SKIP & set(p.relative_to(root).parts))
    # by hash of the path: a cap then takes a fair share of all subpackages
    for path in sorted(files, key=lambda p: split_key(str(p.relative_to(root)))):
        relative = path.relative_to(root).with_suffix("")
        parts = [p for p in relative.parts if p != "__init__"]
        module = ".".join(parts if domain == "python" else [domain, *parts]) or domain
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # other people's invalid escapes
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        for entry in _documented(tree, module, domain):
            total += len(entry.text)
            yield entry
        if total > CAP:
            return


def split_key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(maxsize=1)
def entries() -> tuple[Entry, ...]:
    """All documented objects; of equal texts only the first."""
    seen, found = set(), []
    sources = [_topics(), *(_package(domain, root) for domain, root in _roots())]
    for source in sources:
        for entry in source:
            key = " ".join(entry.text.split())
            if key not in seen:
                seen.add(key)
                found.append(entry)
    return tuple(found)
