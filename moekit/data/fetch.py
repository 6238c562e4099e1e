"""Fetching data sets of the hub into a data folder, for machines without network.

Files are stored unchanged in <data folder>/hub/<repository>/ and listed in the folder's
manifest.json with bytes, sha256, rows and licence. Interrupted downloads resume.
"""

import fnmatch
import json
import logging
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moekit.data.datasets import FORMER_NAMES, datasets
from moekit.data.files import read_manifest, sha256
from moekit.data.hub_files import HubFiles, repository_info
from moekit.data.ready_made import ready_made
from moekit.errors import unknown

log = logging.getLogger("moekit")


@dataclass(frozen=True)
class Item:
    """A file to fetch: its data set, where it is, its size, and the set's licence."""

    source: str
    repository: str
    revision: str
    file: str
    bytes: int
    licence: str = ""

    @property
    def path(self) -> str:
        """Where it is stored in the data folder."""
        return f"hub/{self.repository}/{self.file}"


def plan(names: Sequence[str], origin: str = "") -> list[Item]:
    """The files of data sets and of ready-made sub-mixtures, without fetching any; sets that are
    not available are logged and left out.

    Args:
      origin: a folder (or file:// address) that holds <repository>/<files> in place of the hub.

    Raises:
      ValueError: an unknown data set.
      ConnectionError: the hub has none of them.
      FileNotFoundError: the origin has none of them.
    """
    items: dict[str, Item] = {}
    problem: OSError | None = None
    for name, places in {name: _places(name) for name in names}.items():
        try:
            for item in _available(name, places, origin):
                items[item.path] = item
        except (ConnectionError, FileNotFoundError) as error:
            log.warning("%s is left out: %s", name, error)
            problem = problem or error
    if not items and problem:
        raise problem
    return list(items.values())


def _places(name: str) -> list[list[HubFiles]]:
    """The repositories that have a set, to be tried in this order, each with its splits."""
    if ready_made(name):
        return [[each] for each in ready_made(name)]
    known = FORMER_NAMES.get(name, name)
    offered = {key: each for key, each in datasets().items() if each.hub}
    if known not in offered:
        groups = [key for key in ("flan2021", "t0", "niv2", "cot", "dialog") if ready_made(key)]
        raise unknown("hub source", name, [*offered, *groups])
    return [list(offered[known].hub.values())]


def _available(name: str, places: Sequence[Sequence[HubFiles]], origin: str) -> list[Item]:
    """The files of the first repository that has any."""
    problem: OSError | None = None
    for splits in places:
        try:
            return _items(name, splits, origin)
        except (ConnectionError, FileNotFoundError) as error:
            problem = problem or error
    raise problem or FileNotFoundError(f"{name} has no repository")


def _items(name: str, splits: Sequence[HubFiles], origin: str) -> list[Item]:
    repository, revision = splits[0].repository, splits[0].revision
    if origin:
        folder = _folder(origin) / repository
        paths = [path for path in folder.rglob("*") if path.is_file()]
        sizes = {str(path.relative_to(folder)): path.stat().st_size for path in paths}
        where = str(folder)
    else:
        listed = repository_info(repository, revision).siblings or []
        sizes = {each.rfilename: each.size or 0 for each in listed}
        where = f"{repository}@{revision}"
    patterns = [each.pattern for each in splits]
    wanted = [file for file in sorted(sizes) if _matches(file, patterns)]
    if not wanted:
        raise FileNotFoundError(f"{where} has no files {' or '.join(patterns)}")
    known = datasets().get(FORMER_NAMES.get(name, name))
    licence = known.licence if known else ""
    return [Item(name, repository, revision, file, sizes[file], licence) for file in wanted]


def _matches(file: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(file, pattern) for pattern in patterns)


def _folder(origin: str) -> Path:
    return Path(origin.removeprefix("file://"))


def fetch(items: Iterable[Item], root: Path, origin: str = "") -> list[dict]:
    """Bring files into a data folder and its manifest; files that are there stay.

    Returns:
      the manifest's entries of these files.

    Raises:
      OSError: not enough room, or a file that did not arrive whole.
    """
    items = list(items)
    manifest = root / "manifest.json"
    known = read_manifest(manifest) if manifest.is_file() else {}
    missing = [item for item in items if not _is_there(root / item.path, item, known)]
    wanted, free = sum(item.bytes for item in missing), shutil.disk_usage(root).free
    if wanted > free:
        raise OSError(f"{root} has {free:,} bytes free, {wanted:,} are needed")
    for repository, revision in dict.fromkeys((i.repository, i.revision) for i in missing):
        own = [item for item in missing if item.repository == repository]
        _bring(own, revision, root, origin)
        for item in own:
            known[item.path] = _entry(item, root / item.path)
        draft = manifest.with_suffix(".part")
        draft.write_text(json.dumps(list(known.values()), indent=1) + "\n")
        draft.replace(manifest)
    return [known[item.path] for item in items]


def _is_there(path: Path, item: Item, known: dict[str, dict]) -> bool:
    entry = known.get(item.path)
    if not path.is_file() or not entry or path.stat().st_size != item.bytes:
        return False
    return entry["sha256"] == sha256(path)


def _bring(items: Sequence[Item], revision: str, root: Path, origin: str) -> None:
    """Fetch files of one repository into the data folder's hub/."""
    repository = items[0].repository
    folder = root / "hub" / repository
    if origin:
        for item in items:
            path = root / item.path
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(_folder(origin) / repository / item.file, path)
        return
    from huggingface_hub import snapshot_download

    for item in items:  # what is there is damaged
        (root / item.path).unlink(missing_ok=True)
    snapshot_download(
        repository,
        repo_type="dataset",
        revision=revision,
        allow_patterns=[item.file for item in items],
        local_dir=folder,
    )


def _entry(item: Item, path: Path) -> dict:
    """The manifest's entry of a file that has arrived."""
    import pyarrow.parquet as parquet

    size = path.stat().st_size if path.is_file() else 0
    if size != item.bytes:
        path.unlink(missing_ok=True)
        raise OSError(f"{path} arrived damaged ({size:,} of {item.bytes:,} bytes): fetch it again")
    entry = {"path": item.path, "bytes": size, "sha256": sha256(path)}
    entry["source"] = f"{item.repository}@{item.revision}"
    if item.licence:
        entry["licence"] = item.licence
    entry["rows"] = parquet.read_metadata(path).num_rows
    return entry


def as_text(items: Sequence[Item]) -> str:
    """Files, bytes and licence of every data set."""
    lines = []
    for name in dict.fromkeys(item.source for item in items):
        own = [item for item in items if item.source == name]
        size = sum(item.bytes for item in own)
        line = f"{name:24} {own[0].repository:44} {len(own):4} files {size:15,} bytes"
        lines.append(f"{line}  {own[0].licence}".rstrip())
    total = sum(item.bytes for item in items)
    lines.append(f"{'all':69} {len(items):4} files {total:15,} bytes")
    return "\n".join(lines)
