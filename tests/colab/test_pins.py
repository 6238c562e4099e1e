"""The kit beside the packages of Colab's runtimes: nothing of the accelerator's stack is changed.

colab.txt, colab-gpu.txt and colab-tpu.txt list what the three runtimes have. `make colab` builds an
environment from the last one, and sets MOEKIT_PINS to its path.
"""

import importlib.metadata
import os
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOLDER = Path(__file__).parent
PROJECT = tomllib.loads((FOLDER.parent.parent / "pyproject.toml").read_text())["project"]
STACK = ("jax", "jaxlib", "libtpu", "flax", "numpy", "ml-dtypes")


def pins(path):
    lines = Path(path).read_text().splitlines()
    pairs = [line.split("==") for line in lines if "==" in line]
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("name", ["colab.txt", "colab-gpu.txt", "colab-tpu.txt"])
def test_every_dependency_accepts_what_colab_has(name):
    found = pins(FOLDER / name)
    accepted = []
    for line in PROJECT["dependencies"]:
        requirement = Requirement(line)
        version = found.get(canonicalize_name(requirement.name))
        if version is not None:
            assert requirement.specifier.contains(version), f"{line} refuses {version}"
            accepted.append(requirement.name)
    assert {"jax", "flax", "numpy", "grain", "datasets", "orbax-checkpoint"} <= set(accepted)


@pytest.mark.skipif("MOEKIT_PINS" not in os.environ, reason="only in the environment of make colab")
def test_the_stack_of_this_environment_is_as_it_was():
    found = pins(os.environ["MOEKIT_PINS"])
    installed = {name: importlib.metadata.version(name) for name in STACK if name in found}
    assert installed == {name: found[name] for name in installed}
    assert {"jax", "jaxlib", "flax", "numpy"} <= set(installed)
