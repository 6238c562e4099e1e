"""moekit chat: questions and streamed answers in a terminal."""

import json as json_format
import sys
from collections.abc import Iterator
from pathlib import Path

from moekit.commands.environment import keep_compiled_programs
from moekit.commands.flags import require_at_least, require_seed, require_share
from moekit.commands.generate import StopFlag
from moekit.commands.output import AsJson, escape
from moekit.commands.routers import checkpoint_router


def chat(
    checkpoint: Path,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: StopFlag = (),
    router: str = "",
    json: AsJson = False,
) -> int:
    """Answer one question a line, until an empty line or the end of the input (Ctrl-D).

    T5 models read one question and answer it: they do not remember the lines before. Settings that
    are left out are those of the checkpoint, but without beams: an answer is shown while it grows.

    Args:
      checkpoint: Folder of the model: a checkpoint or a run's workdir.
      max_new_tokens: Longest answer in tokens.
      temperature: 0 decodes greedily; above 0, tokens are sampled.
      top_k: Sample from this many most probable tokens only; 0 is off.
      top_p: Sample from the smallest set of tokens whose probabilities add up to this; 1 is off.
      seed: Seed of sampling; every line has the next one.
      router: The router of a checkpoint that was trained with one of your own, as FILE.py:NAME.
    """
    require_at_least(1, max_new_tokens=max_new_tokens)
    require_at_least(0, temperature=temperature, top_k=top_k)
    require_share(top_p=top_p)
    require_seed(seed)
    keep_compiled_programs()
    import moekit as mk

    model = mk.load(checkpoint, router=checkpoint_router(router))
    print(
        f"{escape(model.cfg.name)}: every line is a question by itself, the model does not "
        "remember earlier ones; an empty line or Ctrl-D ends",
        file=sys.stderr,
    )
    for number, question in enumerate(_questions()):
        try:
            pieces = mk.generate(
                model,
                question,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                num_beams=1,
                seed=(seed + number) % 2**32,
                stop=stop,
                stream=True,
            )
        except ValueError as error:  # such as a question that is too long: the next may be shorter
            print(f"error: {escape(str(error))}", file=sys.stderr)
            continue
        if json:
            row = {"prompt": question, "answer": "".join(pieces)}
            print(json_format.dumps(row), flush=True)
        else:
            _print_pieces(pieces)
    return 0


COMMAND = chat


def _questions() -> Iterator[str]:
    """The lines of the terminal, which are edited there, or of a pipe; up to an empty one."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not line.strip():
            return
        yield line


def _print_pieces(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(escape(piece), end="", flush=True)
    print()
