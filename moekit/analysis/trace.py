"""RouterTrace: the experts of every token in every MoE layer, recorded once and analysed later.

Y MoE layers of a stack, N tokens (without padding), K choices per token.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from moekit.analysis.trace_file import FIELDS, STACKS, read_trace, write_trace
from moekit.data.batch import Batch, pad_pairs, tokenize_prompt
from moekit.data.mixture import Mixture
from moekit.data.own_mixture import as_source
from moekit.data.own_rows import is_path
from moekit.data.tasks import Prompt, stable_random
from moekit.data.text import Corpus
from moekit.data.tokenizer import EOS, Tokenizer, load_tokenizer
from moekit.distributed import to_host
from moekit.errors import not_finite, unknown
from moekit.model.batching import length_groups, pad_rows
from moekit.model.finite import require_finite
from moekit.model.transformer import EncoderDecoder
from moekit.moe.stats import TokenRouting
from moekit.progress import ProgressBar
from moekit.sharding import shard_batch

NUM_PROMPTS = 512  # of a task or mixture


@dataclass(frozen=True)
class StackTrace:
    """The routing of one stack's tokens, without padding.

    Args:
      token: id of the token that was routed.
      example: index of its example in the trace.
      position: position in the example.
      expert: chosen experts; -1 where there is no choice.
      weight: combine weights; 0 where dropped.
      kept: whether the choice was dispatched, not dropped.
      entropy: entropy of the router's probabilities, in nats.
    """

    token: Int[ndarray, "N"]
    example: Int[ndarray, "N"]
    position: Int[ndarray, "N"]
    expert: Int[ndarray, "Y N K"]
    weight: Float[ndarray, "Y N K"]
    kept: Bool[ndarray, "Y N K"]
    entropy: Float[ndarray, "Y N"]


@dataclass(frozen=True)
class RouterTrace:
    """The routing of a set of prompts by one model.

    Args:
      stacks: by "encoder" and "decoder". Prompts without a target have no decoder tokens, and a
        trace of such prompts alone has no decoder.
      tasks, clusters, domains: labels of each example.
      truncated: number of inputs that were cut to fit.
    """

    model: str
    num_experts: int
    stacks: dict[str, StackTrace]
    tasks: tuple[str, ...]
    clusters: tuple[str, ...]
    domains: tuple[str, ...]
    truncated: int = 0

    def stack(self, name: str) -> StackTrace:
        """The routing of a stack.

        Raises:
          ValueError: the trace has no such stack.
        """
        if name in self.stacks:
            return self.stacks[name]
        if name in STACKS:
            raise ValueError(
                f"this trace has no {name}, only {', '.join(self.stacks)}: its prompts have no "
                "targets, or the model has no MoE layer there"
            )
        raise unknown("stack of this trace", name, self.stacks)

    def labels(self, by: str) -> tuple[str, ...]:
        """Label of each example: by "domain", "task" or "cluster"."""
        names = {"domain": self.domains, "task": self.tasks, "cluster": self.clusters}
        if by not in names:
            raise unknown("label", by, names)
        return names[by]

    def save(self, path: str | Path) -> None:
        """Write a compressed .npz file of plain arrays (no pickle).

        Raises:
          ValueError: the trace is too large to be loaded (400 MB of arrays).
        """
        stacks = {}
        for stack_name, stack in self.stacks.items():
            stacks[stack_name] = {field: getattr(stack, field) for field in FIELDS}
        header = {
            "model": self.model,
            "num_experts": self.num_experts,
            "truncated": self.truncated,
            "labels": [self.tasks, self.clusters, self.domains],
        }
        write_trace(path, header, stacks)

    @classmethod
    def load(cls, path: str | Path) -> "RouterTrace":
        """Read a file that `save` wrote.

        Raises:
          ValueError: the file is something else, is damaged, or is too large (400 MB of arrays).
        """
        header, stacks = read_trace(path)
        tasks, clusters, domains = header["labels"]
        return cls(
            model=header["model"],
            num_experts=header["num_experts"],
            stacks={name: StackTrace(**arrays) for name, arrays in stacks.items()},
            tasks=tuple(tasks),
            clusters=tuple(clusters),
            domains=tuple(domains),
            truncated=header["truncated"],
        )


def text_prompts(
    corpus: Corpus,
    per_domain: int = 64,
    *,
    characters: int = 600,
    split: str = "valid",
    seed: int = 0,
) -> list[Prompt]:
    """Pieces of raw text labelled by domain, the same number of each, from random documents.

    They have no target: only the encoder is traced.
    """
    texts_of_domain: dict[str, list[str]] = {}
    for document in corpus.documents(split):
        texts_of_domain.setdefault(document.domain, []).append(document.text)
    prompts = []
    for domain, texts in sorted(texts_of_domain.items()):
        generator = stable_random("text", corpus.name, domain, seed)
        for index in range(per_domain):
            text = generator.choice(texts)
            start = generator.randrange(max(1, len(text) - characters))
            prompt = Prompt(
                input=text[start : start + characters],
                target="",
                task="text",
                cluster="text",
                domain=domain,
                id=f"{domain}/{index}",
            )
            prompts.append(prompt)
    return prompts


@lru_cache(maxsize=8)
def _compiled_routing(graphdef: nnx.GraphDef) -> Callable[..., dict[str, TokenRouting]]:
    def route(state: nnx.State, batch: Batch) -> dict[str, TokenRouting]:
        model = nnx.merge(graphdef, state)
        return model(batch, trace=True).routing

    return jax.jit(route)


def as_prompts(data: Any, limit: int = NUM_PROMPTS) -> list[Prompt]:
    """What `trace_routing` accepts, as prompts: at most `limit` of them where they are drawn.

    Raises:
      ValueError: a task without training examples, or rows that cannot be used.
    """
    if isinstance(data, str) and not is_path(data):
        data = [data]
    if isinstance(data, list | tuple) and all(isinstance(each, str | Prompt) for each in data):
        return [_as_prompt(each, index) for index, each in enumerate(data)]
    source = as_source(data)
    if isinstance(source, Corpus):
        prompts = text_prompts(source)
        every = math.ceil(len(prompts) / limit)  # of each domain as many
        return prompts[::every]
    if not isinstance(source, Mixture):
        kind = type(source).__name__
        raise ValueError(f"a {kind} has no prompts to trace: trace its tasks and its text apart")
    num_examples = sum(task.train_size for task in source.tasks)
    return source.sample(min(limit, num_examples))


def _as_prompt(prompt: str | Prompt, index: int) -> Prompt:
    if isinstance(prompt, Prompt):
        return prompt
    return Prompt(prompt, "", task="text", cluster="text", domain="text", id=str(index))


def trace_routing(
    model: EncoderDecoder,
    prompts: Any,
    *,
    batch_size: int = 32,
    input_length: int | None = None,
    target_length: int = 128,
    tokenizer: Tokenizer | None = None,
) -> RouterTrace:
    """Run prompts with teacher forcing and record the decisions of all routers.

    Args:
      prompts: `Prompt`s or texts; or what they are drawn from: a `Task`, a `Mixture`, rows or a
        path as for `mk.task` (their first 512 training prompts), or a `Corpus` (`text_prompts`).
      input_length: longest input, default the model's max_length. Longer inputs are cut from the
        left and counted.
      target_length: longest target. Longer targets are cut from the right.

    Raises:
      ValueError: the model is dense or its parameters are not finite, or there is nothing to
        trace: no prompts, or no targets for a model without MoE layers in the encoder.
    """
    if not model.cfg.num_experts:
        raise ValueError(f"{model.cfg.name} is dense: it has no routing to trace")
    prompts = as_prompts(prompts)
    if not prompts:
        raise ValueError("no prompts to trace")
    tokenizer = tokenizer or load_tokenizer(model.cfg.tokenizer)
    input_length = min(input_length or model.cfg.max_length, model.cfg.max_length)
    pairs = [
        tokenize_prompt(prompt, tokenizer, input_length=input_length, target_length=target_length)
        for prompt in prompts
    ]
    lengths = [len(tokenizer.encode(prompt.input)) + 1 for prompt in prompts]
    stacks = _trace_pairs(model, pairs, input_length, target_length, batch_size)
    if not stacks:
        raise ValueError(
            f"nothing to trace: only the decoder of {model.cfg.name} has MoE layers, and the "
            "prompts have no targets"
        )
    return RouterTrace(
        model=model.cfg.name,
        num_experts=model.cfg.num_experts,
        stacks=stacks,
        tasks=tuple(prompt.task for prompt in prompts),
        clusters=tuple(prompt.cluster for prompt in prompts),
        domains=tuple(prompt.domain for prompt in prompts),
        truncated=sum(length > input_length for length in lengths),
    )


def _trace_pairs(
    model: EncoderDecoder,
    pairs: Sequence[Mapping[str, Any]],
    input_length: int,
    target_length: int,
    batch_size: int,
) -> dict[str, StackTrace]:
    """The routing of pairs of token ids ("inputs", "targets") in each stack with MoE layers."""
    require_finite(model)
    graphdef, state = nnx.split(model)
    route = _compiled_routing(graphdef)
    has_target = np.array([len(pair["targets"]) > 1 for pair in pairs])  # more than EOS
    parts: dict[str, list[StackTrace]] = {name: [] for name in STACKS}
    lengths = [len(pair["inputs"]) for pair in pairs]
    groups = list(length_groups(lengths, input_length, batch_size, mesh=model.mesh))
    progress = ProgressBar(groups, desc="trace", unit="batch", leave=False)
    for indices, length, num_rows in progress:
        group = [pairs[index] for index in indices]
        batch = pad_pairs(group, input_length=length, target_length=target_length)
        batch = jax.tree.map(partial(pad_rows, rows=num_rows), batch)
        examples = np.zeros(num_rows, np.int32)
        examples[: len(indices)] = indices
        with progress.compiling(route, batch.inputs.shape):
            routing = to_host(route(state, shard_batch(batch, model.mesh)))
        for name, stack_routing in routing.items():
            part = _stack_tokens(name, batch, examples, has_target[examples], stack_routing)
            if not np.isfinite(part.entropy).all():
                raise not_finite(model.cfg.name)
            parts[name].append(part)
    stacks = {name: _concatenate(traces) for name, traces in parts.items() if traces}
    return {name: stack for name, stack in stacks.items() if len(stack.token)}


def _stack_tokens(
    stack: str,
    batch: Batch,
    examples: Int[ndarray, "B"],
    has_target: Bool[ndarray, "B"],
    routing: TokenRouting,
) -> StackTrace:
    """The routing of a batch's tokens. The decoder's tokens are its inputs, shifted targets."""
    if stack == "encoder":
        token = batch.inputs
        position = batch.input_positions
        real = batch.input_segments > 0
    else:
        shifted = np.pad(batch.targets[:, :-1], ((0, 0), (1, 0)))
        token = np.where(shifted == EOS, 0, shifted)
        position = batch.target_positions
        real = (batch.target_segments > 0) & has_target[:, None]
    example = np.broadcast_to(examples[:, None], real.shape)
    return StackTrace(
        token=token[real],
        example=example[real],
        position=position[real],
        expert=routing.expert[:, real],
        weight=routing.weight[:, real],
        kept=routing.kept[:, real],
        entropy=routing.entropy[:, real],
    )


def _concatenate(traces: Sequence[StackTrace]) -> StackTrace:
    """The tokens of several traces of one stack."""
    return StackTrace(
        token=np.concatenate([trace.token for trace in traces]),
        example=np.concatenate([trace.example for trace in traces]),
        position=np.concatenate([trace.position for trace in traces]),
        expert=np.concatenate([trace.expert for trace in traces], axis=1),
        weight=np.concatenate([trace.weight for trace in traces], axis=1),
        kept=np.concatenate([trace.kept for trace in traces], axis=1),
        entropy=np.concatenate([trace.entropy for trace in traces], axis=1),
    )
