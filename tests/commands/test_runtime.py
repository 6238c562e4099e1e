"""What a notebook prints about its runtime."""

import importlib.metadata
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import moekit as mk
from moekit.commands import devices, runtime


def test_it_names_devices_versions_and_a_setting_that_exists():
    found, versions, advice = runtime.describe_runtime().splitlines()
    assert found.startswith(f"devices: {jax.device_count()} x cpu (virtual)")
    assert f"jax {jax.__version__}" in versions and f"numpy {np.__version__}" in versions
    setting = advice.split('"')[1]
    assert mk.StudyConfig.named(setting).size == "nano"


@pytest.mark.parametrize(
    ("platform", "count", "setting"), [("cpu", 8, "small"), ("gpu", 1, "colab"), ("tpu", 8, "full")]
)
def test_the_setting_suits_the_devices(platform, count, setting, monkeypatch):
    chip = SimpleNamespace(platform=platform, device_kind="a chip")
    monkeypatch.setattr(jax, "devices", lambda: [chip] * count)
    assert f'SETTING = "{setting}"' in runtime.describe_runtime()


def test_without_a_device_the_last_line_says_what_to_do(monkeypatch):
    monkeypatch.setattr(devices, "missing_device", lambda: "jax finds no device: unset it")
    assert runtime.describe_runtime().splitlines()[-1] == "jax finds no device: unset it"


def test_a_restart_is_advised_where_another_version_was_imported(monkeypatch):
    assert runtime.changed_since_import() == []
    installed = importlib.metadata.version("numpy")
    monkeypatch.setitem(sys.modules, "numpy", SimpleNamespace(__version__="1.0"))
    assert runtime.changed_since_import() == [f"numpy 1.0 is loaded, but {installed} is installed"]


def test_settings_are_those_of_the_notebooks():
    folders = {mk.StudyConfig.named(setting).workdir for setting in ("small", "colab", "full")}
    assert len(folders) == 3
    with pytest.raises(ValueError, match="unknown setting 'smal': did you mean 'small'"):
        mk.StudyConfig.named("smal")
