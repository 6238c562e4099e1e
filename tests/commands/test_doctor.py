"""The doctor on machines that lack something."""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

from moekit.commands import doctor


@pytest.mark.parametrize("platforms", ["cuda", "nonsense"])
def test_without_its_chip(platforms):
    environment = os.environ | {"JAX_PLATFORMS": platforms}
    command = [sys.executable, "-m", "moekit.cli"]
    done = subprocess.run(
        [*command, "doctor", "--json"], capture_output=True, text=True, env=environment
    )
    found = json.loads(done.stdout)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert found["devices"] == [] and found["backend"] is None
    (advice,) = [line for line in found["missing"] if line.startswith("devices: ")]
    assert f"JAX_PLATFORMS='{platforms}'" in advice and "unset JAX_PLATFORMS" in advice
    assert doctor.as_text(found).count("jax has no device") == 1


def test_a_verb_without_its_chip(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "moekit.cli", "train", "--workdir", tmp_path / "run"],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "nonsense"},
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: jax finds no device") and done.stderr.count("\n") == 1


def test_packages_that_are_missing_or_old(monkeypatch):
    versions = {"jax": "0.1.0", "flax": "99.0"}

    def version(package: str) -> str:
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(
        importlib.metadata,
        "requires",
        lambda name: ["jax>=0.10.2", "flax>=0.12.4", "optax>=0.2", 'torch>=2; extra == "parity"'],
    )
    found, problems = doctor._packages()
    assert found["flax"] == "99.0" and found["optax"] is None and "torch" not in found
    assert 'jax is 0.1.0: pip install "jax>=0.10.2"' in problems
    assert 'optax: pip install "optax>=0.2"' in problems
    assert 'torch (optional): pip install -e ".[parity]"' in problems


def test_a_data_folder_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEKIT_DATA", str(tmp_path / "nothing"))
    data, problems = doctor._data()
    assert data["found"] == ["builtin"] and "which is not a folder" in problems[0]
    (tmp_path / "cot").mkdir()
    monkeypatch.setenv("MOEKIT_DATA", str(tmp_path))
    data, problems = doctor._data()
    assert data["found"] == ["builtin", "chain of thought"]
    assert f"data: no MMLU in {tmp_path}" in problems
