"""Mirroring sources of the hub into a data folder, for machines without network.

Files come to <data folder>/hub/<repository>/ as they are, and into the folder's manifest.json with
bytes, sha256 and rows. A fetch that was broken off goes on where it stopped.
"""

import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from moekit.data.hub import Source, reachable, source
from moekit.data.sources import read_manifest

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Item:
    """A file to fetch: of which source, where it lies there, its size and perhaps its checksum."""

    source: str
    repository: str
    revision: str
    file: str
    bytes: int
    sha256: str = ""

    @property
    def path(self) -> str:
        """Where it goes in the data folder."""
        return f"hub/{self.repository}/{self.file}"


def plan(names: Sequence[str], origin: str = "") -> list[Item]:
    """The files of sources of hub.toml, without fetching any.

    Args:
      origin: a folder (or file:// address) that holds <repository>/<files> in place of the hub.

    Raises:
      ValueError: an unknown source.
      ConnectionError: the hub cannot be reached.
      FileNotFoundError: the origin lacks the files.
    """
    items = {item.path: item for name in names for item in _files(source(name), origin)}
    return list(items.values())


def _files(each: Source, origin: str) -> list[Item]:
    if origin:
        folder = _folder(origin) / each.path
        found = [
            (str(p.relative_to(folder)), p.stat().st_size, "") for p in folder.rglob("*.parquet")
        ]
    else:
        there = reachable(each.path, each.revision).siblings or []
        found = [(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else "") for s in there]
    patterns = each.splits.values()
    wanted = [f for f in sorted(found) if any(fnmatch.fnmatch(f[0], p) for p in patterns)]
    if not wanted:
        where = _folder(origin) / each.path if origin else f"{each.path}@{each.revision}"
        raise FileNotFoundError(f"{where} has no files {' or '.join(patterns)}")
    return [Item(each.name, each.path, each.revision, *row) for row in wanted]


def _folder(origin: str) -> Path:
    return Path(origin.removeprefix("file://"))


def fetch(items: Iterable[Item], root: Path, origin: str = "") -> list[dict]:
    """Bring files into a data folder and its manifest; what is there already stays.

    Returns:
      the manifest's entries of these files.

    Raises:
      OSError: not enough room, or a file that does not arrive as it left.
    """
    manifest, items, entries = root / "manifest.json", list(items), []
    known = read_manifest(manifest) if manifest.is_file() else {}
    missing = [item for item in items if not _is_there(root / item.path, item, known)]
    wanted, free = sum(item.bytes for item in missing), shutil.disk_usage(root).free
    if wanted > free:
        raise OSError(f"{root} has {free:,} bytes free, {wanted:,} are needed")
    with tqdm(total=wanted, unit="B", unit_scale=True, desc="fetch") as bar:
        for item in items:
            path = root / item.path
            if item in missing:
                path.parent.mkdir(parents=True, exist_ok=True)
                known[item.path] = _entry(_bring(item, path, root, origin), path)
                draft = manifest.with_suffix(".part")
                draft.write_text(json.dumps(list(known.values()), indent=1) + "\n")
                draft.replace(manifest)
                bar.update(item.bytes)
            entries.append(known[item.path])
    return entries


def _is_there(path: Path, item: Item, known: dict[str, dict]) -> bool:
    entry = known.get(item.path)
    if not path.is_file() or not entry or path.stat().st_size != item.bytes:
        return False
    return entry["sha256"] == sha256(path) and item.sha256 in ("", entry["sha256"])


def _bring(item: Item, path: Path, root: Path, origin: str) -> Item:
    """Fetch one file; returns it with the checksum that it has at its source, if that is known."""
    if origin:
        there = _folder(origin) / item.repository / item.file
        _copy(there, path)
        return replace(item, sha256=sha256(there))
    from huggingface_hub import hf_hub_download

    hf_hub_download(  # it resumes by itself
        item.repository,
        item.file,
        repo_type="dataset",
        revision=item.revision,
        local_dir=root / "hub" / item.repository,
    )
    return item


def _copy(there: Path, path: Path) -> None:
    """Copy a file, going on from what a broken-off copy left."""
    part = path.with_name(path.name + ".part")
    done = part.stat().st_size if part.exists() else 0
    with there.open("rb") as source, part.open("ab") as target:
        source.seek(done)
        shutil.copyfileobj(source, target, _CHUNK)
    os.replace(part, path)


def _entry(item: Item, path: Path) -> dict:
    import pyarrow.parquet as parquet

    digest, size = sha256(path), path.stat().st_size
    if size != item.bytes or item.sha256 not in ("", digest):
        path.unlink()
        raise OSError(f"{path} arrived damaged ({size:,} of {item.bytes:,} bytes): fetch it again")
    entry = {"path": item.path, "bytes": size, "sha256": digest}
    entry["source"] = f"{item.repository}@{item.revision}"
    return entry | {"rows": parquet.read_metadata(path).num_rows}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_text(items: Sequence[Item]) -> str:
    """Files and bytes of every source."""
    lines = []
    for name in dict.fromkeys(item.source for item in items):
        own = [item for item in items if item.source == name]
        size = sum(item.bytes for item in own)
        lines.append(f"{name:24} {own[0].repository:44} {len(own):4} files {size:15,} bytes")
    return "\n".join(
        [*lines, f"{'all':69} {len(items):4} files {sum(i.bytes for i in items):15,} bytes"]
    )
