"""What is installed, which devices there are, what data is found; the table of presets."""

import importlib.metadata
import os
import platform
from pathlib import Path

from moekit.config import PRESETS, preset
from moekit.data.sources import TEXT_DOMAINS

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "datasets", "sentencepiece",
    "tyro", "matplotlib", "jaxtyping", "rouge-score",
)  # fmt: skip
OPTIONAL = {"libtpu": "tpu", "lm-eval": "eval", "torch": "parity", "transformers": "parity"}
PARTS = {
    "niv2/tasks.jsonl.gz": "instruction tasks (niv2)",
    "cot": "chain of thought",
    "dolly": "dialog",
    "mc": "multiple choice",
    "gsm8k": "arithmetic",
    "bbh": "BIG-Bench Hard",
    "mmlu": "MMLU",
} | {f"text/{folder}": f"text: {domain}" for folder, domain in TEXT_DOMAINS.items()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def report() -> dict:
    """Versions, devices and data of this machine, with what is missing and how to get it."""
    import jax

    versions = {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES}
    missing = [f"{p}: pip install {p}" for p, version in versions.items() if version is None]
    extras = {p: _version(p) for p in OPTIONAL}
    missing += [
        f'{p} (optional): pip install -e ".[{OPTIONAL[p]}]"' for p, v in extras.items() if not v
    ]
    folder = os.environ.get("MOEKIT_DATA")
    found, absent = [], []
    if folder and Path(folder).is_dir():
        for path, what in PARTS.items():
            (found if (Path(folder) / path).exists() else absent).append(what)
        missing += [f"data: no {what} in {folder}" for what in absent]
    else:
        missing.append(
            f"data: MOEKIT_DATA {'is ' + folder + ', no such folder' if folder else 'is not set'}; "
            "only the builtin data is available"
        )
    devices = [f"{d.id}: {d.device_kind}" for d in jax.devices()]
    return {
        "versions": versions | {p: v for p, v in extras.items() if v},
        "backend": jax.default_backend(),
        "devices": devices,
        "cpus": os.cpu_count(),
        "data": {"folder": folder, "found": ["builtin", *found]},
        "missing": missing,
    }


def as_text(found: dict) -> str:
    """A report to read."""
    lines = ["versions"]
    lines += [f"  {name:18} {version or 'MISSING'}" for name, version in found["versions"].items()]
    lines += [f"devices ({found['backend']}, {found['cpus']} CPU cores)"]
    lines += [f"  {device}" for device in found["devices"]]
    lines += ["data", *(f"  {part}" for part in found["data"]["found"])]
    lines += ["missing", *(f"  {what}" for what in found["missing"] or ["nothing"])]
    return "\n".join(lines)


def presets() -> list[dict]:
    """Parameters in billions and forward GFLOPs per token of every preset; nothing is allocated."""
    rows = []
    for name in PRESETS:
        cfg = preset(name)
        parameters, (encoder, decoder) = cfg.num_parameters(), cfg.flops_per_token()
        rows.append(
            {
                "preset": name,
                "experts": cfg.num_experts,
                "total_billions": parameters.total / 1e9,
                "active_billions": parameters.active / 1e9,
                "encoder_gflops_per_token": encoder / 1e9,
                "decoder_gflops_per_token": decoder / 1e9,
            }
        )
    return rows
