"""RouterTrace: which token went to which expert, in every layer; recorded once, read by all else.

Y MoE layers of a stack, N real tokens, K choices per token.
"""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from moekit.data.batch import Batch, pad_pairs, tokenize_prompt
from moekit.data.span_corruption import Corpus
from moekit.data.tasks import Prompt, stable_random
from moekit.data.tokenizer import EOS, Tokenizer, load_tokenizer
from moekit.distributed import to_host
from moekit.errors import unknown
from moekit.model.batching import length_groups
from moekit.model.transformer import EncoderDecoder
from moekit.sharding import shard_batch

FORMAT = 1


@dataclass(frozen=True)
class StackTrace:
    """One stack's routing; padding is not in it."""

    token: Int[np.ndarray, "N"]  # id of the token that was routed
    example: Int[np.ndarray, "N"]  # index into the trace's examples
    position: Int[np.ndarray, "N"]
    expert: Int[np.ndarray, "Y N K"]  # -1: no choice
    weight: Float[np.ndarray, "Y N K"]  # combine weight, 0 where dropped
    kept: Bool[np.ndarray, "Y N K"]  # the choice found a slot
    entropy: Float[np.ndarray, "Y N"]  # of the router's probabilities, nats


@dataclass(frozen=True)
class RouterTrace:
    """The routing of a set of prompts by one model."""

    model: str
    num_experts: int
    stacks: dict[str, StackTrace]  # "encoder", "decoder"
    tasks: tuple[str, ...]  # of each example
    clusters: tuple[str, ...]
    domains: tuple[str, ...]
    truncated: int = 0  # inputs that were cut to fit

    def stack(self, name: str) -> StackTrace:
        if name not in self.stacks:
            raise unknown("stack of this trace", name, self.stacks)
        return self.stacks[name]

    def labels(self, by: str) -> tuple[str, ...]:
        """Label of each example: by "domain", "task" or "cluster"."""
        names = {"domain": self.domains, "task": self.tasks, "cluster": self.clusters}
        if by not in names:
            raise unknown("label", by, names)
        return names[by]

    def save(self, path: str | Path) -> None:
        """Write a compressed .npz of plain arrays (no pickle)."""
        small = {"token": np.int32, "example": np.int32, "position": np.int16}
        small |= {"expert": np.int16, "weight": np.float16, "entropy": np.float16}
        arrays = {}
        for name, stack in self.stacks.items():
            for field in fields(stack):
                array = getattr(stack, field.name)
                arrays[f"{name}.{field.name}"] = array.astype(small.get(field.name, array.dtype))
        header = {
            "format": FORMAT,
            "model": self.model,
            "num_experts": self.num_experts,
            "truncated": self.truncated,
            "labels": [self.tasks, self.clusters, self.domains],
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        try:
            np.savez_compressed(partial, header=np.array(json.dumps(header)), **arrays)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> "RouterTrace":
        """Read what `save` wrote; ValueError if it is something else or damaged."""
        try:
            with Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                header = json.loads(str(file["header"]))
                arrays = {name: file[name] for name in file.files if name != "header"}
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
            raise ValueError(f"{path} is not a routing trace, or damaged ({error})") from None
        if header.get("format") != FORMAT:
            raise ValueError(
                f"{path} has trace format {header.get('format')}, this reads {FORMAT}: trace again"
            )
        stacks = {}
        for name in dict.fromkeys(key.split(".")[0] for key in arrays):
            own = {f.name: arrays[f"{name}.{f.name}"] for f in fields(StackTrace)}
            for float_field in ("weight", "entropy"):
                own[float_field] = own[float_field].astype(np.float32)
            for int_field in ("position", "expert"):
                own[int_field] = own[int_field].astype(np.int32)
            stacks[name] = StackTrace(**own)
        labels = (tuple(each) for each in header["labels"])
        return cls(header["model"], header["num_experts"], stacks, *labels, header["truncated"])


def text_prompts(
    corpus: Corpus, per_domain: int = 64, *, characters: int = 600, split: str = "valid", seed=0
) -> list[Prompt]:
    """Pieces of raw text labelled by domain: as many of each, drawn from random documents.

    They have no target, so that mostly the encoder routes.
    """
    by_domain: dict[str, list] = {}
    for document in corpus.documents(split):
        by_domain.setdefault(document.domain, []).append(document)
    prompts = []
    for domain, documents in sorted(by_domain.items()):
        rng = stable_random("text", corpus.name, domain, seed)
        for i in range(per_domain):
            text = rng.choice(documents).text
            start = rng.randrange(max(1, len(text) - characters))
            piece = text[start : start + characters]
            identity = f"{domain}/{i}"
            prompts.append(
                Prompt(piece, "", task="text", cluster="text", domain=domain, id=identity)
            )
    return prompts


@lru_cache(maxsize=8)
def _compiled(graphdef):
    def route(state, batch: Batch):
        out = nnx.merge(graphdef, state)(batch, trace=True)
        return out.routing

    return jax.jit(route)


def trace_routing(
    model: EncoderDecoder,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 32,
    input_length: int | None = None,
    target_length: int = 128,
    tokenizer: Tokenizer | None = None,
) -> RouterTrace:
    """Run prompts with teacher forcing and record every router's decisions.

    Args:
      input_length: longest input (default the model's max_length); longer ones are cut from the
        left and counted, targets from the right.

    Raises:
      ValueError: the model is dense, or there are no prompts.
    """
    if not model.cfg.num_experts:
        raise ValueError(f"{model.cfg.name} is dense: it has no routing to trace")
    if not prompts:
        raise ValueError("no prompts to trace")
    tokenizer = tokenizer or load_tokenizer(model.cfg.tokenizer)
    longest = min(input_length or model.cfg.max_length, model.cfg.max_length)
    limits = {"input_length": longest, "target_length": target_length}
    pairs = [tokenize_prompt(prompt, tokenizer, **limits) for prompt in prompts]
    truncated = sum(len(tokenizer.encode(prompt.input)) >= longest for prompt in prompts)
    lengths = [len(pair["inputs"]) for pair in pairs]
    graphdef, state = nnx.split(model)
    run, parts = _compiled(graphdef), {}
    groups = list(length_groups(lengths, longest, batch_size, mesh=model.mesh))
    for rows, size, count in tqdm(groups, desc="trace", unit="batch", leave=False):
        chosen = [pairs[i] for i in rows]
        batch = pad_pairs(chosen, input_length=size, target_length=target_length)
        fill = ((0, count - len(rows)), (0, 0))
        batch = jax.tree.map(lambda x, fill=fill: np.pad(x, fill), batch)
        for name, routing in to_host(run(state, shard_batch(batch, model.mesh))).items():
            parts.setdefault(name, []).append(_tokens(name, batch, rows, routing))
    stacks = {name: _joined(each) for name, each in parts.items()}
    return RouterTrace(
        model.cfg.name,
        model.cfg.num_experts,
        stacks,
        *(tuple(getattr(p, field) for p in prompts) for field in ("task", "cluster", "domain")),
        truncated=truncated,
    )


def _tokens(name: str, batch: Batch, rows, routing) -> StackTrace:
    """The real tokens of a batch. In the decoder a token is the one that was read."""
    if name == "encoder":
        ids, real, positions = batch.inputs, batch.input_segments > 0, batch.input_positions
    else:
        real, positions = batch.target_segments > 0, batch.target_positions
        ids = np.pad(batch.targets[:, :-1], ((0, 0), (1, 0)))
        ids = np.where(ids == EOS, 0, ids)
    example = np.zeros(len(real), np.int32)
    example[: len(rows)] = rows
    return StackTrace(
        ids[real],
        np.broadcast_to(example[:, None], real.shape)[real],
        positions[real],
        routing.expert[:, real],
        routing.weight[:, real],
        routing.kept[:, real],
        routing.entropy[:, real],
    )


def _joined(parts: Sequence[StackTrace]) -> StackTrace:
    def join(field: str):
        arrays = [getattr(part, field) for part in parts]
        return np.concatenate(arrays, axis=1 if arrays[0].ndim > 1 else 0)

    return StackTrace(**{field.name: join(field.name) for field in fields(StackTrace)})
