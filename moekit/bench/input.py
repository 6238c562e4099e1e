"""The input pipeline alone: how fast it formats, tokenizes and packs, how full its rows are."""

import os
import resource
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from moekit.data.flan import flan_mixture
from moekit.data.loader import batches
from moekit.data.mixture import Mixture
from moekit.data.packing import propose_lengths
from moekit.data.sources import corpus
from moekit.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

PARTS = ("niv2", "cot", "dialog")


def instructions() -> Mixture:
    """NIv2, chain of thought and dialog of the data folder, in FLAN 2022's proportions."""
    whole = flan_mixture("flan2022")
    keep = [i for i, part in enumerate(whole.submixtures) if part in PARTS]
    fields = ("tasks", "weights", "formats", "submixtures")
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
    tokenizer: str | Path = "",
    *,
    input_length: int = 512,
    target_length: int = 128,
    workers: int = 0,
) -> tuple[dict, str]:
    """An epoch of `instructions` through `batches`: figures, and the same as text.

    tokens_per_second counts real tokens, from the second batch on; rss_mib is the memory of this
    process after the first batch and after each tenth of the epoch.
    """
    mixture = instructions()
    tokenizer = load_tokenizer(tokenizer) if tokenizer else unigram(mixture)
    lengths = {"input_length": input_length, "target_length": target_length}
    stream = batches(mixture, tokenizer, **lengths, batch_size=32, seed=0, workers=workers)
    epoch = sum(task.train_size for task in mixture.tasks)
    next(stream)
    stream.take_statistics()
    counts, memory, start = stream.take_statistics(), [_rss_mib()], time.perf_counter()
    with tqdm(total=epoch, desc="bench input", unit="example") as bar:
        while (done := counts.row()["examples"]) < epoch:
            next(stream)
            counts += stream.take_statistics()
            bar.update(counts.row()["examples"] - done)
            if done >= epoch * len(memory) / 10:
                memory.append(_rss_mib())
    seconds = time.perf_counter() - start
    stream.close()
    proposed = propose_lengths(mixture, tokenizer)
    found = {"mixture": mixture.name, "tokenizer": tokenizer.digest(), **lengths}
    found |= {"workers": workers, "cores": os.cpu_count(), "seconds": round(seconds, 1)}
    found["tokens_per_second"] = round(int(counts.table[:, 1:3].sum()) / seconds)
    found |= {"rss_mib": memory, "proposed": asdict(proposed), **counts.to_dict()}
    text = (
        f"{counts}\n{found['tokens_per_second']:,} tokens/s formatted, tokenized and packed\n"
        f"memory {memory[0]:,.0f} MiB after the first batch, {memory[-1]:,.0f} at the end\n"
        f"{proposed}"
    )
    return found, text


def _rss_mib() -> float:
    """Memory of this process now; where the system does not say, the most it ever was."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return round(int(statm.read_text().split()[1]) * resource.getpagesize() / 2**20, 1)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
