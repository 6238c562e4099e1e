"""Routers that a command line names: by name, or as FILE.py:NAME for one of your own."""

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from moekit.errors import unknown

if TYPE_CHECKING:
    from moekit.moe.routing import Router


def is_file_router(text: str) -> bool:
    """Whether a text names a router in a Python file."""
    return text.endswith(".py") or ".py:" in text


def find_router(text: str) -> "Router":
    """A router by name, or one of a Python file.

    Raises:
      ValueError: an unknown name, or a file that raises or has no such router.
      FileNotFoundError: no such file.
    """
    if is_file_router(text):
        return _router_of_file(text)
    from moekit.moe.routing import router

    return router(text)


def checkpoint_router(text: str) -> "Router | None":
    """The router of one's own that a checkpoint was trained with; None for an empty text.

    Raises:
      ValueError: the text names a router of moekit, which a checkpoint records by itself.
    """
    if not text:
        return None
    if not is_file_router(text):
        raise ValueError(
            f"--router is {text!r}: a checkpoint keeps its router; give FILE.py:NAME if it was "
            "trained with a router of your own, else leave --router out"
        )
    return find_router(text)


def _router_of_file(text: str) -> "Router":
    path, _, name = text.rpartition(":")
    if text.endswith(".py"):
        path, name = text, ""
    module = _run_file(Path(path))
    if not hasattr(module, name):
        found = _routers_in(module)
        if not found:
            raise ValueError(
                f"{path} has no router: define a function (logits, mask, *, capacity, limit=None, "
                "**_) that returns a Routing, as notebook 01 does"
            )
        raise unknown(f"router of {path}", name, found)
    return _as_router(getattr(module, name), name)


def _run_file(path: Path) -> ModuleType:
    """The module of a Python file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file raises an exception.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: --router FILE.py:NAME names a Python file")
    name = f"moekit_routers_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(f"{path} raises {type(error).__name__}: {error}") from error
    return module


def _routers_in(module: ModuleType) -> list[str]:
    """The public names of the routers that a module defines."""
    found = []
    for name, value in vars(module).items():
        owner = value if inspect.isroutine(value) or inspect.isclass(value) else type(value)
        if name.startswith("_") or owner.__module__ != module.__name__:
            continue
        try:
            _as_router(value, name)
        except ValueError:
            continue
        found.append(name)
    return found


def _as_router(value: Any, name: str) -> "Router":
    """A function or object as a router; of a class, its instance with default settings.

    Raises:
      ValueError: the layer cannot call it.
    """
    from moekit.moe.routing import check_router

    if inspect.isclass(value):
        try:
            value = value()
        except Exception as error:
            raise ValueError(
                f"router {name} cannot be made without arguments ({error}): give its fields "
                "default values, or name an instance"
            ) from error
    check_router(value)
    return value
