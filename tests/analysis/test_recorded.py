"""Figures of recorded results, also of damaged ones."""

import copy
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from moekit.analysis import plots
from moekit.analysis.recorded import PRETRAINED_MODELS, figures, seed_losses
from moekit.experiment.report import draw_studies

RECORD = Path(__file__).parents[2] / "assets/results/mirror-mini-seed0.json"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn but not written, which takes most of the time."""

    def save(figure: object, path: str | Path) -> Path:
        plt.close(figure)
        return Path(path)

    monkeypatch.setattr(plots, "save_figure", save)


def test_what_is_recorded_is_drawn(undrawn, tmp_path):
    paths = figures(RECORD.parent, tmp_path)
    paths += draw_studies(RECORD.parents[1] / "studies", RECORD.parent, tmp_path)
    committed = {path.name for path in (RECORD.parents[1] / "figures").glob("*.png")}
    assert {path.name for path in paths} == committed


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ((), []),
        ((), "text"),
        (("kind",), ...),
        (("models",), ...),
        (("models",), []),
        (("models",), {"x/../../evil": {}}),
        (("models",), {"..\\evil\n": {}}),
        (("models", "st"), 3),
        (("models", "st", "config"), ...),
        (("models", "st", "pretrain"), [1, 2]),
        (("models", "st", "tune"), ...),
        (("models", "st", "before"), [{}]),
        (("models", "st", "routing_after"), {"load": 3}),
        (("models", "st", "routing_after", "domains", "share"), ...),
        (("models", "st", "routing_after", "domains", "share"), "text"),
        (("unigram_entropy",), "high"),
    ],
)
def test_a_damaged_record_is_named_in_one_line(keys, value, undrawn, tmp_path):
    record = json.loads(RECORD.read_text())
    if not keys:
        record = value
    else:
        inner = record
        for key in keys[:-1]:
            inner = inner[key]
        if value is ...:
            del inner[keys[-1]]
        else:
            inner[keys[-1]] = copy.deepcopy(value)
    path = tmp_path / "results/damaged.json"
    path.parent.mkdir()
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=re.escape(f"{path} is not a record")) as error:
        figures(path.parent, tmp_path / "figures")
    assert "\n" not in str(error.value)
    assert {each.name for each in tmp_path.rglob("*") if each.is_file()} == {"damaged.json"}


def test_text_that_is_no_json(tmp_path):
    (tmp_path / "cut.json").write_text('{"kind": "stu')
    with pytest.raises(ValueError, match=r"cut\.json is not a record"):
        figures(tmp_path, tmp_path)
    (tmp_path / "cut.json").unlink()
    with pytest.raises(FileNotFoundError, match="`moekit study` makes one"):
        figures(tmp_path, tmp_path)


def test_the_changelog_reports_the_recorded_losses():
    """Its numbers are means and standard errors of the recorded seeds."""
    root = RECORD.parents[2]
    changelog = (root / "CHANGELOG.md").read_text()
    record = json.loads((RECORD.parent / "premise-nano-seeds.json").read_text())
    after_short_run = seed_losses(record, step=1332)
    for variant, name in (
        ("dense", "dense"),
        ("switch", "switch"),
        ("nodrop", "switch without dropped tokens"),
        ("top2", "top-2 of half width"),
        ("st", "st"),
    ):
        losses = np.array(after_short_run[PRETRAINED_MODELS[variant]])
        error = losses.std(ddof=1) / np.sqrt(len(losses))
        stated = re.search(rf"([\d.]+) \((?:standard error )?([\d.]+)\) {name}[,.]", changelog)
        assert stated is not None, name
        assert float(stated[1]) == pytest.approx(losses.mean(), abs=5e-4)
        assert float(stated[2]) == pytest.approx(error, abs=5e-4)
    one_expert = np.mean(after_short_run[PRETRAINED_MODELS["one"]])
    assert f"trains to the same loss ({one_expert:.3f})" in changelog
    dense = np.mean(after_short_run[PRETRAINED_MODELS["dense"]])
    wide = np.mean(after_short_run[PRETRAINED_MODELS["wide"]])
    assert f"gains only {dense - wide:.3f} nats" in changelog
