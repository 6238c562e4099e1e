import jax
import pytest
from jax.sharding import PartitionSpec as P

import moekit as mk
from moekit.sharding import Sharding, check_mesh


def test_leftover_devices_go_to_data():
    assert dict(mk.make_mesh(expert=2).shape) == {"data": 4, "expert": 2, "model": 1}
    assert dict(mk.make_mesh(data=2, expert=2, model=2).shape) == dict.fromkeys(
        ("data", "expert", "model"), 2
    )
    assert jax.device_count() == 8


@pytest.mark.parametrize("sizes", [{"expert": 3}, {"data": 2, "expert": 2}, {"expert": 16}])
def test_a_mesh_that_does_not_fill_the_devices(sizes):
    with pytest.raises(ValueError, match=r"does not fill 8 cpu device.*1, 2, 4, 8"):
        mk.make_mesh(**sizes)


def test_no_empty_axis():
    with pytest.raises(ValueError, match="expert=0"):
        mk.make_mesh(expert=0)


def test_experts_must_divide():
    mesh = mk.make_mesh(expert=8)
    with pytest.raises(ValueError, match=r"12 experts.*n in \[1, 2, 3, 4, 6, 12\]"):
        check_mesh(mesh, "mine", experts=12)
    with pytest.raises(ValueError, match="st-nano has 12 experts"):
        mk.EncoderDecoder(mk.preset("st-nano").replace(num_experts=12), mesh=mesh)
    check_mesh(mesh, "a dense model", experts=0)


def test_specs_use_every_mesh_axis_once_and_only_where_it_divides():
    mesh = mk.make_mesh(data=2, expert=2, model=2)
    spec = Sharding().spec
    axes = ("layers", "expert", "embed", "mlp")
    assert spec((2, 8, 64, 128), axes, mesh) == P(None, ("expert",), ("data",), ("model",))
    assert spec((64, 128), ("embed", "mlp"), mesh) == P(("expert", "data"), ("model",))
    assert spec((63, 128), ("embed", "mlp"), mesh) == P(None, ("model",))
    assert spec((64,), (None,), mesh) == P(None)


def test_the_picture_of_placement_names_the_devices_of_every_part():
    model = mk.EncoderDecoder(mk.preset("st-nano"), mesh=mk.make_mesh(data=2, expert=2, model=2))
    layer = model.encoder.blocks[-1]
    weights = {"experts": layer.moe.experts.wi_edf, "norm": layer.ffn_norm.scale_d}
    fig = mk.plot_sharding(weights)
    experts, norm = ({text.get_text() for text in ax.texts} for ax in fig.axes[:2])
    assert experts == set("01234567") and norm == {"0, 1, 2, 3, 4, 5, 6, 7"}
    assert fig.axes[0].get_ylabel() == "expert, 8 in 2 parts"
