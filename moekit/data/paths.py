"""Which paths are files that can be read.

A FIFO waits for its writer when it is opened, a device may never end, and a link may lead to
nothing: what is named like a file is checked before it is opened.
"""

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

_KINDS = (
    (stat.S_ISDIR, "a folder, not a file"),
    (stat.S_ISFIFO, "a named pipe (FIFO), not a file"),
    (stat.S_ISSOCK, "a socket, not a file"),
    (stat.S_ISCHR, "a device, not a file"),
    (stat.S_ISBLK, "a device, not a file"),
)


def file_problem(path: Path) -> str:
    """Why a path cannot be read as a file; empty for a file, or a link to one."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if path.is_symlink():
            return f"a link to {os.readlink(path)}, which is no file"
        return "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror)
    for is_kind, problem in _KINDS:
        if is_kind(mode):
            return problem
    return ""


def require_file(path: Path, max_bytes: int | None = None) -> None:
    """Check that a path is a file of at most that many bytes.

    Raises:
      FileNotFoundError: no such file, or a link to none.
      ValueError: a folder, a named pipe, a device or a socket; or a larger file.
    """
    problem = file_problem(path)
    if problem and not path.exists():
        raise FileNotFoundError(f"{path}: {problem}: correct the path or remove it")
    if problem:
        raise ValueError(f"{path}: {problem}: remove it, or put a file in its place")
    if max_bytes is not None and path.stat().st_size > max_bytes:
        raise ValueError(f"{path}: the file is larger than {max_bytes:,} bytes")


def require_file_name(name: str, owner: str) -> None:
    """Check that a name from a file or flag can be part of a file's name and stays in its folder.

    Raises:
      ValueError: it has other characters than letters, digits, "_", "-" and ".".
    """
    if not re.fullmatch(r"[\w.-]{1,100}", name):
        raise ValueError(
            f"{owner} {name[:100]!r} cannot be part of a file's name: use letters, digits, -, _ "
            "and ."
        )


def named_files(folder: Path, is_wanted: Callable[[Path], bool]) -> list[Path]:
    """Everything below a folder that is named like a wanted file, in order; hidden names are not.

    Also what only looks like a file (named pipes, links to nothing, empty folders). Linked folders
    are entered. A folder of such a name that holds wanted files is no file: others write a table
    as a folder of parts.

    Raises:
      OSError: a folder cannot be listed.
    """
    found = []
    for current, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        here = Path(current)
        folders[:] = [name for name in folders if not name.startswith(".")]
        shown = [name for name in files if not name.startswith(".")]
        found += [here / name for name in (*folders, *shown) if is_wanted(here / name)]
        folders[:] = [name for name in folders if not _leads_back(here / name)]
    with_parts = {parent for path in found for parent in path.parents}
    return sorted(path for path in found if path not in with_parts)


def _leads_back(folder: Path) -> bool:
    """Whether a linked folder is one of those that it is in."""
    if not folder.is_symlink():
        return False
    target = Path(os.path.realpath(folder))
    return Path(os.path.realpath(folder.parent)).is_relative_to(target)


def _raise(error: OSError) -> None:
    raise error
