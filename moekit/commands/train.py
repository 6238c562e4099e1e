"""moekit train: a preset or a checkpoint, on a mixture, a corpus or files of one's own."""

from pathlib import Path
from typing import Annotated

import tyro

import moekit as mk
from moekit.commands.data_flags import named_data, own_tasks
from moekit.commands.environment import keep_compiled_programs, keep_freed_memory
from moekit.commands.flags import mesh_axes, require_seed
from moekit.commands.model_flags import SetFlag, model_config, read_settings
from moekit.commands.output import AsJson, print_result
from moekit.commands.routers import checkpoint_router, is_file_router
from moekit.train_config import TrainConfig

DEFAULTS = TrainConfig(steps=100, batch_tokens=8192)


def train(
    workdir: Path,
    *,
    preset: str = "st-nano",
    task: tuple[Path, ...] = (),
    input: str = "",
    target: str = "",
    options: tuple[str, ...] = (),
    mixture: str = "",
    source: str = "local",
    hold_out: str = "",
    corpus: str = "",
    checkpoint: Path | None = None,
    settings: SetFlag = (),
    router: str = "",
    tokenizer: str = "",
    on_error: str = "stop",
    mesh: str = "",
    coordinator: str = "",
    processes: int | None = None,
    process_id: int | None = None,
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = DEFAULTS,
    json: AsJson = False,
) -> int:
    """Train a preset or a checkpoint on a mixture, a corpus or files of your own.

    The same command resumes a run that was interrupted. Of --task, --mixture and --corpus, those
    that are given have equal shares of the examples.

    Args:
      workdir: Folder for metrics and checkpoints; a run that it holds is resumed.
      preset: Model to train, one of `moekit doctor --presets`.
      task: Files or folders of your own rows: .jsonl, .jsonl.gz, .json, .csv, .tsv or .parquet.
      input: Column of the input in these files, or a text with {column} in it; by default a usual
        name, such as question.
      target: Column of the answer in these files; by default a usual name, such as answer.
      options: Column that lists the options in these files, columns with one option each, or the
        labels of all rows.
      mixture: FLAN mixture: builtin, flan2022, flan-t5 or flan-ablation; builtin by default, if
        there is neither --task nor --corpus.
      source: Source of the mixture: local (the data folder), hub (ready-made) or hub-raw (raw
        sets of the hub with our templates).
      hold_out: Leave out tasks that overlap with these suites, such as mmlu,bbh.
      corpus: Pretrain on this text: builtin, local, parts such as books,speeches, or a file or
        folder of your own (.txt, .md, .jsonl, .csv, .parquet).
      checkpoint: Start from this model instead of a new one.
      router: Another router: switch, top2, gshard, expert-choice, loss-free, hash, random, or one
        of your own as FILE.py:NAME.
      tokenizer: Path of a SentencePiece model; by default the preset's tokenizer.
      on_error: What to do with malformed rows: stop or skip.
      mesh: Shard over all devices: axis sizes such as expert=8 or expert=4,model=2.
      coordinator: host:port of process 0 of a run on several hosts; not needed on TPU slices.
      processes: Number of processes of a run on several hosts; not needed on TPU slices.
      process_id: Index of this process, from 0; not needed on TPU slices.
    """
    require_seed(config.seed)
    axes = mesh_axes(mesh)
    keep_freed_memory()
    keep_compiled_programs()
    import jax

    from moekit import distributed
    from moekit.commands.devices import device_mesh

    distributed.start(coordinator, processes, process_id)
    sharded = axes or jax.process_count() > 1
    devices = device_mesh(axes) if sharded else None
    if checkpoint and (tokenizer or (router and not is_file_router(router))):
        raise ValueError("--router and --tokenizer change a new model: leave out --checkpoint")
    if checkpoint:
        changes = read_settings(settings)
        model = mk.load(checkpoint, router=checkpoint_router(router), mesh=devices)
        if changes:
            model = mk.with_config(model, model.cfg.replace(**changes))
    else:
        cfg = model_config(preset, settings, router, tokenizer)
    tasks = own_tasks(task, input, target, options, on_error)
    data = named_data(tasks, mixture, source, hold_out, corpus, on_error)
    if not checkpoint:
        model = mk.EncoderDecoder(cfg, seed=config.seed, mesh=devices)
    run = mk.train(model, data, config, workdir=workdir)
    if distributed.is_first():
        rows = [row for row in run.metrics.rows if "loss" in row]
        result = {"workdir": str(workdir)}
        text = f"the run in {workdir} is finished; its log has no losses"
        if rows:
            result |= rows[-1]
            text = f"step {result['step']}: loss {result['loss']:.4f}; checkpoints in {workdir}"
        print_result(result, text, json)
    return 0


COMMAND = train
