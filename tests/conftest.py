"""Eight virtual devices, checked shapes, no display, no network: set before any import."""

import importlib.metadata
import os
from pathlib import Path

from packaging.version import Version

# small programs that run once: compile fast instead of well
FAST_COMPILATION = "--xla_backend_optimization_level=0"
if Version(importlib.metadata.version("jaxlib")) < Version("0.11"):
    # a third less; XLA ends a process that sets a flag which it does not know
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"

os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = FAST_COMPILATION
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
# programs are compiled once for all test processes, and kept for the next run (`make clean`)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".jax_cache"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import gc
import pkgutil

import jax
import pytest
from jaxtyping import install_import_hook

import moekit

# A quarter of the time of tracing goes into collecting garbage: there is much that is alive.
gc.freeze()
gc.set_threshold(100_000, 20, 20)


def checked_modules() -> list[str]:
    """All of moekit except the modules that read text and compiled programs.

    Those call their functions for every row or line: checking types there took most of the time.
    """
    names = [f"moekit.{module.name}" for module in pkgutil.iter_modules(moekit.__path__)]
    names.remove("moekit.data")
    names.remove("moekit.planning")
    with_arrays = ("batch", "loader", "packing", "span_corruption", "statistics", "text")
    names += [f"moekit.data.{name}" for name in with_arrays]
    return names


install_import_hook(checked_modules(), "beartype.beartype")


@pytest.fixture(autouse=True, scope="module")
def release_compiled_programs():
    """XLA maps memory for every program it compiles and crashes at the kernel's 65,530 maps."""
    yield
    jax.clear_caches()
