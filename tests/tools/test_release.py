"""No file names an address that is not ours, and a release writes ours into all of them."""

import re
import runpy
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import jupytext
import pytest

ROOT = Path(__file__).parents[2]
RELEASE = runpy.run_path(str(ROOT / "tools/release.py"))
PARTS = ("moekit", "notebooks", "tests", "tools", "assets", ".ci")
TEXT_ENDINGS = {".py", ".pyi", ".ipynb", ".md", ".toml", ".yml", ".cff", ".json", ""}
ADDRESS = re.compile(
    r"""(?:https?|ssh|git|git\+\w+)://[^\s"'`<>(){}\[\]\\]*|git@[\w.-]+:[\w./-]+"""
)
# public documents and projects that the texts refer to
ALLOWED = (
    "http://www.apache.org/licenses/",
    "https://aclanthology.org/",
    "https://arxiv.org/abs/",
    "https://docs.jax.dev/",
    "https://flax.readthedocs.io/",
    "https://github.com/AI-Hypercomputer/xpk",
    "https://github.com/EleutherAI/lm-evaluation-harness",
    "https://huggingface.co/docs/",
    "https://example.org",
)
# beginnings of the addresses that a release completes
TEMPLATES = ("git+", "https://", "https://..", "https://github", "https://github.com/")
TEMPLATES += ("https://github.com/OWNER/NAME", "https://colab.research.google.com/")
HOST = "https://github.com/"
FIRST, SECOND = HOST + "reader/kit", HOST + "other-reader/my.kit"


def text_files(root: Path) -> Iterator[Path]:
    paths = [path for path in root.iterdir() if path.name not in ("uv.lock",)]
    for part in PARTS:
        paths += (root / part).rglob("*")
    for path in paths:
        if path.is_file() and path.suffix in TEXT_ENDINGS:
            yield path


def addresses(root: Path) -> dict[str, set[str]]:
    """Every address in the repository's text files, and the files that hold it."""
    found: dict[str, set[str]] = {}
    for path in text_files(root):
        for match in ADDRESS.finditer(path.read_text(errors="replace")):
            address = match[0].rstrip(".,;:")
            found.setdefault(address, set()).add(str(path.relative_to(root)))
    return found


def is_ours(address: str, repository: str) -> bool:
    """Whether an address is that of the repository or of its notebooks on Colab."""
    if not repository:
        return False
    colab = "https://colab.research.google.com/"
    on_colab = colab + "github/" + repository.removeprefix(HOST)
    return address.startswith((repository, on_colab)) or address == colab + "assets/colab-badge.svg"


def repository_of(root: Path) -> str:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return project["urls"].get("Repository", "")


def test_every_address_is_ours_or_known():
    repository = repository_of(ROOT)
    unknown = {
        address: files
        for address, files in addresses(ROOT).items()
        if not address.startswith(ALLOWED)
        and address not in TEMPLATES
        and not is_ours(address, repository)
    }
    assert not unknown, f"new addresses; add public documents to ALLOWED: {unknown}"


def test_nothing_is_installed_from_a_name_on_pypi():
    for path in text_files(ROOT):
        if path != Path(__file__):
            assert not re.search(r"pip install[^\n]*[ '\"]moekit", path.read_text()), path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    return tmp_path


def contents(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_release_writes_address_and_tag_and_can_be_repeated(tree: Path):
    release = RELEASE["release"]
    release(tree, FIRST + ".git", "v0.1.0")
    once = contents(tree)
    release(tree, FIRST, "v0.1.0")
    assert contents(tree) == once
    release(tree, SECOND + "/", "v0.2.0")
    release(tree, FIRST, "v0.1.0")
    assert contents(tree) == once

    assert repository_of(tree) == FIRST
    readme = (tree / "README.md").read_text()
    assert f"git clone {FIRST} moekit" in readme and "git clone REPOSITORY" not in readme
    notebooks = sorted((tree / "notebooks").glob("*.py"))
    for path in notebooks:
        link = f"github/reader/kit/blob/v0.1.0/notebooks/{path.stem}.ipynb)"
        assert link in readme
        executed = jupytext.read(path.with_suffix(".ipynb"))
        cells = [(cell.cell_type, cell.source) for cell in executed.cells]
        assert cells == [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]
        assert f'REPOSITORY, TAG = "{FIRST}", "v0.1.0"' in path.read_text()
    for address in addresses(tree):
        known = address.startswith(ALLOWED) or address in TEMPLATES
        assert known or is_ours(address, FIRST), address


@pytest.mark.parametrize(
    ("repository", "tag", "message"),
    [
        ("", "v0.1.0", "REPO is ''"),
        ("github.com/reader/kit", "v0.1.0", "REPO is"),
        (FIRST + "/tree/main", "v0.1.0", "REPO is"),
        (FIRST + '"', "v0.1.0", "REPO is"),
        (FIRST, "", "TAG is ''"),
        (FIRST, 'v1"; import os', "TAG is"),
    ],
)
def test_a_release_refuses_what_is_no_address_or_tag(
    tree: Path, repository: str, tag: str, message: str
):
    before = contents(tree)
    with pytest.raises(ValueError, match=re.escape(message)):
        RELEASE["release"](tree, repository, tag)
    assert contents(tree) == before


def test_a_notebook_without_moekit_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for path in sorted((ROOT / "notebooks").glob("*.py")):
        cells = jupytext.read(path).cells
        first = next(cell.source for cell in cells if cell.cell_type == "code")
        with pytest.raises(ModuleNotFoundError, match="clone the repository, run `make lab`"):
            exec(first, {})
