"""The versions of moekit and of the libraries that compute."""

import functools
import importlib.metadata
import sys

VERSION = "0.1.0"
LIBRARIES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@functools.lru_cache(maxsize=1)
def installed_versions() -> dict[str, str]:
    """Of Python, moekit and those of the libraries that are installed."""
    found = {"python": sys.version.split()[0], "moekit": VERSION}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
