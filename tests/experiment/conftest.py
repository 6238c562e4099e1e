"""A small design, as a file that a test may change."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def design_file(tmp_path: Path) -> Path:
    return Path(shutil.copy(Path(__file__).with_name("small.toml"), tmp_path / "small.toml"))
