"""Our encoder-decoder beside that of transformers: the same work, threads and drops, in one run.

Each side runs in a process of its own and the two take turns; `moekit bench` lets both keep freed
memory. The models are T5 v1.0 (ReLU, tied and scaled logits) of 4 + 4 layers, every second one
sparse for Switch, in float32 on the CPU; timed are forward with its loss, and forward + backward.
transformers drops what exceeds `expert_capacity` of a sequence, which is set to its length, and
ours is dropless: neither drops a token.
"""

import statistics
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from moekit.bench.sides import (
    BASELINE,
    OURS,
    Functions,
    baseline_versions,
    compare,
    num_threads,
)
from moekit.bench.timing import full_batch, median_ratio, min_ratio
from moekit.config import ModelConfig
from moekit.data.batch import Batch
from moekit.model.transformer import EncoderDecoder
from moekit.progress import ProgressBar
from moekit.training.step import auxiliary_losses, token_losses

NUM_LAYERS = 4  # of each stack
HEAD_DIM = 64
FORWARD = "forward"
FORWARD_BACKWARD = "forward + backward"
DIRECTIONS = (FORWARD, FORWARD_BACKWARD)


@dataclass(frozen=True)
class Work:
    """What both sides compute."""

    num_experts: int  # 0: dense
    batch: int
    input_length: int
    target_length: int
    d_model: int
    d_ff: int
    vocab_size: int
    threads: int

    @property
    def num_heads(self) -> int:
        return max(1, self.d_model // HEAD_DIM)

    def tokens(self) -> Batch:
        return full_batch(self.batch, self.input_length, self.target_length, self.vocab_size)


def peers(
    *,
    experts: tuple[int, ...] = (0, 8, 32),
    batch: int = 8,
    input_length: int = 128,
    target_length: int = 128,
    d_model: int = 256,
    d_ff: int = 1024,
    vocab_size: int = 32_128,
    repeats: int = 9,
) -> list[dict[str, Any]]:
    """Time our models beside those of transformers; `ratio` is our time over theirs.

    Args:
      experts: numbers of experts to compare; 0 is a dense T5.
      batch: rows of a batch.
      input_length: tokens of an input.
      target_length: tokens of a target.
      d_model: width of the models.
      d_ff: hidden features of a feed-forward layer.
      vocab_size: size of the vocabulary.
      repeats: timed calls of each function.

    Raises:
      ValueError: torch or transformers is not installed.
    """
    baseline = baseline_versions("peers")
    rows = []
    for num_experts in ProgressBar(experts, desc="bench peers", unit="model"):
        work = Work(
            num_experts=num_experts,
            batch=batch,
            input_length=input_length,
            target_length=target_length,
            d_model=d_model,
            d_ff=d_ff,
            vocab_size=vocab_size,
            threads=num_threads(),
        )
        times, dropped = compare(our_functions, _transformers_functions, work, repeats)
        for direction in DIRECTIONS:
            our_ms = times[OURS, direction]
            baseline_ms = times[BASELINE, direction]
            rows.append(
                {
                    "model": "switch" if num_experts else "t5",
                    "experts": num_experts,
                    "direction": direction,
                    "ours_ms": round(statistics.median(our_ms), 3),
                    "peer_ms": round(statistics.median(baseline_ms), 3),
                    "ratio": median_ratio(our_ms, baseline_ms),
                    "min_ratio": min_ratio(our_ms, baseline_ms),
                    "dropped_ours": dropped[OURS],
                    "dropped_peer": dropped[BASELINE],
                    "batch": batch,
                    "input_length": input_length,
                    "target_length": target_length,
                    "vocab_size": vocab_size,
                    "threads": work.threads,
                    "peer": baseline,
                }
            )
    return rows


def our_config(work: Work) -> ModelConfig:
    """T5 v1.0, or Switch with every second layer sparse."""
    num_sparse = NUM_LAYERS // 2 if work.num_experts else 0
    return ModelConfig(
        name="switch" if work.num_experts else "t5",
        d_model=work.d_model,
        d_ff=work.d_ff,
        num_heads=work.num_heads,
        head_dim=HEAD_DIM,
        encoder_layers=NUM_LAYERS,
        decoder_layers=NUM_LAYERS,
        vocab_size=work.vocab_size,
        activation="relu",
        tied_logits=True,
        dropout=0.0,
        num_experts=work.num_experts,
        encoder_moe_layers=num_sparse,
        decoder_moe_layers=num_sparse,
        dispatch="dropless" if work.num_experts else "capacity",
    )


def our_functions(work: Work) -> tuple[Functions, int]:
    """Our compiled functions by direction, and how many choices they drop."""
    cfg = our_config(work)
    tokens = work.tokens()
    graphdef, state = nnx.split(EncoderDecoder(cfg))

    def loss(state: nnx.State, batch: Batch) -> tuple[Array, Array]:
        output = nnx.merge(graphdef, state)(batch)
        sums = token_losses(output.logits, batch.targets, batch.loss_weights)
        num_dropped = jnp.zeros(())
        for stats in output.stats.values():
            num_dropped += stats.dropped_assignments.sum()
        auxiliary = sum(auxiliary_losses(cfg, output.stats).values())
        return sums["objective"] / sums["count"] + auxiliary, num_dropped

    forward = jax.jit(loss)
    forward_backward = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def run_forward() -> object:
        return jax.block_until_ready(forward(state, tokens))

    def run_forward_backward() -> object:
        return jax.block_until_ready(forward_backward(state, tokens))

    _, num_dropped = run_forward()  # compiles
    run_forward_backward()
    functions = {FORWARD: run_forward, FORWARD_BACKWARD: run_forward_backward}
    return functions, int(num_dropped)


def _transformers_functions(work: Work) -> tuple[Functions, int]:
    """The functions of transformers; dropped choices are counted at its routers."""
    import torch

    torch.set_num_threads(work.threads)
    model = transformers_model(work)
    batch = work.tokens()
    input_ids = torch.tensor(batch.inputs.tolist())
    labels = torch.tensor(batch.targets.tolist())
    dropped_per_router = []

    def count_dropped(module: Any, inputs: Any, outputs: Any) -> None:
        chosen = outputs[0]  # one-hot; all zero where the choice found no slot
        dropped_per_router.append(int((chosen.sum(-1) == 0).sum()))

    def forward() -> object:
        with torch.no_grad():
            return model(input_ids=input_ids, labels=labels).loss

    def forward_backward() -> None:
        model.zero_grad()
        model(input_ids=input_ids, labels=labels).loss.backward()

    hooks = []
    for module in model.modules():
        if type(module).__name__.endswith("Router"):
            hooks.append(module.register_forward_hook(count_dropped))
    forward()
    for hook in hooks:
        hook.remove()
    forward_backward()
    functions = {FORWARD: forward, FORWARD_BACKWARD: forward_backward}
    return functions, sum(dropped_per_router)


def transformers_model(work: Work) -> Any:
    """T5 or Switch of transformers, randomly initialised, with a slot for every token."""
    import transformers

    if not work.num_experts:
        config = transformers.T5Config(
            d_model=work.d_model,
            d_ff=work.d_ff,
            num_heads=work.num_heads,
            vocab_size=work.vocab_size,
            d_kv=HEAD_DIM,
            num_layers=NUM_LAYERS,
            num_decoder_layers=NUM_LAYERS,
            dropout_rate=0.0,
            use_cache=False,
            decoder_start_token_id=0,
        )
        return transformers.T5ForConditionalGeneration(config)
    config = transformers.SwitchTransformersConfig(
        d_model=work.d_model,
        d_ff=work.d_ff,
        num_heads=work.num_heads,
        vocab_size=work.vocab_size,
        d_kv=HEAD_DIM,
        num_layers=NUM_LAYERS,
        num_decoder_layers=NUM_LAYERS,
        dropout_rate=0.0,
        use_cache=False,
        decoder_start_token_id=0,
        num_experts=work.num_experts,
        num_sparse_encoder_layers=NUM_LAYERS // 2,
        num_sparse_decoder_layers=NUM_LAYERS // 2,
        expert_capacity=max(work.input_length, work.target_length),
        router_jitter_noise=0.0,
    )
    return transformers.SwitchTransformersForConditionalGeneration(config)
