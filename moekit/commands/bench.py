"""The benchmarks of moekit bench: timings, and the parameters of each benchmark."""

from moekit.commands.environment import keep_freed_memory
from moekit.commands.flags import mesh_axes, require_at_least
from moekit.commands.output import AsJson, print_result, table


def bench_layer(
    *,
    shapes: tuple[tuple[int, int], ...] = ((8, 1), (32, 2)),
    tokens: int = 4096,
    d_model: int = 256,
    d_ff: int = 704,
    capacity_factor: float = 1.25,
    repeats: int = 15,
    json: AsJson = False,
) -> int:
    """Time an MoE layer against the dense FFN of equal FLOPs, forward and backward, in float32.

    Args:
      shapes: Pairs of experts and choices per token, such as 8 1 32 2.
      tokens: Tokens in one call of the layer.
      d_model: Width of the tokens.
      d_ff: Hidden features of each expert.
      capacity_factor: Slots of the experts, as a multiple of balanced load.
      repeats: Number of timed calls.
    """
    require_at_least(1, tokens=tokens, d_model=d_model, d_ff=d_ff, repeats=repeats)
    if not capacity_factor > 0:
        raise ValueError(f"--capacity-factor is {capacity_factor}; use a number above 0")
    for num_experts, num_choices in shapes:
        if not 1 <= num_choices <= num_experts:
            raise ValueError(
                f"--shapes has {num_experts} experts and {num_choices} choices; "
                "use at least one choice and as many experts"
            )
    from moekit.bench.layer import layer

    rows = layer(
        shapes=shapes,
        tokens=tokens,
        d_model=d_model,
        d_ff=d_ff,
        capacity_factor=capacity_factor,
        repeats=repeats,
    )
    print_result(rows, table(rows), json)
    return 0


def bench_step(
    *,
    preset: str = "st-mini",
    batch: int = 8,
    input_length: int = 256,
    target_length: int = 64,
    mesh: str = "",
    remat: str = "none",
    dispatch: str = "capacity",
    repeats: int = 9,
    json: AsJson = False,
) -> int:
    """Time a training step of a preset against that of its dense twin.

    Args:
      preset: Model to time, one of `moekit doctor --presets`.
      batch: Rows per step.
      input_length: Tokens of an encoder row.
      target_length: Tokens of a decoder row.
      mesh: Shard over all devices: axis sizes such as expert=8.
      remat: What the backward pass recomputes: none, dots or full.
      dispatch: capacity or dropless.
      repeats: Number of timed steps.
    """
    require_at_least(1, batch=batch, input_length=input_length, target_length=target_length)
    require_at_least(1, repeats=repeats)
    axes = mesh_axes(mesh)
    keep_freed_memory()
    from moekit.bench.step import step
    from moekit.commands.devices import device_mesh

    rows = step(
        preset=preset,
        batch=batch,
        input_length=input_length,
        target_length=target_length,
        mesh=device_mesh(axes) if axes else None,
        remat=remat,
        dispatch=dispatch,
        repeats=repeats,
    )
    print_result(rows, table(rows), json)
    return 0


def bench_input(
    *,
    tokenizer: str = "",
    input_length: int = 512,
    target_length: int = 128,
    workers: int = 0,
    json: AsJson = False,
) -> int:
    """Time an epoch of the data folder's instructions through the input pipeline.

    Args:
      tokenizer: Path of a SentencePiece model; by default one trained on the data folder and kept.
      input_length: Tokens of an encoder row.
      target_length: Tokens of a decoder row.
      workers: Processes that read ahead.
    """
    require_at_least(1, input_length=input_length, target_length=target_length)
    require_at_least(0, workers=workers)
    from moekit.bench.input import input_pipeline

    result, text = input_pipeline(
        tokenizer, input_length=input_length, target_length=target_length, workers=workers
    )
    print_result(result, text, json)
    return 0


def bench_peers(
    *,
    experts: tuple[int, ...] = (0, 8, 32),
    batch: int = 8,
    input_length: int = 128,
    target_length: int = 128,
    d_model: int = 256,
    d_ff: int = 1024,
    vocab_size: int = 32_128,
    repeats: int = 9,
    json: AsJson = False,
) -> int:
    """Time our models beside those of transformers, on the CPU, in float32.

    Args:
      experts: Numbers of experts to time; 0 is the dense model.
      batch: Rows per step.
      input_length: Tokens of an encoder row.
      target_length: Tokens of a decoder row.
      d_model: Width of the tokens.
      d_ff: Hidden features of the feed-forward layers.
      vocab_size: Size of the vocabulary.
      repeats: Number of timed steps.
    """
    require_at_least(1, batch=batch, input_length=input_length, target_length=target_length)
    require_at_least(0, experts=min(experts, default=0))
    require_at_least(1, d_model=d_model, d_ff=d_ff, vocab_size=vocab_size, repeats=repeats)
    keep_freed_memory()
    from moekit.bench.baselines import peers

    rows = peers(
        experts=experts,
        batch=batch,
        input_length=input_length,
        target_length=target_length,
        d_model=d_model,
        d_ff=d_ff,
        vocab_size=vocab_size,
        repeats=repeats,
    )
    print_result(rows, table(rows), json)
    return 0


def bench_generation(
    *,
    experts: tuple[int, ...] = (0, 32),
    batch: int = 8,
    input_length: int = 128,
    new_tokens: int = 64,
    question_length: int = 256,
    options: int = 4,
    option_length: int = 8,
    d_model: int = 256,
    d_ff: int = 1024,
    vocab_size: int = 32_128,
    repeats: int = 9,
    json: AsJson = False,
) -> int:
    """Time greedy generation and the ranking of options beside transformers, on the CPU.

    Args:
      experts: Numbers of experts to time; 0 is the dense model.
      batch: Inputs that are answered together, and questions that are ranked together.
      input_length: Tokens of an input.
      new_tokens: Tokens that are generated for each input.
      question_length: Tokens of a question with options.
      options: Options of a question.
      option_length: Tokens of an option.
      d_model: Width of the tokens.
      d_ff: Hidden features of the feed-forward layers.
      vocab_size: Size of the vocabulary.
      repeats: Number of timed calls.
    """
    require_at_least(1, batch=batch, input_length=input_length, new_tokens=new_tokens)
    require_at_least(1, question_length=question_length, options=options)
    require_at_least(1, option_length=option_length)
    require_at_least(0, experts=min(experts, default=0))
    require_at_least(1, d_model=d_model, d_ff=d_ff, vocab_size=vocab_size, repeats=repeats)
    keep_freed_memory()
    from moekit.bench.generation import generation

    rows = generation(
        experts=experts,
        batch=batch,
        input_length=input_length,
        new_tokens=new_tokens,
        question_length=question_length,
        options=options,
        option_length=option_length,
        d_model=d_model,
        d_ff=d_ff,
        vocab_size=vocab_size,
        repeats=repeats,
    )
    print_result(rows, table(rows), json)
    return 0


COMMAND = {
    "layer": bench_layer,
    "step": bench_step,
    "input": bench_input,
    "peers": bench_peers,
    "generation": bench_generation,
}
