"""Plans: FLOPs by formula against compiled programs, collectives and their axes, a real plan."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import moekit as mk
from moekit.model.counting import step_flops
from moekit.planning.chips import CHIPS
from moekit.planning.compile_step import compile_in_child, time_advice
from moekit.planning.hlo_program import first_replica_group
from moekit.planning.program_cost import Cost, crossed_axes, program_cost
from moekit.planning.request import PlanRequest
from moekit.planning.sweep import mesh_requests, ranking, sweep
from moekit.training.step import abstract_batch, compiled_step

RECORDED = Path(__file__).parents[2] / "assets/plans"
SHALLOW = mk.preset("st-nano").replace(encoder_layers=1, decoder_layers=1)
LENGTHS = {"batch": 8, "input_length": 128, "target_length": 64}


def compiled(request, mesh):
    model = nnx.eval_shape(lambda: mk.EncoderDecoder(request.cfg, mesh=mesh))
    step = compiled_step(model, request.train)
    batch = abstract_batch(request.train, mesh)
    lowered = step.update.lower(step.state, batch)
    text = lowered.compile().as_text()
    return program_cost(text, mesh, CHIPS["v5p"], lambda *_: 0.0)


def one_device():
    devices = np.array(jax.devices()[:1]).reshape(1, 1, 1)
    return jax.sharding.Mesh(devices, ("data", "expert", "model"))


@pytest.mark.parametrize(
    "name, remat",
    [
        ("t5-nano", "none"),
        ("ec-nano", "full"),
        ("st-nano", "full"),
        ("switch-nano", "none"),
    ],
)
def test_flops_by_formula_equal_those_of_the_compiler(name, remat):
    # heads narrower than the model, as the large presets have; one block in each stack
    cfg = mk.preset(name).replace(d_model=96, num_heads=3, head_dim=16, d_ff=160)
    cfg = cfg.replace(encoder_layers=1, decoder_layers=1)
    request = PlanRequest(cfg, "v5p:1x1x1", remat=remat, **LENGTHS)
    expected = step_flops(request.cfg, *LENGTHS.values(), remat=remat)
    assert compiled(request, one_device()).flops == pytest.approx(expected, rel=0.05)


def test_collectives_of_a_step_are_those_of_the_layer_and_the_weights():
    mesh = mk.make_mesh(data=2, expert=4)
    request = PlanRequest(SHALLOW, "v5e:2x4", {"data": 2, "expert": 4}, **LENGTHS)
    cost = compiled(request, mesh)
    counts = {key: traffic.count for key, traffic in cost.collectives.items()}
    # two stacks of one MoE layer: two exchanges forward, two again for remat (the gradient of a
    # combine weight needs what came back), two backward
    assert counts["all-to-all", "expert"] == 6 * 2
    assert counts["all-gather", "expert"] > 0 and counts["reduce-scatter", "expert"] > 0
    slots, width, n = 8 * 10, 64, 4  # 8 experts of 10 slots for a device's 128 encoder tokens
    per_exchange = 4 * width * (n - 1) / n
    sent = cost.collectives["all-to-all", "expert"].nbytes
    assert sent % per_exchange == 0 and sent >= 4 * slots * per_exchange


@pytest.mark.parametrize(
    "attributes, axis",
    [
        ("replica_groups=mesh['data'=2,'expert'=4,'model'=1] {'expert'},", "expert"),
        ("replica_groups=mesh['data'=2,'expert'=4,'model'=1] {'data','expert'},", "data+expert"),
        ("replica_groups=[2,4]<=[8], dimensions={0}", "expert"),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", "data"),
        ("replica_groups={{0,1,2,3},{4,5,6,7}},", "expert"),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}},", "data"),
        ("source_target_pairs={{0,4},{4,0}}", "data"),
        ("replica_groups={{0},{1},{2},{3}},", "none"),
    ],
)
def test_the_axes_of_a_collective(attributes, axis):
    mesh = mk.make_mesh(data=2, expert=4)
    assert crossed_axes(first_replica_group(attributes, 8), mesh) == axis


def test_loops_count_as_often_as_they_run():
    def loop(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    x, w = np.ones((8, 16), np.float32), np.ones((5, 16, 16), np.float32)
    text = jax.jit(loop).lower(x, w).compile().as_text()
    cost = program_cost(text, one_device(), CHIPS["v4"], lambda *_: 0.0)
    assert cost.flops == 5 * 2 * 8 * 16 * 16


def test_a_gather_beside_products_counts_once_each_time_it_starts():
    """The TPU compiler writes it into its start, into products and into its end."""
    fusions = {
        "start": ', custom_call_target="AsyncCollectiveStart"',
        "product": "",
        "end": ', custom_call_target="AsyncCollectiveDone"',
    }
    gather = "all-gather(%p), channel_id=7, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}"
    text = "".join(
        f"%{name} (p: f32[2]) -> f32[8] {{\n  %p = f32[2]{{0}} parameter(0)\n"
        f"  %g = f32[8]{{0}} {gather}\n  ROOT %r = f32[8]{{0}} custom-call(%g){target}\n}}\n\n"
        for name, target in fusions.items()
    )
    text += "ENTRY %main (x: f32[2]) -> f32[8] {\n  %x = f32[2]{0} parameter(0)\n"
    for i, name in enumerate(("start", "product", "product", "end", "start", "end")):
        text += f"  %f{i} = f32[8]{{0}} fusion(%x), kind=kCustom, calls=%{name}\n"
    mesh = mk.make_mesh(data=1, expert=4, model=2)
    cost = program_cost(text + "}\n", mesh, CHIPS["v5e"], lambda *_: 1.0)
    (traffic,) = cost.collectives.values()
    assert (traffic.count, traffic.nbytes) == (2, 2 * 32 * 3 / 4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"topology": "v5q:2x4"}, "unknown chip 'v5q': did you mean"),
        ({"topology": "v5p:2x4"}, "write chip:slice, for v5p one of 2x2x1"),
        ({"topology": "v5e"}, "write chip:slice"),
        ({"mesh": {"expert": 3}}, "does not fill the 8 chips"),
        ({"mesh": {"experts": 8}}, "unknown mesh axis 'experts'"),
        ({"batch": 12}, "use a multiple of 8"),
        ({"remat": "all"}, "unknown remat"),
    ],
)
def test_requests_that_cannot_be_planned(change, message):
    fields = {"topology": "v5e:2x4", "mesh": {"expert": 8}, "batch": 64} | change
    with pytest.raises(ValueError, match=message):
        PlanRequest(mk.preset("st-nano"), **fields)


def test_a_sweep_needs_a_slice_that_divides_the_batch():
    with pytest.raises(ValueError, match="use a multiple of 8"):
        sweep(mk.preset("st-nano"), "v5e:2x4", batch=3, input_length=64, target_length=32)


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.json")), ids=lambda p: p.stem)
def test_a_recorded_plan_loads_and_belongs_to_its_preset(path):
    plan = mk.Plan.load(path)
    assert plan.to_dict() == json.loads(path.read_text())
    assert plan.parameters == mk.preset(plan.preset).num_parameters().total
    assert plan.fits == (plan.hbm_gib_per_chip["total"] <= plan.hbm_limit_gib)
    assert plan.topology in str(plan)


def test_a_plan_recorded_under_the_former_names_loads():
    plan = mk.Plan.load(RECORDED / "st-base-v5e-2x4.json")
    former = plan.to_dict()
    former_names = {"matmuls": "products", "memory": "memory", "interconnect": "links"}
    former["waits_for"] = former_names[former.pop("bottleneck")]
    former["split_seconds"] = {former_names[k]: v for k, v in plan.split_seconds.items()}
    assert mk.Plan.from_dict(former) == plan


@pytest.mark.parametrize("path", sorted(RECORDED.glob("sweeps/*.json")), ids=lambda p: p.stem)
def test_a_recorded_sweep_ranks_what_a_sweep_tries(path):
    plans = [mk.Plan.from_dict(values) for values in json.loads(path.read_text())]
    first = plans[0]
    fields = ("batch", "input_length", "target_length", "optimizer", "remat")
    rest = {name: getattr(first, name) for name in fields}
    tried = mesh_requests(PlanRequest(mk.preset(first.preset), first.topology, {}, **rest))
    rows = lambda things, of: sorted((sorted(of(t).items()), t.remat) for t in things)  # noqa: E731
    assert rows(plans, lambda p: p.mesh) == rows(tried, lambda r: r.axes)
    fitting = [p.mfu[1] for p in plans if p.fits]
    assert fitting == sorted(fitting, reverse=True) and all(p.fits for p in plans[: len(fitting)])
    assert len(ranking(plans).splitlines()) == 1 + len(plans)


@pytest.mark.parametrize(
    "name, mesh, advised",
    [("switch-base", {}, True), ("switch-base", {"expert": 8}, False), ("t5-base", {}, False)],
)
def test_experts_belong_on_an_axis_of_their_own(name, mesh, advised):
    request = PlanRequest(mk.preset(name), "v5e:2x4", mesh)
    advice = time_advice(request, Cost(), "matmuls")
    assert ("mesh expert=8: now every chip gathers" in " ".join(advice)) == advised


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_a_plan_for_a_slice():
    request = PlanRequest(SHALLOW, "v5e:2x2", {"expert": 4}, 8, 64, 32)
    plan = compile_in_child(request)
    found = json.loads(json.dumps(plan.to_dict()))
    memory = found["hbm_gib_per_chip"]
    assert found["fits"] and 0 < memory["total"] < found["hbm_limit_gib"] == 16
    parts = sum(v for k, v in memory.items() if k != "total")
    assert memory["total"] == pytest.approx(parts, abs=0.01)
    assert 0 < found["step_seconds"][0] <= found["step_seconds"][1]
    assert 0 < found["mfu"][0] <= found["mfu"][1] < 1
    assert found["flops"]["compiled"] == pytest.approx(found["flops"]["analytic"], rel=0.05)
    assert {"op", "axis", "count", "bytes"} <= set(found["collectives"][0])
    assert {c["op"] for c in found["collectives"]} >= {"all-to-all", "all-gather"}
    assert found["compile_seconds"] > 0 and found["host_gib"] > 0
    assert "v5e:2x2" in str(plan) and "st-nano" not in ranking([plan])
    assert len(plan.plot().axes) == 3
    with pytest.raises(ValueError, match="no slice v5e:3x5"):
        compile_in_child(PlanRequest(mk.preset("t5-nano"), "v5e:3x5", {}, 15, 64, 32))


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_a_plan_that_does_not_fit_is_a_plan_too():
    """A sweep goes on to larger slices from it."""
    request = PlanRequest(SHALLOW, "v5e:2x2", {"expert": 4}, 16384, 2048, 128, remat="none")
    plan = compile_in_child(request)
    assert not plan.fits and plan.bottleneck == "memory"
    assert set(plan.hbm_gib_per_chip) == {"total"}
    assert plan.hbm_gib_per_chip["total"] > plan.hbm_limit_gib == 16
    assert plan.step_seconds is None and "use remat full" in " ".join(plan.advice)
    assert "does not fit" in str(plan)
    assert len(plan.plot().axes) == 3
