"""moekit eval: a checkpoint on suites, or on tasks of the lm-evaluation-harness."""

import json as json_format
from pathlib import Path
from typing import Any

from moekit.commands.environment import keep_compiled_programs
from moekit.commands.flags import names, one_or_several, require_at_least, require_seed
from moekit.commands.output import AsJson, prepare_file, print_result
from moekit.commands.routers import checkpoint_router


def evaluate(
    checkpoint: Path,
    *,
    suite: str = "builtin",
    input: str = "",
    target: str = "",
    option_columns: tuple[str, ...] = (),
    harness: str = "",
    shots: int | None = None,
    chain_of_thought: bool | None = None,
    options: bool | None = None,
    limit: int | None = None,
    seed: int = 0,
    out: Path | None = None,
    router: str = "",
    json: AsJson = False,
) -> int:
    """Evaluate a checkpoint on suites, each prompted as its benchmark is, and average them.

    Args:
      checkpoint: Folder of the model: a checkpoint or a run's workdir.
      suite: Names separated by commas (mmlu, mmlu-cot, bbh, reasoning, niv2/task..), or paper;
        files of your own rows such as my.jsonl, too.
      input: Column of the input in files of your own, or a text with {column} in it; by default a
        usual name, such as question.
      target: Column of the answer in files of your own; by default a usual name, such as answer.
      option_columns: Column that lists the options in files of your own, columns with one option
        each, or the labels of all rows.
      harness: Run these tasks of the lm-evaluation-harness instead.
      shots: Exemplars in each prompt; by default the suite's own number.
      chain_of_thought: Whether prompts ask for reasoning first; by default as the suite does.
      options: Whether prompts show a question's options; by default as the suite does.
      limit: Maximum number of questions per task.
      seed: Seed of the choice of questions and exemplars.
      out: Write the record to this JSON file; `moekit figures` draws the records of its folder.
      router: The router of a checkpoint that was trained with one of your own, as FILE.py:NAME.
    """
    import moekit as mk

    require_at_least(0, shots=shots)
    require_at_least(1, limit=limit)
    require_seed(seed)
    prepare_file(out)
    keep_compiled_programs()
    if harness:
        result, text = _run_harness(checkpoint, router, harness, shots, limit)
    else:
        suites = mk.suites(
            suite,
            input=input or None,
            target=target or None,
            options=one_or_several(option_columns),
        )
        model = mk.load(checkpoint, router=checkpoint_router(router))
        results = []
        for each in suites:
            scores = mk.evaluate(
                model,
                each,
                shots=shots,
                chain_of_thought=chain_of_thought,
                options=options,
                limit=limit,
                seed=seed,
            )
            results.append(scores)
        result = mk.report(results)
        tables = [scores.table() for scores in results]
        text = "\n\n".join([*tables, str(mk.normalised_average(results))])
    if out:
        out.write_text(json_format.dumps(result, indent=1, default=str) + "\n")
    print_result(result, text, json)
    return 0


COMMAND = evaluate


def _run_harness(
    checkpoint: Path, router: str, tasks: str, shots: int | None, limit: int | None
) -> tuple[dict[str, Any], str]:
    """Results of tasks of the lm-evaluation-harness, and its own table of them."""
    import moekit as mk
    from moekit.evaluation.lm_harness import harness, make_table

    model = mk.load(checkpoint, router=checkpoint_router(router))
    found = harness(model, list(names(tasks)), shots=shots, limit=limit, log_samples=False)
    kept = ("results", "n-shot", "n-samples", "versions")
    return {name: found[name] for name in kept}, make_table(found)
