"""The settings of the stages, and their folders."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from moekit import studies
from moekit.config import ModelConfig, TrainConfig
from moekit.presets import preset
from moekit.studies import StudyConfig, StudySetup
from moekit.training.loop import Run
from moekit.training.metrics import Metrics


def test_study_settings_are_checked():
    with pytest.raises(ValueError, match="did you mean 'local'"):
        StudyConfig(source="locale")
    assert StudyConfig(source="mirror") == StudyConfig(source="local")
    with pytest.raises(ValueError, match="unknown size 'large'"):
        StudyConfig(size="large")


class SmallSetup(StudySetup):
    """A setup without data, with models that take no time."""

    def __init__(self, config: StudyConfig):
        self.config = config
        self.corpus = self.mixture = None
        self.tokenizer_path = config.workdir / "tokenizer.model"

    def model_config(self, family: str) -> ModelConfig:
        return preset(f"{family}-{self.config.size}").replace(
            d_model=8,
            d_ff=8,
            num_heads=1,
            head_dim=8,
            encoder_layers=1,
            decoder_layers=1,
            vocab_size=16,
            tokenizer=str(self.tokenizer_path),
        )


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces training by nothing; the folders of the stages that were called."""
    folders = []

    def train(model: object, source: object, config: TrainConfig, **settings: Any) -> Run:
        folders.append(settings["workdir"])
        return Mock(spec=Run, model=model, metrics=Metrics(rows=[]), config=config)

    monkeypatch.setattr(studies, "pretrain", train)
    monkeypatch.setattr(studies, "instruction_tune", train)
    monkeypatch.setattr(studies, "_with_validation", lambda mixture: mixture)
    return folders


@pytest.mark.parametrize(("size", "dropout"), [("nano", (0.0, 0.0)), ("mini", (0.05, 0.2))])
def test_dropout_belongs_to_the_instruction_stage_alone(size, dropout, stages, tmp_path):
    setup = SmallSetup(StudyConfig(size=size, seed=3, workdir=tmp_path))
    pretrained = setup.pretrain("t5")
    tuned = setup.tune(pretrained.model)
    cfg, tuned_cfg = pretrained.model.cfg, tuned.model.cfg
    assert (cfg.dropout, cfg.expert_dropout) == (0.0, 0.0)
    assert (tuned_cfg.dropout, tuned_cfg.expert_dropout) == dropout
    assert tuned_cfg.replace(dropout=0.0, expert_dropout=0.0) == cfg
    assert pretrained.config == setup.stage(studies.PRETRAIN, setup.config.pretrain_steps)
    base = studies.NANO_TUNE if size == "nano" else studies.TUNE
    assert tuned.config == setup.stage(base, setup.config.tune_steps)
    assert pretrained.config.seed == tuned.config.seed == 3


def test_a_stage_has_a_folder_of_its_own_for_each_model_and_seed(stages, tmp_path):
    small = StudyConfig(workdir=tmp_path)
    for config in (small, replace(small, seed=1)):
        setup = SmallSetup(config)
        for name in ("t5-nano", "wide"):
            setup.tune(setup.pretrain("t5", name=name).model)
    assert len(set(stages)) == len(stages) == 8
    assert stages[:2] == [tmp_path / "t5-nano-seed0/pretrain", tmp_path / "t5-nano-seed0/tune"]
    # other settings of the study do not change the folder: train refuses to resume with them
    setup = SmallSetup(replace(small, batch_tokens=5120, pretrain_steps=7))
    setup.pretrain("t5")
    assert stages[-1] == stages[0]
