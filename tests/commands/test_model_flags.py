"""--set and --router: values of every field, and routers of a Python file."""

import dataclasses
import json

import pytest

import moekit as mk
from moekit.commands.model_flags import model_config, read_settings
from moekit.commands.routers import checkpoint_router, find_router
from moekit.moe.routing import GShard, TopK


def test_settings_of_every_field_are_read_back():
    cfg = mk.preset("st-nano").replace(
        expert_d_ff=48, extra_d_ff=None, tied_logits=True, capacity_factor=2.5
    )
    settings = []
    for field in dataclasses.fields(cfg):
        if field.name not in ("router", "decoder_router", "generation"):
            settings.append(f"{field.name}={getattr(cfg, field.name)}")
    changes = read_settings(settings)
    assert len(changes) == len(dataclasses.fields(cfg)) - 3
    with pytest.raises(ValueError, match=r"in Python, with cfg\.replace"):
        read_settings(["generation=x"])
    for name, value in changes.items():
        assert value == getattr(cfg, name) and type(value) is type(getattr(cfg, name)), name


def test_a_preset_is_changed_as_in_python():
    found = model_config("st-nano", ["num_experts=16", "capacity_factor=2"], "top2")
    wanted = mk.preset("st-nano").replace(num_experts=16, capacity_factor=2.0, router="top2")
    assert found == wanted
    assert model_config("st-nano", ["router=top2"]).router == TopK(k=2)
    assert model_config("st-nano", ["decoder_router=none"]).decoder_router is None
    with pytest.raises(ValueError, match=r"GShard\(priority"):
        model_config("st-nano", ["decoder_router=gshard"])
    assert model_config("st-nano", ["allow_future_leak=true", "router=gshard"]).router == GShard()


def test_routers_of_a_file(router_file, tmp_path):
    noisy = find_router(f"{router_file}:noisy")
    assert noisy.__name__ == "noisy" and noisy.causal
    assert find_router(f"{router_file}:Sharp").scale == 2
    assert find_router(f"{router_file}:sharper").scale == 4
    assert checkpoint_router("") is None
    for text, message in [
        (f"{router_file}:nosy", "unknown router of .*my_router.py 'nosy': did you mean 'noisy'"),
        (f"{router_file}:nosy", "known: Sharp, noisy, sharper$"),
        (str(router_file), "known: Sharp, noisy, sharper$"),
        (f"{router_file}:broken", "router broken .*the layer calls router"),
        (f"{router_file}:NoDefault", "NoDefault cannot be made without arguments"),
    ]:
        with pytest.raises(ValueError, match=message):
            find_router(text)
    (tmp_path / "raises.py").write_text("import jax\n1 / 0\n")
    with pytest.raises(ValueError, match=r"raises\.py raises ZeroDivisionError: division by zero"):
        find_router(f"{tmp_path}/raises.py:noisy")
    (tmp_path / "typo.py").write_text("def noisy(:\n")
    with pytest.raises(ValueError, match=r"typo\.py raises SyntaxError"):
        find_router(f"{tmp_path}/typo.py:noisy")
    (tmp_path / "empty.py").write_text("import jax\n")
    with pytest.raises(ValueError, match=r"empty\.py has no router: define a function"):
        find_router(f"{tmp_path}/empty.py:noisy")


@pytest.mark.parametrize("name", ["noisy", "Sharp", "sharper"])
def test_a_configuration_names_a_router_of_its_own(name, router_file):
    router = find_router(f"{router_file}:{name}")
    cfg = mk.preset("st-nano").replace(router=router)
    stored = json.loads(json.dumps(cfg.to_dict()))
    with pytest.raises(ValueError, match=r"with a router of its author.*--router FILE\.py"):
        mk.ModelConfig.from_dict(stored)
    assert mk.ModelConfig.from_dict(stored, router) == cfg
    with pytest.raises(ValueError, match=r"router of its author.*not \{'router': 'TopK'"):
        mk.ModelConfig.from_dict(stored, TopK(k=2))


def test_objects_of_plain_classes_have_the_same_name_in_every_process():
    class Plain:
        causal = True

        def __call__(self, logits, mask, **settings):
            return TopK(k=1)(logits, mask, **settings)

    first, second = (mk.preset("st-nano").replace(router=Plain()) for _ in range(2))
    assert first.to_dict() == second.to_dict()
    assert first.to_dict()["router"] == {"router": "Plain"}
