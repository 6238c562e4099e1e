"""What is installed, how large the package is, and that files tell the same story."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import moekit as mk

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_environment_yml_only_names_python_pip_and_this_project():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, packages = environment["dependencies"]
    assert environment["name"] == PROJECT["name"] and pip == "pip"
    assert python == f"python {PROJECT['requires-python']}"
    (own,) = packages["pip"]
    extras = re.fullmatch(r"-e \.\[(.+)\]", own)[1].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"]) and "dev" in extras


def test_extras_and_licence():
    assert {"tpu", "cuda", "eval", "parity", "dev"} == set(PROJECT["optional-dependencies"])
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert mk.__version__ == PROJECT["version"]


def test_moe_depends_on_nothing_else_of_the_kit_but_sharding():
    for path in (ROOT / "moekit/moe").glob("*.py"):
        found = set(re.findall(r"from (moekit[\w.]*)", path.read_text()))
        others = {name for name in found if not name.startswith("moekit.moe")}
        assert others <= {"moekit.sharding", "moekit.errors"}


@pytest.mark.parametrize("name", mk.__all__)
def test_every_public_name_exists_and_is_documented(name):
    if name in ("harness", "MoekitLM"):
        pytest.importorskip("lm_eval", reason="needs the extra eval")
    value = getattr(mk, name)
    if name not in ("PRESETS",):
        assert value.__doc__


def test_import_is_light_and_submodules_do_not_shadow_functions():
    code = (
        "import sys, moekit as mk\n"
        "assert not {'jax', 'flax', 'matplotlib', 'datasets'} & set(sys.modules)\n"
        "import moekit.training.loop, moekit.evaluation.evaluator, moekit.model.decoding\n"
        "assert callable(mk.train) and callable(mk.evaluate) and callable(mk.generate)\n"
        "try: mk.nothing\n"
        "except AttributeError as e: assert 'nothing' in str(e)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT)


def test_readme_names_every_notebook_and_only_existing_files():
    text = (ROOT / "README.md").read_text()
    for path in (ROOT / "notebooks").glob("*.py"):
        assert f"notebooks/{path.stem}.ipynb)" in text
    for link in re.findall(r"\]\(((?:notebooks|assets)/[^)]+)\)", text):
        assert (ROOT / link).exists(), link
    for target in re.findall(r"make (\w+)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) or target == "and"
