"""The input pipeline alone: how fast it formats, tokenizes and packs, how full its rows are."""

import os
import resource
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from moekit.data.flan import flan_mixture
from moekit.data.mixture import Mixture
from moekit.data.packing import propose_lengths
from moekit.data.pipeline import batches
from moekit.data.sources import corpus
from moekit.data.stats import Counts
from moekit.data.stream import Stream
from moekit.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

PARTS = ("niv2", "cot", "dialog")


def instructions() -> Mixture:
    """NIv2, chain of thought and dialog of the data folder, in FLAN 2022's proportions."""
    whole = flan_mixture("flan2022")
    keep = [i for i, part in enumerate(whole.parts) if part in PARTS]
    fields = ("tasks", "weights", "formats", "parts")
    chosen = {name: tuple(getattr(whole, name)[i] for i in keep) for name in fields}
    return replace(whole, name="+".join(PARTS), **chosen)


def unigram(mixture: Mixture, vocab_size: int = 8192) -> Tokenizer:
    """A SentencePiece model of the data folder's text and the mixture, trained once and kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    path = cache / "moekit" / f"unigram-{vocab_size}-{mixture.digest()}.model"
    if not path.exists():
        texts = [document.text for document in corpus("mirror").documents("train")[::100]]
        texts += [f"{p.input}\n{p.target}" for p in mixture.sample(3000)]
        train_sentencepiece(texts, path, vocab_size)
    return load_tokenizer(path)


def input_pipeline(
    tokenizer: str | Path | None = None,
    *,
    input_length: int = 512,
    target_length: int = 128,
    batch_size: int = 32,
    workers: int = 0,
    seed: int = 0,
) -> tuple[dict, str]:
    """An epoch of `instructions` through `batches`: figures, and the same as text.

    tokens_per_second counts real tokens, from the second batch on; rss_mib is the memory of this
    process after the first batch and after each tenth of the epoch.
    """
    mixture = instructions()
    tokenizer = load_tokenizer(tokenizer) if tokenizer else unigram(mixture)
    lengths = {"input_length": input_length, "target_length": target_length}
    options = {"batch_size": batch_size, "seed": seed, "workers": workers}
    stream = batches(mixture, tokenizer, **lengths, **options)
    counts, memory, seconds = _epoch(stream, sum(task.train_size for task in mixture.tasks))
    stream.close()
    speed = round(int(counts.table[:, 1:3].sum()) / seconds)
    proposed = propose_lengths(mixture, tokenizer, seed=seed)
    found = {"mixture": mixture.name, "tokenizer": tokenizer.digest(), **lengths, **options}
    found |= {"seconds": round(seconds, 1), "tokens_per_second": speed, "rss_mib": memory}
    text = (
        f"{counts}\n{speed:,} tokens/s formatted, tokenized and packed with {workers or 'no'} "
        f"workers on {os.cpu_count()} cores\nmemory {memory[0]:,.0f} MiB after the first batch, "
        f"{memory[1]:,.0f} after a tenth of the epoch, {memory[-1]:,.0f} at its end\n{proposed}"
    )
    return found | {"proposed": asdict(proposed)} | counts.to_dict(), text


def _epoch(stream: Stream, examples: int) -> tuple[Counts, list[float], float]:
    """Counts and seconds of batches with so many examples, without the first; memory."""
    next(stream)
    stream.take_counts()
    counts, memory, start = stream.take_counts(), [_rss_mib()], time.perf_counter()
    with tqdm(total=examples, desc="bench input", unit="example") as bar:
        while (done := counts.row()["examples"]) < examples:
            next(stream)
            counts += stream.take_counts()
            bar.update(counts.row()["examples"] - done)
            if done >= examples * len(memory) / 10:
                memory.append(_rss_mib())
    return counts, memory, time.perf_counter() - start


def _rss_mib() -> float:
    """Memory of this process now; where the system does not say, the most it ever was."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return round(int(statm.read_text().split()[1]) * resource.getpagesize() / 2**20, 1)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
