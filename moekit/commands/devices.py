"""The devices that jax finds, and meshes of them."""

import os

import jax
from jax.sharding import Mesh

from moekit.sharding import make_mesh


def device_mesh(axes: dict[str, int]) -> Mesh:
    """A mesh of all devices with these axis sizes; leftover devices go to data."""
    return make_mesh(
        data=axes.get("data"), expert=axes.get("expert", 1), model=axes.get("model", 1)
    )


def missing_device() -> str | None:
    """Why jax has no device and what to do about it, or None where it has one."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion where a plugin is missing
        platforms = os.environ.get("JAX_PLATFORMS", "")
        lines = str(error).splitlines() or ["its plugin is not installed"]
        reason = lines[0].split(" (set JAX_PLATFORMS")[0][:200]
        return (
            f"jax finds no device for JAX_PLATFORMS={platforms!r} ({reason}): unset JAX_PLATFORMS "
            "to use the devices that this machine has, install the plugin "
            '(pip install -e ".[tpu]" or ".[cuda]"), or stop another process that uses the chip'
        )
    return None
