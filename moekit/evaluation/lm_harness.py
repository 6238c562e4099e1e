"""The encoder-decoder as a model of the lm-evaluation-harness, for its task library.

The harness knows the model as "moekit" once this module is imported:
`lm_eval.simple_evaluate("moekit", "checkpoint=runs/x", tasks=["arc_easy"])`. The context is the
encoder's input and the continuation is the decoder's text, so the leading space of a continuation
is removed and its end of sequence counts.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moekit.data.tokenizer import EOS, Tokenizer, load_tokenizer
from moekit.errors import unknown
from moekit.evaluation.likelihood import likelihoods
from moekit.model.decoding import generate_ids
from moekit.model.transformer import EncoderDecoder
from moekit.training.model_files import load

try:
    import lm_eval
    import lm_eval.tasks
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table  # noqa: F401 (for the command line)
except ModuleNotFoundError as error:
    raise OSError(
        f'the lm-evaluation-harness is not installed ({error}): pip install -e ".[eval]"'
    ) from None

log = logging.getLogger("moekit")
MAX_NEW_TOKENS = 256  # of an answer, where a task does not say
DEFAULT_BATCH_SIZE = 32
LENGTH_SETTINGS = ("max_gen_toks", "max_new_tokens", "max_tokens")
KNOWN_SETTINGS = {*LENGTH_SETTINGS, "until", "do_sample", "temperature"}
# values of other settings that have no effect
NEUTRAL_SETTINGS = {"top_p": 1.0, "top_k": 0, "num_beams": 1, "repetition_penalty": 1.0}


@register_model("moekit")
class MoekitLM(LM):
    """Adapter around a model, or around the checkpoint at a path.

    Args:
      batch_size: most texts decoded at a time; options are ranked in batches of their own size.
      max_batch_size, device: passed by the harness and not used; JAX chooses the devices.
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
        given_size = str(batch_size or "")  # "auto" is not a number
        self.batch_size = int(given_size) if given_size.isdigit() else DEFAULT_BATCH_SIZE

    @property
    def tokenizer_name(self) -> str:
        return f"moekit-{self.tokens.digest()}"

    def _encode_contexts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of contexts; long ones are cut from the left and counted in the log."""
        max_tokens = self.model.cfg.max_length - 1
        contexts = [self.tokens.encode(text) for text in texts]
        num_cut = sum(len(ids) > max_tokens for ids in contexts)
        if num_cut:
            log.warning(
                "%d of %d contexts were cut to their last %d tokens",
                num_cut,
                len(contexts),
                max_tokens,
            )
        return [[*ids[-max_tokens:], EOS] for ids in contexts]

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-probability (nats) of each (context, continuation), end of sequence included, and
        whether greedy decoding generates it. A context is encoded once for all continuations."""
        requests_of_context: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            context, _ = request.args
            requests_of_context.setdefault(context, []).append(index)
        options = []
        for indices in requests_of_context.values():
            texts = [requests[index].args[1].lstrip() for index in indices]
            options.append([[*self.tokens.encode(text), EOS] for text in texts])
        contexts = self._encode_contexts(list(requests_of_context))

        answers = [(0.0, False)] * len(requests)
        results = likelihoods(self.model, contexts, options)
        for indices, found in zip(requests_of_context.values(), results, strict=True):
            for index, each in zip(indices, found, strict=True):
                answers[index] = (each.log_prob, each.greedy)
                arguments = requests[index].args
                self.cache_hook.add_partial("loglikelihood", arguments, answers[index])
        return answers

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text generated for each (context, settings), cut before the first stop text.
        Decoding is greedy unless the settings ask for sampling.

        Raises:
          ValueError: a setting that decoding does not support, such as top_p.
        """
        requests_of_setting: dict[tuple[int, float], list[int]] = {}
        for index, request in enumerate(requests):
            _, settings = request.args
            requests_of_setting.setdefault(_decoding(settings), []).append(index)
        answers = [""] * len(requests)
        for (max_new_tokens, temperature), indices in requests_of_setting.items():
            generated = generate_ids(
                self.model,
                self._encode_contexts([requests[index].args[0] for index in indices]),
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                batch_size=self.batch_size,
            )
            for index, ids in zip(indices, generated, strict=True):
                arguments = requests[index].args
                stops = arguments[1].get("until")
                answers[index] = _before_stop(self.tokens.decode(ids), stops)
                self.cache_hook.add_partial("generate_until", arguments, answers[index])
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Not supported: an encoder-decoder gives a text no probability without an input."""
        raise ValueError(
            "loglikelihood_rolling needs the probability of a text without an input, which an "
            "encoder-decoder does not define: choose tasks that rank options or generate "
            "(perplexity tasks such as wikitext do not work)"
        )


def _decoding(settings: Mapping[str, Any]) -> tuple[int, float]:
    """Most new tokens, and the temperature (0 for greedy decoding)."""
    given = {name: value for name, value in settings.items() if value is not None}
    for name, value in given.items():
        if name not in KNOWN_SETTINGS and value != NEUTRAL_SETTINGS.get(name):
            known = ", ".join(sorted(KNOWN_SETTINGS))
            raise ValueError(
                f"the task sets {name}={value}, but moekit decodes greedily or with a temperature: "
                f"override it with gen_kwargs (known: {known})"
            )
    lengths = [int(given[name]) for name in LENGTH_SETTINGS if name in given]
    max_new_tokens = lengths[0] if lengths else MAX_NEW_TOKENS
    temperature = float(given.get("temperature", 1.0))
    is_sampled = given.get("do_sample", "temperature" in given)
    return max_new_tokens, temperature if is_sampled else 0.0


def _before_stop(text: str, stops: str | Sequence[str] | None) -> str:
    """The text before the first stop text."""
    if isinstance(stops, str):
        stops = [stops]
    for stop in filter(None, stops or ()):
        text = text.split(stop)[0]
    return text


def harness(
    model: EncoderDecoder,
    tasks: Sequence[str | dict[str, Any]],
    *,
    shots: int | None = None,
    task_manager: TaskManager | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Run tasks of the lm-evaluation-harness.

    Args:
      tasks: names, paths of YAML files (which may `include` one of the harness and change its
        settings), or configurations as dicts.
      shots: exemplars; default: each task's own number.
      task_manager: the harness's index of tasks; default: a new one.
      kwargs: further arguments of `lm_eval.simple_evaluate`, such as limit.

    Returns:
      The harness's results; scores are under "results".

    Raises:
      ValueError: an unknown task, or one that needs perplexity.
    """
    manager = task_manager or TaskManager()
    for task in tasks:
        if isinstance(task, str) and task not in manager.all_tasks and not Path(task).exists():
            raise unknown("harness task", task, manager.all_tasks)
    return lm_eval.simple_evaluate(
        MoekitLM(model), tasks=list(tasks), num_fewshot=shots, task_manager=manager, **kwargs
    )
