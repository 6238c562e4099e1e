"""moekit doctor: what is installed, which devices and data there are; the table of presets."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from moekit.commands.output import AsJson, print_result, table

# packages of the extras, and the extra that installs each
OPTIONAL = {"libtpu": "tpu", "lm-eval": "eval", "torch": "parity", "transformers": "parity"}
PARTS = {
    "niv2/tasks.jsonl.gz": "instruction tasks (niv2)",
    "cot": "chain of thought",
    "dolly": "dialog",
    "mc": "multiple choice",
    "gsm8k": "arithmetic",
    "bbh": "BIG-Bench Hard",
    "mmlu": "MMLU",
}


def doctor(presets: bool = False, json: AsJson = False) -> int:
    """Report versions, devices, the data found and what is missing.

    Args:
      presets: Print the table of presets instead: experts, parameters, FLOPs per token.
    """
    if presets:
        rows = preset_sizes()
        print_result(rows, table([_rounded(row) for row in rows]), json)
    else:
        found = report()
        print_result(found, as_text(found), json)
    return 0


COMMAND = doctor


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose numbers have four digits."""
    return {
        name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()
    }


def installed_version(package: str) -> str | None:
    """The version of an installed package, else None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements() -> list[Requirement]:
    """What pyproject.toml lists as dependencies, without the extras."""
    try:
        lines = importlib.metadata.requires("moekit") or []
    except importlib.metadata.PackageNotFoundError:  # imported from a clone, not installed
        return []
    requirements = [Requirement(line) for line in lines]
    return [each for each in requirements if "extra" not in str(each.marker)]


def _packages() -> tuple[dict[str, str | None], list[str]]:
    """Versions of the packages that moekit uses, and what is missing or too old."""
    requirements = _requirements()
    versions = {"python": platform.python_version(), "moekit": installed_version("moekit")}
    versions |= {each.name: installed_version(each.name) for each in requirements}
    problems = []
    if not requirements:
        problems.append("moekit is not installed: pip install -e .")
    for each in requirements:
        version = versions[each.name]
        if version is None:
            problems.append(f'{each.name}: pip install "{each}"')
        elif not each.specifier.contains(version, prereleases=True):
            problems.append(f'{each.name} is {version}: pip install "{each}"')
    for package, extra in OPTIONAL.items():
        if version := installed_version(package):
            versions[package] = version
        else:
            problems.append(f'{package} (optional): pip install -e ".[{extra}]"')
    return versions, problems


def _data() -> tuple[dict[str, Any], list[str]]:
    """The parts of the data folder that are found, and what is missing."""
    from moekit.data.corpora import TEXT_DOMAINS

    folder = os.environ.get("MOEKIT_DATA")
    parts = PARTS | {f"text/{part}": f"text: {domain}" for part, domain in TEXT_DOMAINS.items()}
    found, problems = ["builtin"], []
    if not folder:
        problems.append("data: MOEKIT_DATA is not set; only the builtin data is available")
    elif not Path(folder).is_dir():
        problems.append(f"data: MOEKIT_DATA is {folder}, which is not a folder")
    else:
        for path, name in parts.items():
            if (Path(folder) / path).exists():
                found.append(name)
            else:
                problems.append(f"data: no {name} in {folder}")
    return {"folder": folder, "found": found}, problems


def report() -> dict[str, Any]:
    """Versions, devices and data of this machine, with what is missing and how to get it."""
    import jax

    from moekit.commands.devices import missing_device

    versions, problems = _packages()
    backend, environment, devices = None, "", []
    no_device = missing_device()
    if no_device:
        problems.append(f"devices: {no_device}")
    else:
        backend = jax.default_backend()
        environment = jax.print_environment_info(return_string=True)
        devices = [f"{device.id}: {device.device_kind}" for device in jax.devices()]
    data, data_problems = _data()
    return {
        "versions": versions,
        "environment": environment,
        "backend": backend,
        "devices": devices,
        "cpus": os.cpu_count(),
        "data": data,
        "missing": problems + data_problems,
    }


def as_text(found: dict[str, Any]) -> str:
    """A report to read; jax's own description of the environment is left out where it is empty."""
    versions = [f"{name:18} {version or 'MISSING'}" for name, version in found["versions"].items()]
    environment = found["environment"].strip().splitlines()
    sections = {"versions": versions}
    if environment or found["backend"] is None:
        sections["environment (jax)"] = environment or ["unknown: jax has no device"]
    sections |= {
        f"devices ({found['backend']}, {found['cpus']} CPU cores)": found["devices"] or ["none"],
        "data": found["data"]["found"],
        "missing": found["missing"] or ["nothing"],
    }
    lines = []
    for title, entries in sections.items():
        lines.append(title)
        lines += [f"  {entry}" for entry in entries]
    return "\n".join(lines)


def preset_sizes() -> list[dict[str, Any]]:
    """Parameters in billions and forward GFLOPs per token of every preset; nothing is allocated."""
    from moekit.presets import PRESETS, preset

    rows = []
    for name in PRESETS:
        cfg = preset(name)
        parameters = cfg.num_parameters()
        encoder_flops, decoder_flops = cfg.flops_per_token()
        rows.append(
            {
                "preset": name,
                "experts": cfg.num_experts,
                "total_billions": parameters.total / 1e9,
                "active_billions": parameters.active / 1e9,
                "encoder_gflops_per_token": encoder_flops / 1e9,
                "decoder_gflops_per_token": decoder_flops / 1e9,
            }
        )
    return rows
