"""The runtime of a notebook in three lines: device, versions, and what it is good for."""

import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

from moekit.commands.doctor import installed_version

# what must fit together; the first cell of a notebook leaves these as the runtime has them
STACK = ("jax", "jaxlib", "libtpu", "flax", "numpy")


def describe_runtime() -> str:
    """Device, versions, and the setting of the notebooks that suits them; starts jax.

    Where the runtime cannot work as it is, the last line says what to do.
    """
    import jax

    from moekit.commands.devices import missing_device

    problem = missing_device()
    if problem:
        return f"{_versions()}\n{problem}"
    lines = [_devices(jax.devices()), _versions(), _advice(jax.devices())]
    changed = changed_since_import()
    if changed:
        lines.append(f"restart the runtime once: {'; '.join(changed)}")
    return "\n".join(lines)


def changed_since_import() -> list[str]:
    """Packages of which another version is installed than this process has imported."""
    changed = []
    for name in STACK:
        loaded = getattr(sys.modules.get(name), "__version__", None)
        installed = installed_version(name)
        if loaded and installed and loaded != installed:
            changed.append(f"{name} {loaded} is loaded, but {installed} is installed")
    return changed


def _versions() -> str:
    versions = {name: installed_version(name) for name in STACK}
    found = [f"{name} {version}" for name, version in versions.items() if version]
    return f"versions: Python {platform.python_version()}, {', '.join(found)}"


def _devices(devices: Sequence[Any]) -> str:
    first = devices[0]
    kind = f"{len(devices)} x {first.device_kind}"
    if first.platform != "cpu":
        return f"devices: {kind} ({first.platform})"
    virtual = " (virtual)" if len(devices) > 1 else ""
    return f"devices: {kind}{virtual}, {os.cpu_count()} CPU cores"


def _advice(devices: Sequence[Any]) -> str:
    if devices[0].platform == "cpu":
        return 'good for: SETTING = "small", the nano models in a few minutes'
    if len(devices) < 4:
        return 'good for: SETTING = "colab", the mini models in about ten minutes'
    return 'good for: SETTING = "full", the mini models at length and larger ones'
