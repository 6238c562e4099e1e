"""moekit study: the whole experiment, dense against sparse."""

from typing import Annotated

import tyro

from moekit.commands.environment import keep_compiled_programs, keep_freed_memory
from moekit.commands.flags import require_seed
from moekit.commands.output import AsJson, print_result
from moekit.studies import StudyConfig, study as run_study, summary

DEFAULTS = StudyConfig()


def study(
    config: Annotated[StudyConfig, tyro.conf.arg(name="")] = DEFAULTS, json: AsJson = False
) -> int:
    """Run the whole experiment, dense against sparse, and record it as one JSON with its figures.

    The same command resumes a study that was interrupted.
    """
    require_seed(config.seed)
    keep_freed_memory()
    keep_compiled_programs()
    results = run_study(config)
    paths = {"path": results["path"], "figures": results["figures"]}
    print_result(paths, summary(results), json)
    return 0


COMMAND = study
