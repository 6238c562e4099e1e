"""Settings of the process and of what a terminal shows."""

import os
import re
import subprocess
import sys
import unicodedata

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
