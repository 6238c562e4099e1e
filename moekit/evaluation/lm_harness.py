"""Our encoder-decoder as a model of the lm-evaluation-harness, so that its task library runs.

Its own command line knows the model as "moekit" once this module is imported:
`lm_eval.simple_evaluate("moekit", "checkpoint=runs/x", tasks=["arc_easy"])`. The context is the
encoder's input and the continuation the decoder's text, so a continuation's leading space is
dropped and its end of sequence counts.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moekit.data.tokenizer import EOS, Tokenizer, load_tokenizer
from moekit.errors import unknown
from moekit.evaluation.evaluator import likelihoods
from moekit.model.decoding import generate_ids
from moekit.model.transformer import EncoderDecoder
from moekit.training.checkpoint import load

try:
    import lm_eval
    import lm_eval.tasks
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import make_table  # noqa: F401 (for the command line)
except ModuleNotFoundError as error:
    raise OSError(
        f'the lm-evaluation-harness is not installed ({error}): pip install -e ".[eval]"'
    ) from None

log = logging.getLogger("moekit")
MOST = 256  # tokens of an answer where a task does not say
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens")
_KNOWN = {*_LIMITS, "until", "do_sample", "temperature"}
# settings that change nothing
_NEUTRAL = {"top_p": 1.0, "top_k": 0, "num_beams": 1, "repetition_penalty": 1.0}


@register_model("moekit")
class MoekitLM(LM):
    """Adapter around a model, or around the checkpoint of that path.

    Args:
      batch_size: most texts decoded at a time; ranking batches by itself.
      max_batch_size, device: given by the harness, not used; jax has the devices.
    """

    def __init__(
        self,
        model: EncoderDecoder | None = None,
        checkpoint: str = "",
        tokenizer: Tokenizer | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        if model is None and not checkpoint:
            raise ValueError("give a model, or checkpoint= the path of one")
        self.model = model or load(checkpoint)
        self.tokens = tokenizer or load_tokenizer(self.model.cfg.tokenizer)
        self.batch_size = int(batch_size) if str(batch_size or "").isdigit() else 32

    @property
    def tokenizer_name(self) -> str:
        return f"moekit-{self.tokens.digest()}"

    def _contexts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of contexts; too long ones lose their beginning and are counted."""
        most, cut, rows = self.model.cfg.max_length - 1, 0, []
        for text in texts:
            ids = self.tokens.encode(text)
            cut += len(ids) > most
            rows.append([*ids[-most:], EOS])
        if cut:
            log.warning("%d of %d contexts were cut to their last %d tokens", cut, len(rows), most)
        return rows

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability (nats) of each (context, continuation), end of sequence included, and
        whether greedy decoding would say it; a context is encoded once for all of its
        continuations."""
        by_context: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            by_context.setdefault(request.args[0], []).append(i)
        options = [
            [[*self.tokens.encode(requests[i].args[1].lstrip()), EOS] for i in indices]
            for indices in by_context.values()
        ]
        found = likelihoods(self.model, self._contexts(list(by_context)), options)
        answers = [(0.0, False)] * len(requests)
        for indices, row in zip(by_context.values(), found, strict=True):
            for i, each in zip(indices, row, strict=True):
                answers[i] = (each.log_prob, each.greedy)
                self.cache_hook.add_partial("loglikelihood", requests[i].args, answers[i])
        return answers

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """What the model says to each (context, settings), cut before the first stop text; greedy
        unless the settings ask for sampling.

        Raises:
          ValueError: settings that our decoding does not have, such as top_p.
        """
        by_setting: dict[tuple[int, float], list[int]] = {}
        for i, request in enumerate(requests):
            by_setting.setdefault(_decoding(request.args[1]), []).append(i)
        answers = [""] * len(requests)
        for (most, temperature), indices in by_setting.items():
            said = generate_ids(
                self.model,
                self._contexts([requests[i].args[0] for i in indices]),
                max_new_tokens=most,
                temperature=temperature,
                batch_size=self.batch_size,
            )
            for i, ids in zip(indices, said, strict=True):
                answers[i] = _until(self.tokens.decode(ids), requests[i].args[1].get("until"))
                self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Refused: an encoder-decoder gives a text no probability without an input."""
        raise ValueError(
            "loglikelihood_rolling asks for the probability of a text by itself, which an "
            "encoder-decoder does not define: choose tasks that rank options or generate "
            "(perplexity tasks such as wikitext do not work)"
        )


def _decoding(settings: Mapping[str, Any]) -> tuple[int, float]:
    """Most tokens, and the temperature (0 for greedy)."""
    for name, value in settings.items():
        if name not in _KNOWN and value is not None and value != _NEUTRAL.get(name):
            raise ValueError(
                f"the task asks for {name}={value}; moekit decodes greedily or with a temperature: "
                f"override it with gen_kwargs (known: {', '.join(sorted(_KNOWN))})"
            )
    most = next((int(settings[n]) for n in _LIMITS if settings.get(n) is not None), MOST)
    sampled = settings.get("do_sample", bool(settings.get("temperature")))
    return most, float(settings.get("temperature", 1.0)) if sampled else 0.0


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """The text before the first stop text."""
    for stop in [stops] if isinstance(stops, str) else stops or ():
        text = text.split(stop)[0] if stop else text
    return text


def harness(
    model: EncoderDecoder, tasks: Sequence[str | dict], *, shots: int | None = None, **kwargs
) -> dict:
    """Run tasks of the lm-evaluation-harness: names, paths of YAML files (which may `include` one
    of its own and change settings), or configurations as dicts.

    Args:
      shots: exemplars; default each task's own.
      kwargs: further arguments of `lm_eval.simple_evaluate`, such as limit or task_manager.

    Returns:
      The harness's results; scores are under "results".

    Raises:
      ValueError: a task that it does not know, or one that asks for perplexity.
    """
    manager = kwargs.pop("task_manager", None) or lm_eval.tasks.TaskManager()
    for task in tasks:
        if isinstance(task, str) and task not in manager.all_tasks and not Path(task).exists():
            raise unknown("harness task", task, manager.all_tasks)
    return lm_eval.simple_evaluate(
        MoekitLM(model), tasks=list(tasks), num_fewshot=shots, task_manager=manager, **kwargs
    )
