"""Committed notebooks are executed, small, and equal their paired text."""

import json
import re
from pathlib import Path

import jupytext
import pytest

from moekit.commands.tour import execute_notebooks, notebooks

FOLDER = Path(__file__).parent.parent.parent / "notebooks"
PATHS = notebooks(FOLDER)
MACHINE = re.compile(r"/(tmp|home|root|Users)/|nodename|node='")  # that executed the notebook


def cells(notebook):
    return [(c.cell_type, c.source) for c in notebook.cells]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_pair(path):
    executed = path.with_suffix(".ipynb")
    pair, text = jupytext.read(executed), jupytext.read(path)
    assert cells(pair) == cells(text), "run `make notebooks`"
    outputs = [o for c in pair.cells if c.cell_type == "code" for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    printed = [o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in outputs]
    assert not [text for text in printed if MACHINE.search(text)]
    assert executed.stat().st_size < 1_500_000


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_form(path):
    text = jupytext.read(path)
    code = [c.source for c in text.cells if c.cell_type == "code"]
    first = text.cells[0].source
    assert first.startswith(f"# {path.stem[:2]} ") and "Time" in first and "will see" in first
    assert max(len(source.splitlines()) for source in code) <= 20
    assert sum('SETTING = "small"' in source for source in code) == 1
    # notebook 11 compiles for chips that it does not use, and must not hold them either
    describes = sum("print(describe_runtime())" in source for source in code)
    assert describes == (0 if path.stem.startswith("11") else 1)
    last = text.cells[-1].source
    assert "## Exercises" in last and "\n2. " in last


def test_a_failing_notebook_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/01_bad.py").write_text("# %%\nimport warnings\nwarnings.warn('old')\n")
    with pytest.raises(ValueError, match="notebook 01_bad, cell 1: UserWarning: old"):
        execute_notebooks(tmp_path / "out")
    (tmp_path / "notebooks/01_bad.py").write_text("# %%\nprint(1)\n")
    assert execute_notebooks(tmp_path / "out")[0]["cells"] == 1
    written = json.loads((tmp_path / "out/01_bad.ipynb").read_text())
    assert written["cells"][0]["outputs"][0]["text"] == ["1\n"]


def test_a_notebook_waits_for_the_one_that_it_continues(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "03_first.py").write_text(
        "# %%\nimport time, pathlib\ntime.sleep(1)\npathlib.Path('model').touch()\n"
    )
    (folder / "05_second.py").write_text("# %%\nimport pathlib\npathlib.Path('model').unlink()\n")
    names = [row["notebook"] for row in execute_notebooks(tmp_path / "out")]
    assert names == ["03_first", "05_second"]
    (folder / "03_first.py").write_text("# %%\nraise ValueError('broken')\n")
    with pytest.raises(ValueError, match="notebook 03_first, cell 1: ValueError: broken"):
        execute_notebooks(tmp_path / "out")
