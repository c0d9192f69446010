"""Documents to a token store, against sentencepiece called on the same texts in batches."""

import gzip
import json
from pathlib import Path

import sentencepiece

from data_pipeline.store import build
from data_pipeline.tokenizer import Tokenizer, train
from tests.bench.data_pipeline.measure import Result, cpu_seconds, size_mb, texts


def run(source: str, megabytes: float, folder: Path) -> Result:
    documents = texts(source, megabytes)
    folder.mkdir(parents=True)
    path = folder / "documents.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(documents))
    train([path], folder / "tokenizer", 8192 if source == "english" else 4096)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    peer = sentencepiece.SentencePieceProcessor(model_file=tokenizer.origin)
    ours = cpu_seconds(lambda: build(path, folder / "store", tokenizer), times=3)
    theirs = cpu_seconds(lambda: peer.encode(documents, num_threads=1), times=3)
    size = size_mb(documents)
    peer_name = "sentencepiece, no files"
    return Result(f"tokenizing, {source}", size / ours, size / theirs, 1, peer_name)
