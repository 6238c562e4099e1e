"""Which warnings end the execution of a notebook."""

import subprocess
import sys

import pytest

from moekit.commands.tour import WARNINGS_ARE_ERRORS

WARN = """
warnings.warn_explicit("m", {category}, "file.py", 1, module="{module}")
"""


@pytest.mark.parametrize(
    ("category", "module", "ends"),
    [
        ("UserWarning", "__main__", True),
        ("DeprecationWarning", "__main__", True),
        ("DeprecationWarning", "moekit.moe.layer", True),
        ("UserWarning", "matplotlib.axes", True),  # of how we call it
        ("DeprecationWarning", "matplotlib._fontconfig_pattern", False),
        ("DeprecationWarning", "jupyter_client.session", False),
        ("ResourceWarning", "ipykernel.iostream", False),
    ],
)
def test_warnings_of_notebooks_and_moekit_are_errors(category, module, ends):
    code = WARNINGS_ARE_ERRORS + WARN.format(category=category, module=module)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode != 0) == ends, done.stderr
