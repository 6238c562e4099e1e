"""Real English text of every installation: the language reference of `pydoc_data` and the
docstrings of the standard library and of installed packages, read with `ast` and never imported.

Objects (a topic, a function, a class, a module) fall into "train", "valid" or "test" by the hash of
their text, for the corpus and for tasks alike: nothing that is tested is ever trained on.
"""

import ast
import hashlib
import importlib.util
import os
import re
import sys
import sysconfig
import warnings
import zoneinfo
from collections import deque
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

from moekit.data import tasks
from moekit.data.cache import cached_json

PACKAGES = ("jax", "numpy", "flax", "optax", "orbax", "matplotlib", "grain")
REFERENCE = "language reference"
MAX_CHARACTERS = 900_000  # of each domain
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "testing",
    "idlelib",
    "lib2to3",
    "site-packages",
    "turtledemo",
}
KINDS = {ast.FunctionDef: "function", ast.ClassDef: "class", ast.Module: "module"}


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
        first_paragraph = " ".join(self.text.split("\n\n")[0].split())
        return re.split(r"(?<=[.!?])\s", first_paragraph)[0]


def split_of(key: str) -> str:
    """ "train" (80 %), "valid" or "test" (10 % each), by the hash of a key."""
    bucket = int(_digest(key)[:8], 16) % 10
    if bucket == 0:
        return "test"
    if bucket == 1:
        return "valid"
    return "train"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(maxsize=1)
def entries() -> tuple[Entry, ...]:
    """All documented objects; of equal texts only the first. Parsed once for each installation."""
    rows = cached_json(f"builtin-{sources_digest()}/documentation", _parse_all)
    return tuple(Entry(*row) for row in rows)


@lru_cache(maxsize=1)
def sources_digest() -> str:
    """Digest of what determines the embedded text and tasks.

    This is the Python version, the time zones, moekit's own code for them, and path, size and time
    of every source file that could be read.
    """
    code = sorted(Path(__file__).parent.glob("*.py"))
    code.append(Path(tasks.__file__))
    sha = hashlib.sha256(sys.version.encode())
    sha.update(repr(sorted(zoneinfo.available_timezones())).encode())
    for path in code:
        sha.update(path.read_bytes())
    for domain, root in _roots():
        for relative in _python_files(root):
            status = os.stat(os.path.join(root, relative))
            sha.update(repr((domain, relative, status.st_size, status.st_mtime_ns)).encode())
    return sha.hexdigest()[:16]


def _parse_all() -> list[tuple]:
    packages = [_package(domain, root) for domain, root in _roots()]
    seen = set()
    found = []
    for entry in chain(_topics(), *packages):
        words = " ".join(entry.text.split())
        if words not in seen:
            seen.add(words)
            found.append(astuple(entry))
    return found


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
            continue
        if spec and spec.submodule_search_locations:
            yield package, Path(next(iter(spec.submodule_search_locations)))


def _python_files(root: Path) -> list[str]:
    """Relative paths of a package's source files, as strings (thousands of Paths take longer).

    They are sorted by hash, so that a limit takes an even share of all subpackages.
    """
    found = []
    start = len(os.path.join(root, ""))
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        for name in names:
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                found.append(path[start:])
    return sorted(found, key=_digest)


def _package(domain: str, root: Path) -> Iterator[Entry]:
    """Documented objects of a package, up to the end of the file that reaches the limit."""
    characters = 0
    for relative in _python_files(root):
        path = Path(relative)
        parts = [part for part in path.with_suffix("").parts if part != "__init__"]
        if domain != "python":
            parts = [domain, *parts]
        module = ".".join(parts) or domain
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in the packages' own strings
                tree = ast.parse((root / relative).read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        for entry in _documented(tree, module, domain):
            characters += len(entry.text)
            yield entry
        if characters > MAX_CHARACTERS:
            return


def _documented(tree: ast.Module, module: str, domain: str) -> Iterator[Entry]:
    for node in _statements(tree):
        kind = KINDS.get(type(node))
        text = ast.get_docstring(node) if kind else None
        if not text or not text.isascii():
            continue
        name = module.rpartition(".")[2] if kind == "module" else node.name
        if not name.startswith("_"):
            yield Entry(kind, name, module, text, domain)


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes of `ast.walk` without expressions, which contain no definitions."""
    pending: deque[ast.AST] = deque([tree])
    while pending:
        node = pending.popleft()
        yield node
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
                pending.append(child)
