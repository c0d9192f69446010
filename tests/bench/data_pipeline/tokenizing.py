"""Documents to a token store, against sentencepiece called on the same texts in batches.

Cold is the first file that a task meets, with an empty table of parts (`data_pipeline.bpe_cache`); warm is a later one,
which here is the same again and so at the far end: text never seen before lies between the two. Ours reads gzipped
JSONL and writes the store; the peer gets the texts in memory and returns lists. The ids are the same.
"""

import gzip
import json
from pathlib import Path

import numpy as np
import sentencepiece

from data_pipeline.store import build
from data_pipeline.tokenizer import Tokenizer, train
from tests.bench.data_pipeline.measure import Result, cpu_seconds, size_mb, texts


def run(source: str, megabytes: float, folder: Path) -> list[Result]:
    documents = texts(source, megabytes)
    folder.mkdir(parents=True)
    path = folder / "documents.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(documents))
    train([path], folder / "tokenizer", 8192 if source == "english" else 4096)
    origin = Tokenizer.load(folder / "tokenizer").origin
    peer = sentencepiece.SentencePieceProcessor(model_file=origin)
    Tokenizer.load(folder / "tokenizer").encode_arrays(["Compiled before the clock starts."])
    tokenizer = Tokenizer.load(folder / "tokenizer")
    cold = cpu_seconds(lambda: build(path, folder / "store", tokenizer))
    warm = cpu_seconds(lambda: build(path, folder / "store", tokenizer), times=3)
    theirs = cpu_seconds(lambda: peer.encode(documents, num_threads=1), times=3)
    equal = sum(
        np.array_equal(ours, ids)
        for ours, ids in zip(tokenizer.encode_arrays(documents), peer.encode(documents, num_threads=1), strict=True)
    )
    size, peer_name = size_mb(documents), "sentencepiece in batches, no files"
    said = f"equal ids in {equal} of {len(documents)} documents"
    return [
        Result(f"tokenizing, {source}, {state}", size, ours, theirs, 1, peer_name, said)
        for state, ours in (("cold", cold), ("warm", warm))
    ]
