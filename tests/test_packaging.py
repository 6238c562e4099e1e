"""What is installed, how large the package is, and that files tell the same story."""

import ast
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
MODULES = sorted((ROOT / "moekit").rglob("*.py"))
CORE = ("config", "sharding", "step", "train", "optim", "checkpoint", "generate", "evaluate")


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


def test_small_enough_to_be_read():
    for path in MODULES:
        assert len(path.read_text().splitlines()) < 500, path
    # data sources, suites and the planner are half of it; what one reads to change an idea is not
    assert sum(map(code_lines, MODULES)) < 9800
    core = [m for m in MODULES if m.parent.name in ("moe", "model") or m.stem in CORE]
    assert sum(map(code_lines, core)) < 3100


def code_lines(path):
    """Lines that hold code: no blanks, comments or docstrings."""
    text = path.read_text()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    strings = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, documented) and ast.get_docstring(node)
        for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)
    }
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(s.strip()) and s.strip()[0] != "#" for n, s in lines if n not in strings)


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
        "import moekit.train, moekit.evaluate, moekit.generate\n"
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
