"""Settings of the process that must be made before jax starts."""

import ctypes
import hashlib
import importlib.util
import os
import platform
import sys
from pathlib import Path

from moekit.data.cache import cache_folder

_ACCELERATOR_FILES = ("accel*", "vfio/*", "nvidia*", "kfd")
# glibc's names and numbers of its options (malloc.h), and their values
_MALLOC_OPTIONS = (
    ("MALLOC_ARENA_MAX", -8, 1),
    ("MALLOC_MMAP_MAX_", -4, 0),  # no blocks outside of the heap
    ("MALLOC_TRIM_THRESHOLD_", -1, 2**31 - 1),
)


def has_accelerator() -> bool:
    """Whether the system shows a TPU or GPU, found without starting jax."""
    devices = Path("/dev")
    return any(any(devices.glob(pattern)) for pattern in _ACCELERATOR_FILES)


def use_cpu_without_accelerator() -> None:
    """Set JAX_PLATFORMS=cpu where libtpu is installed but no TPU or GPU is present.

    jax would otherwise try the TPU and print its warnings. To be called before jax is imported.
    """
    if importlib.util.find_spec("libtpu") and not has_accelerator():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def keep_freed_memory() -> None:
    """Make glibc's malloc keep freed memory instead of returning it to the system.

    On a CPU every training step would otherwise map its memory anew, and the kernel fill it with
    zeros. To be called before jax starts its threads, which choose their heaps then.
    """
    if sys.platform != "linux" or has_accelerator():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for name, option, value in _MALLOC_OPTIONS:
        os.environ.setdefault(name, str(value))  # for processes that this one starts
        mallopt(option, int(os.environ[name]))


def keep_compiled_programs() -> None:
    """Let jax keep compiled programs in the user's cache folder, which may be deleted at any time.

    An environment with JAX_COMPILATION_CACHE_DIR is left as it is, and
    JAX_ENABLE_COMPILATION_CACHE=false switches the cache off. Nothing is kept if the folder cannot
    be written. To be called before jax compiles anything.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = cache_folder() / f"compiled-{_processor_digest()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(folder, os.W_OK):
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # the default, 1 s, leaves out nearly all programs of a small model: dozens of short ones
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _processor_digest() -> str:
    """Eight hexadecimal digits for the processor.

    A program that was compiled for another one can end the process (illegal instruction), and home
    folders are shared between machines.
    """
    description = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    wanted = ("model name", "flags", "Features", "CPU part")
    found = {line for line in lines if line.startswith(wanted)}
    text = "\n".join([description, *sorted(found)])
    return hashlib.sha256(text.encode()).hexdigest()[:8]
