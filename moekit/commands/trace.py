"""moekit trace: which experts a checkpoint routes the tokens of a data set to."""

from pathlib import Path

import moekit as mk
from moekit.analysis.trace import as_prompts
from moekit.commands.data_flags import named_data, own_tasks
from moekit.commands.environment import keep_compiled_programs
from moekit.commands.flags import require_at_least
from moekit.commands.output import AsJson, prepare_file, print_result
from moekit.commands.routers import checkpoint_router
from moekit.data.paths import require_file_name


def trace(
    checkpoint: Path,
    *,
    task: tuple[Path, ...] = (),
    input: str = "",
    target: str = "",
    options: tuple[str, ...] = (),
    mixture: str = "",
    source: str = "local",
    corpus: str = "",
    limit: int = 512,
    out: Path | None = None,
    figures: Path | None = None,
    on_error: str = "stop",
    router: str = "",
    json: AsJson = False,
) -> int:
    """Trace the routing of a checkpoint and print the balance of every MoE layer.

    Of --task, --mixture and --corpus one kind is traced; by default the builtin mixture.

    Args:
      checkpoint: Folder of the model: a checkpoint or a run's workdir.
      task: Files of rows of your own, one task each: .jsonl, .jsonl.gz, .csv, .tsv, .parquet, or a
        folder of them.
      input: Column of the input in these files, or a text with {column} in it; by default a usual
        name, such as question.
      target: Column of the answer in these files; by default a usual name, such as answer.
      options: Column that lists the options in these files, columns with one option each, or the
        labels of all rows.
      mixture: FLAN mixture: builtin, flan2022, flan-t5 or flan-ablation.
      source: Source of the mixture: local (the data folder), hub (ready-made) or hub-raw (raw
        sets of the hub with our templates).
      corpus: Text: builtin, local, parts such as books,speeches, or a file or folder of your own
        (.txt, .md, .jsonl, .csv, .parquet).
      limit: Maximum number of prompts.
      out: Write the trace to this .npz file, which mk.RouterTrace.load reads.
      figures: Write figures of the load and of the specialization by task to this folder.
      on_error: What to do with malformed rows: stop or skip.
      router: The router of a checkpoint that was trained with one of your own, as FILE.py:NAME.
    """
    require_at_least(1, limit=limit)
    keep_compiled_programs()
    named = sum(map(bool, (task, mixture, corpus)))
    if named > 1:
        raise ValueError("--task, --mixture and --corpus are traced one at a time: leave one")
    tasks = own_tasks(task, input, target, options, on_error)
    data = named_data(tasks, mixture, source, "", corpus, on_error)
    prepare_file(out)
    model = mk.load(checkpoint, router=checkpoint_router(router))
    if figures:
        require_file_name(model.cfg.name, "the model's name")
        figures.mkdir(parents=True, exist_ok=True)
    prompts = as_prompts(data, limit)
    found = mk.trace_routing(model, prompts)
    balance = mk.balance_table(found)
    lines = [str(balance)]
    if out:
        found.save(out)
        lines.append(f"trace: {out}")
    if figures:
        name = f"{found.model}-expert-load.png"
        lines.append(f"figure: {mk.save_figure(mk.plot_expert_load(found), figures / name)}")
        if len(set(found.tasks)) > 1:
            name = f"{found.model}-task-specialization.png"
            figure = mk.plot_task_specialization(found)
            lines.append(f"figure: {mk.save_figure(figure, figures / name)}")
    result = {"model": found.model, "prompts": len(prompts), "balance": balance.rows}
    print_result(result, "\n".join(lines), json)
    return 0


COMMAND = trace
