"""What there is: mixtures, suites, corpora and data sets, and which are in the data folder.

Only names of files are looked at, so the answer is immediate and needs no network.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moekit.data.collection import GROUPS, MIXTURES
from moekit.data.corpora import TEXT_DOMAINS
from moekit.data.datasets import Access, datasets, find_copy
from moekit.data.instructions import FOLDERS, task_files
from moekit.data.niv2 import niv2_tasks
from moekit.data.ready_made import ready_made, ready_made_copies
from moekit.data.suites import COLLECTIONS, GROUPS as SUITE_GROUPS, SUITES


class Entry(NamedTuple):
    """A thing that can be named, whether it is here, and what it has or lacks."""

    kind: str
    name: str
    here: bool
    about: str


def catalogue(root: Path | None) -> list[Entry]:
    """Everything that a user can name, with what of it is in the data folder."""
    found = [Entry("mixture", "builtin", True, "")]
    found += _mixtures(root)
    found += [_suite(name, root) for name in SUITES]
    found.append(Entry("corpus", "builtin", True, ""))
    for name in TEXT_DOMAINS:
        found.append(Entry("corpus", name, bool(root and (root / "text" / name).is_dir()), ""))
    found += _hub_sources(root)
    return found


def has_dataset(name: str, root: Path | None) -> bool:
    """Whether the data folder has files of a data set."""
    return bool(root) and find_copy(datasets()[name], Access(root)) is not None


def _mixtures(root: Path | None) -> Iterator[Entry]:
    sizes = {group: _tasks_here(group, root) if root else 0 for group in GROUPS}
    for name, parts in MIXTURES.items():
        counts = {part: sum(sizes[group] for group in sub.groups) for part, sub in parts.items()}
        about = ", ".join(f"{part} {count} tasks" for part, count in counts.items())
        yield Entry("mixture", name, any(counts.values()), about)


def _tasks_here(group: str, root: Path) -> int:
    """Tasks of a group; a file of instructions counts as one."""
    count = len(niv2_tasks(root, "train", "skip")) if group == "niv2" else 0
    described = [each.name for each in datasets().values() if each.group == group]
    count += sum(has_dataset(name, root) for name in described)
    for folder in FOLDERS.get(group, ()):
        count += len(task_files(root / folder, datasets()))
    return count or len(ready_made_copies(group, root))


def _suite(name: str, root: Path | None) -> Entry:
    if name.startswith("builtin"):
        return Entry("suite", name, True, "")
    if name == "mmlu":
        here = {name: has_dataset(name, root)}
    elif name in COLLECTIONS:
        folder = name.partition("-")[0]
        here = {name: bool(root) and (root / folder).is_dir()}
    else:
        sets = SUITE_GROUPS.get(name, (name,))
        here = {each: has_dataset(each, root) for each in sets}
    missing = [each for each, found in here.items() if not found]
    about = f"not here: {', '.join(missing)}" if missing else ""
    return Entry("suite", name, any(here.values()), about)


def _hub_sources(root: Path | None) -> Iterator[Entry]:
    for group in GROUPS:
        for each in ready_made(group)[:1]:
            here = bool(ready_made_copies(group, root))
            yield Entry("hub source", group, here, f"{each.repository}, ready-made {group}")
    for name, each in datasets().items():
        if each.hub:
            here = all(files.copies(root) for files in each.hub.values())
            about = f"{each.repository}, {each.group or 'evaluation'}"
            licence = f", licence {each.licence}" if each.licence else ""
            yield Entry("hub source", name, here, about + licence)
