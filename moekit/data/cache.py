"""Content that is slow to build, stored as files in the user's cache folder."""

import gzip
import hashlib
import json
import logging
import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

log = logging.getLogger("moekit")


def cache_folder() -> Path:
    """The environment variable MOEKIT_CACHE, else `moekit` in the user's cache folder."""
    explicit = os.environ.get("MOEKIT_CACHE")
    if explicit:
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser() / "moekit"
    except RuntimeError:  # a user without a home folder, as in some containers
        return Path(tempfile.gettempdir()) / f"moekit-cache-{os.getuid()}"


def cached_json(name: str, build: Callable[[], Any]) -> Any:
    """The JSON content of a file in the cache folder, built and written if it is not there.

    A file begins with the SHA-256 of its content, so a damaged file is recognized and built again.
    Files are written under a temporary name and then renamed: two processes that build the same
    file at the same time do not disturb each other. Without a writable folder nothing is stored.

    Args:
      name: path in the cache folder; it contains a digest of everything that determines the
        content.
      build: returns the content. Tuples come back as lists, also the first time.
    """
    path = cache_folder() / f"{name}.json.gz"
    content = _read(path)
    if content is None:
        content = json.dumps(build()).encode()
        _write(path, content)
    return json.loads(content)


def _read(path: Path) -> bytes | None:
    """The content of a file; None if the file is missing or damaged."""
    try:
        checksum, _, content = gzip.decompress(path.read_bytes()).partition(b"\n")
    except (OSError, EOFError, zlib.error):
        return None
    if hashlib.sha256(content).hexdigest().encode() != checksum:
        return None
    return content


def _write(path: Path, content: bytes) -> None:
    checksum = hashlib.sha256(content).hexdigest().encode()
    compressed = gzip.compress(checksum + b"\n" + content, compresslevel=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(compressed)
            os.replace(partial, path)
        finally:
            Path(partial).unlink(missing_ok=True)
    except OSError as error:
        log.debug("%s was not stored: %s", path, error)
