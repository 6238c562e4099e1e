"""moekit generate: the answers of a checkpoint to texts."""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from moekit.commands.environment import keep_compiled_programs
from moekit.commands.flags import require_at_least, require_seed, require_share
from moekit.commands.output import AsJson, print_result
from moekit.commands.routers import checkpoint_router

StopFlag = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(help="End the answer before this text; may be given several times."),
]


def generate(
    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    *,
    checkpoint: Path,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int | None = None,
    length_penalty: float | None = None,
    seed: int = 0,
    stop: StopFlag = (),
    router: str = "",
    json: AsJson = False,
) -> int:
    """Answer texts, or the lines of standard input.

    Settings that are left out are those of the checkpoint: a new model answers greedily, one of
    transformers as its generation_config.json says.

    Args:
      texts: Texts to answer; without any, every line of standard input is one.
      checkpoint: Folder of the model: a checkpoint or a run's workdir.
      max_new_tokens: Longest answer in tokens.
      temperature: 0 decodes greedily; above 0, tokens are sampled.
      top_k: Sample from this many most probable tokens only; 0 is off.
      top_p: Sample from the smallest set of tokens whose probabilities add up to this; 1 is off.
      num_beams: Beams of beam search; 1 is off.
      length_penalty: Exponent of the length by which beam search divides a log-probability.
      seed: Seed of sampling.
      router: The router of a checkpoint that was trained with one of your own, as FILE.py:NAME.
    """
    require_at_least(1, max_new_tokens=max_new_tokens, num_beams=num_beams)
    require_at_least(0, temperature=temperature, top_k=top_k)
    require_share(top_p=top_p)
    require_seed(seed)
    prompts = list(texts) or _lines()
    keep_compiled_programs()
    import moekit as mk

    model = mk.load(checkpoint, router=checkpoint_router(router))
    answers = mk.generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        num_beams=num_beams,
        length_penalty=length_penalty,
        seed=seed,
        stop=stop,
    )
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        rows.append({"prompt": prompt, "answer": answer})
    shown = [f"{row['prompt']}\n>>> {row['answer']}" for row in rows]
    text = answers[0] if len(answers) == 1 else "\n".join(shown)
    print_result(rows, text, json)
    return 0


COMMAND = generate


def _lines() -> list[str]:
    """The lines of standard input that are not empty."""
    lines = [] if sys.stdin.isatty() else sys.stdin.read().splitlines()
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError("no text to answer: give some, or pipe lines to standard input")
    return prompts
