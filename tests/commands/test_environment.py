"""Settings of the process and of what a terminal shows."""

import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from moekit.commands import environment
from moekit.commands.flags import mesh_axes
from moekit.commands.output import escape, print_result, table


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_kept_for_training_on_a_cpu_alone(monkeypatch):
    names = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(environment, "has_accelerator", lambda: True)
    environment.keep_freed_memory()
    assert not set(names) & set(os.environ)
    monkeypatch.setattr(environment, "has_accelerator", lambda: False)
    environment.keep_freed_memory()
    # a process started from here maps no block of its own, which would be returned when freed
    code = "import ctypes; c = ctypes.CDLL(None); c.malloc(1 << 27); c.malloc_stats()"
    report = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
    assert re.search(r"max mmap regions = +0$", report, re.M) and set(names) <= set(os.environ)


KEEP_PROGRAMS = """
import sys
from moekit.commands.environment import keep_compiled_programs
keep_compiled_programs()
import jax
from pathlib import Path
folder = jax.config.jax_compilation_cache_dir
if "break" in sys.argv:
    Path(folder).rmdir()
    Path(folder).write_text("in the way")
print(jax.jit(lambda x: x + 1)(1), folder)
"""


def keep_programs(**variables: str) -> list[str]:
    """The words that a process prints which compiles a function: its result, and the folder."""
    names = [name for name in os.environ if name.startswith("JAX_")]
    clean = {name: value for name, value in os.environ.items() if name not in names}
    arguments = variables.pop("arguments", "").split()
    shown = subprocess.run(
        [sys.executable, "-c", KEEP_PROGRAMS, *arguments],
        capture_output=True,
        text=True,
        env=clean | {"JAX_PLATFORMS": "cpu"} | variables,
    )
    assert shown.returncode == 0, shown.stderr
    return shown.stdout.split()


def test_compiled_programs_are_kept_where_the_user_wants_them(tmp_path):
    always = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    own = str(tmp_path / "moekit")
    result, folder = keep_programs(MOEKIT_CACHE=own, **always)
    assert result == "2" and folder.startswith(own)
    assert any("jit" in path.name for path in Path(folder).iterdir())
    chosen = str(tmp_path / "jax")
    assert keep_programs(MOEKIT_CACHE=own, JAX_COMPILATION_CACHE_DIR=chosen) == ["2", chosen]
    (tmp_path / "file").write_text("not a folder")
    assert keep_programs(MOEKIT_CACHE=str(tmp_path / "file"), **always) == ["2", "None"]
    # a folder that fails later is no error
    broken = keep_programs(MOEKIT_CACHE=str(tmp_path / "b"), arguments="break", **always)
    assert broken[0] == "2"


@given(st.text())
def test_nothing_that_a_terminal_interprets_is_shown(text):
    shown = escape(text)
    for character in shown:
        category = unicodedata.category(character)
        assert character in "\n\t" or category not in ("Cc", "Cf", "Cs", "Zl", "Zp")
    shown.encode()  # no lone surrogates, which cannot be printed


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\u202eb", "a\\u202eb"),
        ("over\rwritten", "over\\rwritten"),
        ("\ud800", "\\ud800"),
        ("tab\tand\nline", "tab\tand\nline"),
        ("naïve 中文 Ελλάδα 5 €", "naïve 中文 Ελλάδα 5 €"),
    ],
)
def test_escapes(text, shown, capsys):
    assert escape(text) == shown
    print_result({"text": text}, text, json=False)
    assert capsys.readouterr().out == shown + "\n"
    print_result({"text": text}, text, json=True)
    assert "\x1b" not in capsys.readouterr().out


def test_tables_are_aligned():
    rows = [{"name": "a", "ms": 1.5}, {"name": "long", "ms": 10}]
    assert table(rows) == "name   ms\n   a  1.5\nlong   10"


def test_mesh_axes():
    assert mesh_axes("") == {}
    assert mesh_axes("expert=64,model=2") == {"expert": 64, "model": 2}
    for wrong in ("expert", "expert=", "expert=-1", "expert=0", "experts=2", "expert=2.0"):
        with pytest.raises(ValueError, match="write axes"):
            mesh_axes(wrong)
