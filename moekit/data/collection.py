"""The FLAN collection: proportions, caps, formats and clusters, as flan.toml lists them."""

import functools
import tomllib
from dataclasses import dataclass
from importlib.resources import files

from moekit.data.mixture import PromptFormats

_TABLE = tomllib.loads(files("moekit.data").joinpath("flan.toml").read_text("utf-8"))


@dataclass(frozen=True)
class SubMixture:
    """A sub-mixture: its share of all examples, the cap (the most examples of one task that count),
    and the groups of its tasks."""

    share: float
    cap: int
    groups: list[str]


MIXTURES: dict[str, dict[str, SubMixture]] = {
    name: {part: SubMixture(**row) for part, row in parts.items()}
    for name, parts in _TABLE["mixtures"].items()
}
FORMATS = {group: PromptFormats(**row) for group, row in _TABLE["formats"].items()}
GROUPS = tuple(FORMATS)


def listed(group: str) -> dict[str, str]:
    """{task: cluster} of a group, as the collection's authors published it."""
    clusters = _TABLE["clusters"].get(group, {})
    return {task: cluster for cluster, tasks in clusters.items() for task in tasks}


@functools.cache
def _known(group: str) -> tuple[tuple[str, str], ...]:
    """Prefixes of names and their clusters, the longest first."""
    clusters = listed(group)
    aliases = {a: clusters[task] for a, task in _TABLE["aliases"].items() if task in clusters}
    return tuple(sorted((clusters | aliases).items(), key=lambda item: -len(item[0])))


def cluster_of(group: str, task: str) -> str:
    """The cluster of a task in any spelling ("cot_gsm8k_ii", "ai2_arc/ARC-Easy:1.0.0"); the group's
    name for a task that is not listed."""
    names = [task, task.partition("_")[2], task.rpartition("/")[2]]
    for name in names:
        for start, cluster in _known(group):
            if name.startswith(start):
                return cluster
    return group


def published_size(task: str) -> int:
    """Examples of a chain-of-thought set in FLAN's release, 0 for any other task: some sets are
    larger on the hub, and rates must not depend on where the files are."""
    return _TABLE["examples"].get(task, 0)
