"""Write the address and the tag of a release into README, pyproject.toml and the notebooks.

`make release REPO=https://github.com/OWNER/NAME TAG=v0.1.0` runs this once the repository is
published. Until then no file names an address, so that nobody installs somebody else's code. A
second run, also with another address or tag, replaces what the first one wrote.
"""

import re
import sys
from pathlib import Path

import nbformat

COLAB = "https://colab.research.google.com/"
INSTALL_LINE = re.compile(r'^REPOSITORY, TAG = "[^"]*", "[^"]*"', re.MULTILINE)
BADGES = re.compile(r"<!-- badges -->\n(?:.*\n)*?<!-- /badges -->\n")
NOTEBOOK_LINK = re.compile(r"\[(\d\d_\w+)\]\(notebooks/\1\.ipynb\)( \(\[Colab\]\([^)]*\)\))?")
CLONE_COMMAND = re.compile(r"git clone \S+ moekit\b")
URLS_TABLE = re.compile(r"^\[project\.urls\]\n(?:[^\[\n].*\n)*", re.MULTILINE)


def colab_link(repository: str, tag: str, notebook: str) -> str:
    """The address under which Colab opens a notebook of the release."""
    owner_and_name = repository.removeprefix("https://github.com/")
    return f"{COLAB}github/{owner_and_name}/blob/{tag}/notebooks/{notebook}.ipynb"


def replace_once(pattern: re.Pattern[str], replacement: str, text: str, path: Path) -> str:
    """Replace the only match of a pattern.

    Raises:
      ValueError: the file has no match, or more than one.
    """
    replaced, count = pattern.subn(lambda match: replacement, text)
    if count != 1:
        raise ValueError(
            f"{path} has {count} places for {pattern.pattern!r}; restore the one place"
        )
    return replaced


def release_pyproject(path: Path, repository: str) -> None:
    """Write the repository's address into [project.urls]."""
    table = f'[project.urls]\nRepository = "{repository}"\n'
    path.write_text(replace_once(URLS_TABLE, table, path.read_text(), path))


def release_readme(path: Path, repository: str, tag: str) -> None:
    """Write the badge, a Colab link beside every notebook, and the clone commands."""

    def with_colab_link(match: re.Match[str]) -> str:
        notebook = match[1]
        address = colab_link(repository, tag, notebook)
        return f"[{notebook}](notebooks/{notebook}.ipynb) ([Colab]({address}))"

    address = colab_link(repository, tag, "00_start_here")
    badge = f"[![Open in Colab]({COLAB}assets/colab-badge.svg)]({address})"
    badges = f"<!-- badges -->\n{badge}\n<!-- /badges -->\n"
    text = replace_once(BADGES, badges, path.read_text(), path)
    text = NOTEBOOK_LINK.sub(with_colab_link, text)
    text = CLONE_COMMAND.sub(f"git clone {repository} moekit", text)
    path.write_text(text)


def release_notebook(path: Path, repository: str, tag: str) -> None:
    """Write what the first code cell installs, in the text and in the executed notebook."""
    line = f'REPOSITORY, TAG = "{repository}", "{tag}"'
    path.write_text(replace_once(INSTALL_LINE, line, path.read_text(), path))
    executed = path.with_suffix(".ipynb")
    notebook = nbformat.read(executed, as_version=4)
    first_code_cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    source = first_code_cell.source
    first_code_cell.source = replace_once(INSTALL_LINE, line, source, executed)
    nbformat.write(notebook, executed)


def release(root: Path, repository: str, tag: str) -> None:
    """Write a release's address and tag into the files of a working tree.

    Raises:
      ValueError: the address is not one of a GitHub repository, which Colab needs; the tag has
        characters that no tag has; a file lacks the place to write to.
    """
    repository = repository.removesuffix("/").removesuffix(".git")
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"REPO is {repository!r}: use https://github.com/OWNER/NAME")
    if not re.fullmatch(r"[\w.-]+", tag):
        raise ValueError(f"TAG is {tag!r}: use letters, digits, dots and dashes, such as v0.1.0")
    release_pyproject(root / "pyproject.toml", repository)
    release_readme(root / "README.md", repository, tag)
    for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.py")):
        release_notebook(path, repository, tag)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: make release REPO=https://github.com/OWNER/NAME TAG=v0.1.0")
    try:
        release(Path(__file__).parent.parent, sys.argv[1], sys.argv[2])
    except ValueError as error:
        sys.exit(f"error: {error}")
