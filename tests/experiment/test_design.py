"""Designs of studies: what a file means, and what is wrong with others."""

from pathlib import Path

import pytest

from moekit.experiment.design import PRETRAINED, read_design

STUDIES = Path(__file__).parents[2] / "assets/studies"


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_design_holds_what_the_file_says(design_file):
    design = read_design(design_file)
    assert (design.title, design.source, design.side_by_side) == ("small", "builtin", 2)
    assert design.held_out.clusters == ("text selection", "matching", "cloze")
    assert design.pretrain.steps == 2
    assert design.pretrain.input_length == design.setups["direct"].training.input_length == 64
    assert design.setups["direct"].training.steps == 1
    # a setup comes after the one that it starts from, whatever the order in the file
    order = list(design.setups)
    assert order.index("tuned") < order.index("tuned-finetuned")
    assert design.models["dense"].setups == tuple(order)
    assert design.models["sparse"].setups == ("direct", "tuned")
    assert design.models["sparse"].config.num_experts == 8
    assert [setup.name for setup in design.chain("tuned-finetuned")] == ["tuned", "tuned-finetuned"]
    assert design.chain(PRETRAINED) == []


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        # number of seeds, comparisons and names are not what a cell's numbers depend on
        ("seeds = 3\nsetups", "seeds = 9\nsetups", set()),
        ("side_by_side = 2", "side_by_side = 1", set()),
        ('title = "small"', 'title = "other"', set()),
        ("[stages.finetune]\nsteps = 1", "[stages.finetune]\nsteps = 3", {"direct"}),
        ("[stages.tune]\nsteps = 2", "[stages.tune]\nsteps = 3", {"tuned"}),
        ("[stages.pretrain]\nsteps = 2", "[stages.pretrain]\nsteps = 3", "all"),
        ("questions = 4", "questions = 5", "all"),
        ("vocab_size = 640", "vocab_size = 768", "all"),
        ('choosing = ["text selection"]', "choosing = []", "all"),
        ('final = ["cloze"]', 'final = ["cloze", "state tracking"]', "all"),
        ('preset = "switch-nano"', 'preset = "gshard-nano"', "all"),
    ],
)
def test_the_digest_of_a_cell_changes_with_what_its_numbers_depend_on(
    old, new, changed, design_file
):
    setups = {PRETRAINED, "direct", "tuned"}
    before = {name: read_design(design_file).digest("sparse", name) for name in setups}
    change(design_file, old, new)
    after = {name: read_design(design_file).digest("sparse", name) for name in setups}
    differing = {name for name in setups if before[name] != after[name]}
    assert differing == (setups if changed == "all" else changed)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "small"', "title = [", "Invalid value"),
        ('title = "small"', "", "the file has no title"),
        ('title = "small"', 'title = "../x"', "the study's title '../x'"),
        ('title = "small"', 'title = "x"\nsource = "hub"', "unknown source 'hub'"),
        ("vocab_size = 640", "smallest_effect = 0", "smallest_effect is 0: use a number above 0"),
        ("vocab_size = 640", "vocabsize = 640", "did you mean 'vocab_size'"),
        ("vocab_size = 640", 'vocab_size = "640"', "vocab_size is '640'"),
        ("[stages.pretrain]\nsteps = 2", "", "stages has no pretrain"),
        ("[stages.tune]\nsteps = 2", "[stages.tune]\nstep = 2", "did you mean 'steps'"),
        ("[stages.tune]\nsteps = 2", "[stages.tune]\nsteps = 0", "steps is 0"),
        ("[stages.tune]\nsteps = 2", '[stages.tune]\nsteps = "2"', "steps"),
        ("[stages.tune]\nsteps = 2", "[stages.tune]\nseed = 2", "sets the seed of every cell"),
        ('stage = "tune"', 'stage = "tuning"', "did you mean 'tune'"),
        ('after = "tuned"', 'after = "tune"', "did you mean 'tuned'"),
        ('after = "tuned"', 'after = "direct"', "start from a setup of the stage tune"),
        ('stage = "tune"', 'stage = "tune"\nafter = "tuned"', "in a circle"),
        ('stage = "tune"', 'stage = "tune"\ntasks = ["owned"]', "only finetuning has it"),
        ("[setups.tuned]", "[setups.pretrained]\nstage = 'tune'\n[setups.tuned]", "leave it out"),
        ('preset = "t5-nano"', 'preset = "t5-nono"', "did you mean 't5-nano'"),
        ("d_ff = 16, encoder", "dff = 16, encoder", "did you mean 'd_ff'"),
        ('setups = ["direct", "tuned"]', 'setups = ["tuned-finetuned"]', "add tuned to setups"),
        ('setups = ["direct", "tuned"]', 'setups = "direct"', "write a list of names"),
        ("seeds = 3", "seeds = 0", "seeds is 0"),
        ('reporting = ["matching"]', 'reporting = ["cloze"]', "cloze is in more than one set"),
        ('sparse = "sparse"', 'sparse = "spars"', "did you mean 'sparse'"),
        ("[models.dense]", "[models.'a/b']", "'a/b'"),
    ],
)
def test_a_mistake_is_named_with_the_file(old, new, message, design_file):
    change(design_file, old, new)
    with pytest.raises(ValueError) as caught:
        read_design(design_file)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(design_file))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_design(tmp_path / "none.toml")


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_designs_of_the_kit_can_be_run(path):
    design = read_design(path)
    assert design.title == path.stem
    for pair in design.comparisons:
        sparse, dense = (design.models[name].config for name in (pair.sparse, pair.dense))
        assert sparse.num_experts and not dense.num_experts
        if "total" in pair.dense:
            totals = [config.num_parameters().total for config in (sparse, dense)]
            assert totals[0] == pytest.approx(totals[1], rel=0.1)
        else:
            assert sparse.flops_per_token() == dense.flops_per_token()


def test_a_pilot_has_the_settings_of_its_study_and_other_seeds():
    study, pilot = (read_design(STUDIES / f"{name}.toml") for name in ("nano", "nano-pilot"))
    assert pilot.comparisons[0] == study.comparisons[0]
    for model in ("t5", "st"):
        assert not set(pilot.seeds(model)).intersection(study.seeds(model))
        for setup in (PRETRAINED, "tuned"):
            assert pilot.digest(model, setup) == study.digest(model, setup)
