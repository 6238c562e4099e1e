"""Bars: their estimate leaves out compilation; TQDM_DISABLE hides them."""

import io
import re
import subprocess
import sys

import pytest

from moekit.progress import ProgressBar


class Clock:
    """Time that only passes when a test says so."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr("moekit.progress.time.perf_counter", lambda: self.now)

    def bar(self, **settings):
        bar = ProgressBar(desc="train", disable=False, file=io.StringIO(), **settings)
        bar._time = lambda: self.now
        bar.start_t = self.now
        return bar


def program():
    """Something that has compiled for no shape yet."""


def remaining(bar):
    """The estimate of the seconds that are left, or None."""
    found = re.search(r"<(\d+):(\d+)", str(bar))
    return 60 * int(found[1]) + int(found[2]) if found else None


@pytest.mark.parametrize("initial", [0, 40])
def test_the_estimate_leaves_out_compilation_also_after_a_resume(monkeypatch, initial):
    clock = Clock(monkeypatch)
    new = lambda: None  # noqa: E731  a new program each time
    bar = clock.bar(total=100, initial=initial)
    with bar.compiling(new) as compiles:
        assert compiles and "train (compiling): " in bar.fp.getvalue()
        clock.now += 60
    bar.update()
    assert "01:00<?" in str(bar) and "compiling" not in str(bar)
    for _ in range(19):
        with bar.compiling(new) as compiles:
            clock.now += 2
        bar.update()
        assert not compiles
    assert remaining(bar) == 2 * (100 - initial - 20)
    assert "01:38<" in str(bar)  # the time that has passed has everything


def test_every_shape_compiles_once_whichever_bar_shows_it(monkeypatch):
    clock = Clock(monkeypatch)
    compiled = []
    for shape in ((8, 64), (8, 128), (8, 64), (8, 128)):
        with clock.bar(total=1) as bar, bar.compiling(program, shape) as compiles:
            compiled.append(compiles)
    assert compiled == [True, True, False, False]


def test_a_validation_is_no_step(monkeypatch):
    clock = Clock(monkeypatch)
    bar = clock.bar(total=10)
    for _ in range(5):
        clock.now += 3
        bar.update()
    with bar.compiling(clock, "validation", steps=0):
        clock.now += 500
    assert remaining(bar) == 15


def test_bars_are_hidden_in_tests_and_import_without_a_warning():
    with ProgressBar(total=2, desc="hidden") as bar, bar.compiling(bar) as compiles:
        bar.update()
    assert not compiles  # nothing to wait for
    assert bar.disable
    code = "from moekit.progress import ProgressBar; [0 for _ in ProgressBar([1], desc='d')]"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
