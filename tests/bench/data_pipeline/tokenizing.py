"""Tokenizing beside sentencepiece on the same texts in batches, and shards of documents into a token store.

"Cold" is the first file of a task, with an empty cache (`tokens.bpe_cache`); "warm" is the next, of other documents.
Trivium returns arrays, the peer lists; the ids are the same. The row of the store includes Trivium's reading of files,
checksums and writing, the peer's does not.
"""

import statistics
from functools import partial
from pathlib import Path

import numpy as np
import sentencepiece

from configs.tokenizer import TokenizerConfig
from data_pipeline.tokens.store import build
from data_pipeline.tokens.tokenizer import Tokenizer
from data_pipeline.tokens.tokenizer_training import train
from tests.bench.data_pipeline.measure import Result, cpu_seconds, size_mb, texts
from tests.shards import write_shard

_PEER = "sentencepiece in batches, no files"


def run(source: str, megabytes: float, folder: Path) -> list[Result]:
    documents = texts(source, 2 * megabytes)
    halves = {"cold": documents[::2], "warm": documents[1::2]}
    folder.mkdir(parents=True)
    paths = {state: folder / f"{state}.jsonl.zst" for state in halves}
    for state, half in halves.items():
        write_shard(paths[state], ({"id": str(n), "text": text} for n, text in enumerate(half)))
    train(list(paths.values()), folder / "tokenizer", TokenizerConfig(vocab_size=8192 if source == "english" else 4096))
    tokenizer = Tokenizer.load(folder / "tokenizer")
    peer = sentencepiece.SentencePieceProcessor(model_file=tokenizer.origin)
    build(paths["cold"], folder / "warm-up", tokenizer)
    theirs = {
        state: cpu_seconds(lambda half=half: peer.encode(half, num_threads=1), times=3)
        for state, half in halves.items()
    }
    rows = []
    for state, half in halves.items():
        ours = []
        for _ in range(3):
            tokenizer = Tokenizer.load(folder / "tokenizer")
            if state == "warm":
                tokenizer.encode_arrays(halves["cold"])
            encode = partial(tokenizer.encode_arrays, half)
            ours.append(cpu_seconds(encode))
        pairs = zip(tokenizer.encode_arrays(half), peer.encode(half, num_threads=1), strict=True)
        said = f"equal ids in {sum(np.array_equal(mine, its) for mine, its in pairs)} of {len(half)} documents"
        size, seconds = size_mb(half), statistics.median(ours)
        rows.append(Result(f"tokenizing, {source}, {state}", size, seconds, theirs[state], 1, _PEER, said))
    tokenizer = Tokenizer.load(folder / "tokenizer")
    build(paths["cold"], folder / "first", tokenizer)
    stored = cpu_seconds(lambda: build(paths["warm"], folder / "store", tokenizer))
    return [*rows, Result(f"documents to a token store, {source}", size, stored, theirs["warm"], None, _PEER)]
