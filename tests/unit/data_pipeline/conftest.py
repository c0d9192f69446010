"""Fixtures: a small tokenizer and token stores made from the demo corpus, once per session."""

from pathlib import Path

import pytest

from configs.tokenizer import TokenizerConfig
from data_pipeline.tokens import store, tokenizer, tokenizer_training
from tests.demo_corpus import SOURCES, demo_records
from tests.shards import write_shard


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `<split>/<source>/NNNNN.jsonl.zst` as the documents stage writes it, two training shards a source."""
    folder = tmp_path_factory.mktemp("documents")
    for source in SOURCES:
        records = demo_records(source)
        for number, record in enumerate(records):
            if source == "code":  # so that some documents are shorter than a row
                record["text"] = record["text"][: 60 + 311 * number % 1500]
            record["metadata"] |= {"file": f"{source}.jsonl.gz", "position": 7, "scores": {"quality": 0.5}}
        heldout, train = records[:3], records[3:]
        write_shard(folder / f"heldout/{source}/00000.jsonl.zst", heldout)
        write_shard(folder / f"train/{source}/00000.jsonl.zst", train[: len(train) // 3])
        write_shard(folder / f"train/{source}/00001.jsonl.zst", train[len(train) // 3 :])
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    tokenizer_training.train(
        sorted(documents.glob("train/*/*.zst")), out, TokenizerConfig(vocab_size=3000, train_bytes=600_000)
    )
    return out


@pytest.fixture(scope="session")
def small_tokenizer(tokenizer_folder: Path) -> tokenizer.Tokenizer:
    return tokenizer.Tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="session")
def tokens(documents: Path, small_tokenizer: tokenizer.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the token stores `<split>/<source>/NNNNN.{bin,idx,parquet,json}` of `documents`."""
    folder = tmp_path_factory.mktemp("tokens")
    for path in documents.glob("*/*/*.jsonl.zst"):
        out = folder / path.relative_to(documents).with_name(path.name.removesuffix(".jsonl.zst"))
        store.build(path, out, small_tokenizer)
    return folder
