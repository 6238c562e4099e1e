"""Our encoder-decoder beside that of transformers: the same work, threads and drops, in one run.

Each has a process of its own and both take their turns; `moekit bench` lets both keep freed memory.

T5 v1.0 (ReLU, tied and scaled logits) of 4 + 4 layers, every second one sparse for Switch; float32
on the CPU, forward with its loss, and forward + backward. transformers drops what exceeds
`expert_capacity` of a sequence, which is set to its length, and ours is dropless: neither drops.
"""

import multiprocessing
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import jax
import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from moekit.bench.timings import full_batch, interleaved, ratio
from moekit.config import ModelConfig
from moekit.data.batch import Batch
from moekit.model.transformer import EncoderDecoder
from moekit.training.step import auxiliary_losses, token_losses

LAYERS, HEAD_DIM = 4, 64  # of each stack; features of a head
DIRECTIONS = ("forward", "forward + backward")
_FUNCTIONS: dict[str, Callable] = {}  # of each direction, in the process that runs them


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
) -> list[dict]:
    """Median and least ms of both; ratio is ours over theirs, 0 experts is dense.

    Raises:
      ValueError: torch or transformers is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(
            f'bench peers compares with transformers on torch ({error}): pip install -e ".[parity]"'
        ) from error
    # XLA takes every processor that the process may use
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    peer = f"transformers {transformers.__version__}, torch {torch.__version__}"
    sizes = {"batch": batch, "input_length": input_length, "target_length": target_length}
    setting = sizes | {"vocab_size": vocab_size, "threads": threads, "peer": peer}
    shape = {"d_model": d_model, "d_ff": d_ff, "num_heads": max(1, d_model // HEAD_DIM)}
    work, rows = (shape | {"vocab_size": vocab_size}, sizes, threads), []
    for count in tqdm(experts, desc="bench peers", unit="model"):
        # a process each: their threads and their memory do not get into each other's way
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, spawn) as ours, ProcessPoolExecutor(1, spawn) as theirs:
            pools = {"ours": ours, "peer": theirs}
            dropped = {w: p.submit(_start, w, count, *work).result() for w, p in pools.items()}
            steps = {
                (who, d): lambda pool=pool, d=d: pool.submit(_call, d).result()
                for d in DIRECTIONS
                for who, pool in pools.items()
            }
            interleaved(steps, 1)  # memory grows to its size
            times = interleaved(steps, repeats)
        for direction in DIRECTIONS:
            our_ms, peer_ms = times["ours", direction], times["peer", direction]
            rows.append(
                {
                    "model": "switch" if count else "t5",
                    "experts": count,
                    "direction": direction,
                    "ours_ms": round(statistics.median(our_ms), 3),
                    "peer_ms": round(statistics.median(peer_ms), 3),
                    "ratio": ratio(our_ms, peer_ms),
                    "min_ratio": ratio(our_ms, peer_ms, min),
                    "dropped_ours": dropped["ours"],
                    "dropped_peer": dropped["peer"],
                    **setting,
                }
            )
    return rows


def _start(who: str, experts: int, shape: dict[str, int], sizes, threads: int) -> int:
    """Make one of the models in this process; returns how many choices it drops."""
    data = full_batch(*sizes.values(), shape["vocab_size"])
    ours = who == "ours"
    made = _ours(_config(experts, shape), data) if ours else _theirs(experts, shape, data, threads)
    _FUNCTIONS.update(made[0])
    return made[1]


def _call(direction: str) -> None:
    _FUNCTIONS[direction]()


def _config(experts: int, shape: dict[str, int]) -> ModelConfig:
    sparse = {"num_experts": experts, "dispatch": "dropless"} if experts else {}
    sparse |= {f"{stack}_moe_layers": LAYERS // 2 for stack in ("encoder", "decoder")}
    return ModelConfig(
        name="switch" if experts else "t5",
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        head_dim=HEAD_DIM,
        activation="relu",
        tied_logits=True,
        dropout=0.0,
        **shape,
        **sparse,
    )


def _ours(cfg: ModelConfig, data: Batch) -> tuple[dict[str, Callable], int]:
    """Functions of each direction, compiled, and how many choices were dropped."""
    graphdef, state = nnx.split(EncoderDecoder(cfg))

    def loss(state, batch):
        out = nnx.merge(graphdef, state)(batch)
        sums = token_losses(out.logits, batch.targets, batch.loss_weights)
        dropped = sum(stats.dropped_assignments.sum() for stats in out.stats.values())
        auxiliary = sum(auxiliary_losses(cfg, out.stats).values())
        return sums["objective"] / sums["count"] + auxiliary, jnp.asarray(dropped)

    def run(function):
        jax.block_until_ready(function(state, data))  # compiles
        return lambda: jax.block_until_ready(function(state, data))

    forward, both = jax.jit(loss), jax.jit(jax.value_and_grad(loss, has_aux=True))
    functions = dict(zip(DIRECTIONS, map(run, (forward, both)), strict=True))
    return functions, int(forward(state, data)[1])


def _theirs(experts: int, shape: dict[str, int], data: Batch, threads: int):
    """The same of transformers, its dropped choices counted at its routers."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    options = {
        **shape,
        "d_kv": HEAD_DIM,
        "num_layers": LAYERS,
        "num_decoder_layers": LAYERS,
        "dropout_rate": 0.0,
        "use_cache": False,
        "decoder_start_token_id": 0,
    }
    if experts:
        config = transformers.SwitchTransformersConfig(
            **options,
            num_experts=experts,
            num_sparse_encoder_layers=LAYERS // 2,
            num_sparse_decoder_layers=LAYERS // 2,
            expert_capacity=max(data.inputs.shape[1], data.targets.shape[1]),
            router_jitter_noise=0.0,
        )
        model = transformers.SwitchTransformersForConditionalGeneration(config)
    else:
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**options))
    sides = (("input_ids", data.inputs), ("labels", data.targets))
    tokens = {name: torch.tensor(x.tolist()) for name, x in sides}
    dropped = []

    def count(module, _, outputs):
        chosen = outputs[0]  # one-hot, all zero where the choice found no place
        dropped.append(int((chosen.sum(-1) == 0).sum()))

    def forward():
        with torch.no_grad():
            return model(**tokens).loss

    def both():
        model.zero_grad()
        model(**tokens).loss.backward()

    routers = [m for m in model.modules() if type(m).__name__.endswith("Router")]
    hooks = [router.register_forward_hook(count) for router in routers]
    forward()
    for hook in hooks:
        hook.remove()
    both()
    return dict(zip(DIRECTIONS, (forward, both), strict=True)), sum(dropped)
