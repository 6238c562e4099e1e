"""The data of a run: its stream of training batches, their order, and the validation batches."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from moekit.config import TrainConfig
from moekit.data.batch import Batch, stack_rows
from moekit.data.loader import OnWait, Stream, batches
from moekit.data.tokenizer import Tokenizer
from moekit.distributed import allgather_objects, make_global_batch, process_shard

VALIDATION_BATCHES = 16


class StalledInput(TimeoutError):
    """No batch arrived within the time that the configuration allows."""


class RunData:
    """What a run reads.

    Args:
      source: of training and, in order 0, of everything that `batches` makes with the run's seed.
      eval_source: its "valid" split is `validation`.
      on_wait: called with the seconds waited while a training batch is waited for.

    Raises:
      ValueError: eval_source has no usable valid split.
    """

    def __init__(
        self,
        source: Any,
        eval_source: Any,
        config: TrainConfig,
        tokenizer: Tokenizer,
        mesh: Mesh | None,
        on_wait: OnWait,
    ) -> None:
        self.source = source
        self.config = config
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.on_wait = on_wait
        self.shard = process_shard(mesh)
        self.order = 0
        self.stream = self._open_stream()
        self.validation = self._read_validation(eval_source)

    def read_batch(self) -> Batch:
        """The next training batch, on the devices."""
        return make_global_batch(next(self.stream), self.mesh)

    def set_state(self, order: int, position: Mapping[str, str]) -> None:
        """Continue from a position in an order of the data."""
        if order != self.order:
            self.change_order(order)
        self.stream.set_state(position)

    def change_order(self, order: int) -> None:
        """Read the data from its beginning, in another order; 0 is that of a new run."""
        self.stream.close()
        self.order = order
        self.stream = self._open_stream()

    def _open_stream(self) -> Stream:
        seed = order_seed(self.config.seed, self.order)
        stream = self._read_split(self.source, "train", seed=seed, repeat=True)
        stream.on_wait = self.on_wait
        return stream

    def _read_split(self, source: Any, split: str, *, seed: int, repeat: bool) -> Stream:
        return batches(
            source,
            self.tokenizer,
            input_length=self.config.input_length,
            target_length=self.config.target_length,
            batch_size=self.config.batch_size,
            seed=seed,
            split=split,
            repeat=repeat,
            shard=self.shard,
            workers=self.config.data_workers if repeat else 0,
        )

    def _read_validation(self, eval_source: Any) -> list[Batch]:
        """The first batches of a source's "valid" split; none without a source."""
        if eval_source is None:
            return []
        try:
            stream = self._read_split(eval_source, "valid", seed=0, repeat=False)
            found = list(itertools.islice(stream, VALIDATION_BATCHES))
        except (TypeError, ValueError, LookupError) as error:
            raise ValueError(f"eval_source has no usable valid split: {error}") from error
        stream.close()
        # processes may run out of rows at different times: fill up with empty batches
        num_batches = max(allgather_objects(len(found)))
        if num_batches == 0:
            raise ValueError(
                "eval_source has no examples in its valid split: pass a source that has some, or "
                "no eval_source"
            )
        num_rows = self.config.batch_size // self.shard[1]
        blank = stack_rows([[]] * num_rows, (self.config.input_length, self.config.target_length))
        return found + [blank] * (num_batches - len(found))


def order_seed(seed: int, order: int) -> int:
    """The seed of an order of the data: the run's own for order 0."""
    if order == 0:
        return seed
    return int(np.random.SeedSequence((seed, order)).generate_state(1)[0])
