"""What is installed, how large the package is, and that files tell the same story."""

import ast
import graphlib
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
    assert set(extras) <= set(PROJECT["optional-dependencies"]) and {"dev", "notebooks"} <= set(
        extras
    )


def test_extras_and_licence():
    extras = {"tpu", "cuda", "eval", "parity", "test", "dev", "notebooks"}
    assert set(PROJECT["optional-dependencies"]) == extras
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert mk.__version__ == PROJECT["version"]


def test_the_lab_and_conda_install_the_notebooks_extra():
    assert '".[notebooks]"' in (ROOT / "Makefile").read_text()
    names = {re.split("[>=]", line)[0] for line in PROJECT["optional-dependencies"]["notebooks"]}
    assert names == {"jupyterlab", "ipywidgets", "jupytext"}


def test_the_citation_names_this_version_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] and citation["title"].startswith("moekit")
    assert citation["license"] == PROJECT["license"]
    assert "repository-code" not in citation  # no address before the release


def test_contributing_names_only_what_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for path in re.findall(r"`((?:moekit|tests|notebooks|\.ci)/[\w./]+)`", text):
        assert "NN" in path or (ROOT / path).exists(), path
    for target in re.findall(r"make (lint|test|tour|lab|notebooks)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


def test_moe_depends_on_nothing_else_of_the_kit_but_sharding():
    for path in (ROOT / "moekit/moe").glob("*.py"):
        found = set(re.findall(r"from (moekit[\w.]*)", path.read_text()))
        others = {name for name in found if not name.startswith("moekit.moe")}
        assert others <= {"moekit.sharding", "moekit.errors", "moekit.versions"}


def imported_modules(path: Path, modules: set[str]) -> set[str]:
    """The modules of the kit that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = "moekit." * node.level + (node.module or "")
            if [alias.name for alias in node.names] == ["__version__"]:
                continue  # defined in moekit/__init__.py itself
            for alias in node.names:
                submodule = f"{package}.{alias.name}"
                found.add(submodule if submodule in modules else package)
    return found & modules


def test_no_module_imports_itself_through_others():
    paths = {}
    for path in (ROOT / "moekit").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        paths[".".join(part for part in parts if part != "__init__")] = path
    graph = {name: imported_modules(path, set(paths)) for name, path in paths.items()}
    # `import moekit` gives access to every public name
    graph["moekit"] |= imported_modules(ROOT / "moekit/__init__.pyi", set(paths))
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"an import circle: {' <- '.join(error.args[1])}")


def test_every_public_name_is_defined_in_the_module_that_the_stub_names():
    stub = ast.parse((ROOT / "moekit/__init__.pyi").read_text())
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    for node in imports:
        path = ROOT / "moekit" / node.module.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        defined = set()
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.FunctionDef | ast.ClassDef):
                defined.add(statement.name)
            elif isinstance(statement, ast.Assign):
                defined |= {target.id for target in statement.targets if hasattr(target, "id")}
            elif isinstance(statement, ast.AnnAssign):
                defined.add(statement.target.id)
            elif isinstance(statement, ast.ImportFrom) and path.stem == "__init__":
                defined |= {alias.asname for alias in statement.names}  # an explicit export
        for alias in node.names:
            assert alias.name in defined, f"{alias.name} is not defined in {path}"
            assert alias.asname == alias.name  # what a type checker takes as exported
    names = [alias.name for node in imports for alias in node.names]
    assert sorted(names) == sorted(mk.__all__)


def test_no_module_has_the_name_of_a_public_name():
    modules = {path.stem for path in (ROOT / "moekit").iterdir()}
    assert not modules & set(mk.__all__)
    assert (ROOT / "moekit/py.typed").exists()


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
