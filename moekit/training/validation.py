"""The loss of a model on batches that are not trained on."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from moekit.data.batch import Batch
from moekit.distributed import make_global_batch
from moekit.model.transformer import EncoderDecoder
from moekit.training.step import token_losses


@functools.lru_cache(maxsize=16)
def _compiled_losses(graphdef: nnx.GraphDef) -> Callable[[nnx.State, Batch], dict[str, Any]]:
    def losses(state: nnx.State, batch: Batch) -> dict[str, Any]:
        output = nnx.merge(graphdef, state)(batch)
        return token_losses(output.logits, batch.targets, batch.loss_weights)

    return jax.jit(losses)


def evaluate_loss(model: EncoderDecoder, stream: Sequence[Batch]) -> dict[str, float]:
    """Cross-entropy (nats a target token) and next-token accuracy: ratios of sums.

    On several hosts the stream holds this process's shard of each batch.
    """
    graphdef, state = nnx.split(model)
    losses = _compiled_losses(graphdef)
    totals = {"cross_entropy": 0.0, "hits": 0.0, "count": 0.0}
    for batch in stream:
        sums = losses(state, make_global_batch(batch, model.mesh))
        # one batch at a time: concurrent collectives compete for the threads of a small machine
        sums = jax.device_get(sums)
        for name in totals:
            totals[name] += float(sums[name])
    return {
        "valid_loss": totals["cross_entropy"] / totals["count"],
        "valid_accuracy": totals["hits"] / totals["count"],
    }
