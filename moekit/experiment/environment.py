"""What a recorded result depends on besides data and configuration."""

import platform

import jax

from moekit.training.run_folder import git_commit


def environment() -> dict[str, str]:
    """Devices, versions and the commit of the code."""
    device = jax.devices()[0]
    return {
        "device": f"{jax.device_count()} x {device.device_kind}",
        "platform": device.platform,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "commit": git_commit() or "unknown",
    }
