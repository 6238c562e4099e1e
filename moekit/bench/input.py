"""The input pipeline alone: how fast it formats, tokenizes and packs, how full its rows are."""

import os
import resource
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from moekit.data.cache import cache_folder
from moekit.data.corpora import corpus
from moekit.data.flan import flan_mixture
from moekit.data.loader import Stream, batches
from moekit.data.mixture import Mixture
from moekit.data.packing import propose_lengths
from moekit.data.statistics import DataStatistics
from moekit.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from moekit.progress import ProgressBar

SUBMIXTURES = ("niv2", "cot", "dialog")
BATCH_SIZE = 32


def instructions() -> Mixture:
    """NIv2, chain of thought and dialog of the data folder, in FLAN 2022's proportions."""
    flan = flan_mixture("flan2022")
    chosen = [index for index, name in enumerate(flan.submixtures) if name in SUBMIXTURES]
    return replace(flan.select(chosen), name="+".join(SUBMIXTURES))


def unigram(mixture: Mixture, vocab_size: int = 8192) -> Tokenizer:
    """A SentencePiece model of the data folder's text and the mixture, trained once and kept."""
    path = cache_folder() / f"unigram-{vocab_size}-{mixture.digest()}.model"
    if not path.exists():
        documents = corpus("local").documents("train")[::100]
        texts = [document.text for document in documents]
        for prompt in mixture.sample(3000):
            texts.append(f"{prompt.input}\n{prompt.target}")
        train_sentencepiece(texts, path, vocab_size)
    return load_tokenizer(path)


def input_pipeline(
    tokenizer: str | Path = "",
    *,
    input_length: int = 512,
    target_length: int = 128,
    workers: int = 0,
) -> tuple[dict[str, Any], str]:
    """An epoch of `instructions` through `batches`: results, and the same as text.

    tokens_per_second counts real tokens, from the second batch on; rss_mib is the memory of this
    process after the first batch and after each tenth of the epoch.
    """
    mixture = instructions()
    chosen = load_tokenizer(tokenizer) if tokenizer else unigram(mixture)
    stream = batches(
        mixture,
        chosen,
        input_length=input_length,
        target_length=target_length,
        batch_size=BATCH_SIZE,
        seed=0,
        workers=workers,
    )
    epoch = sum(task.train_size for task in mixture.tasks)
    statistics, memory, seconds = _read(stream, epoch)
    proposed = propose_lengths(mixture, chosen)

    tokens = int(statistics.table[:, 1:3].sum())
    result = {
        "mixture": mixture.name,
        "tokenizer": chosen.digest(),
        "input_length": input_length,
        "target_length": target_length,
        "workers": workers,
        "cores": os.cpu_count(),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds),
        "rss_mib": memory,
        "proposed": asdict(proposed),
    }
    result |= statistics.to_dict()
    text = (
        f"{statistics}\n"
        f"{result['tokens_per_second']:,} tokens/s formatted, tokenized and packed\n"
        f"memory {memory[0]:,.0f} MiB after the first batch, {memory[-1]:,.0f} at the end\n"
        f"{proposed}"
    )
    return result, text


def _read(stream: Stream, epoch: int) -> tuple[DataStatistics, list[float], float]:
    """Read an epoch of examples: statistics without the first batch, memory, and seconds."""
    next(stream)
    stream.take_statistics()
    statistics = stream.take_statistics()
    memory = [_rss_mib()]
    start = time.perf_counter()
    num_read = 0
    with ProgressBar(total=epoch, desc="bench input", unit="example") as progress:
        while num_read < epoch:
            next(stream)
            statistics += stream.take_statistics()
            before, num_read = num_read, int(statistics.table[:, 0].sum())
            progress.update(num_read - before)
            if before >= epoch * len(memory) / 10:
                memory.append(_rss_mib())
    seconds = time.perf_counter() - start
    stream.close()
    return statistics, memory, seconds


def _rss_mib() -> float:
    """Memory of this process now; on systems that do not report it, its maximum so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        resident_pages = int(statm.read_text().split()[1])
        return round(resident_pages * resource.getpagesize() / 2**20, 1)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
