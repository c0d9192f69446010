"""Tests that token stores hold the documents, that megatron-core reads them, and that damage is noticed."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.core.shards import read_records
from data_pipeline.tokens import store
from data_pipeline.tokens.tokenizer import Tokenizer
from tests.shards import write_shard


@pytest.fixture
def copied(tokens: Path, tmp_path: Path) -> Path:
    shutil.copytree(tokens / "train" / "code", tmp_path / "code")
    return tmp_path / "code" / "00000"


def test_holds_every_document_between_bos_and_eos(documents: Path, tokens: Path, small_tokenizer: Tokenizer) -> None:
    for path in sorted(documents.glob("train/*/*.zst")):
        opened = store.Store(tokens / "train" / path.parent.name / path.name.split(".")[0])
        records = list(read_records(path))
        assert len(opened) == len(records)
        for number, record in enumerate(records):
            ids = opened.tokens(number)
            assert ids.dtype == np.uint16 and len(ids) == opened.lengths[number]
            assert ids[0] == small_tokenizer.bos_id and ids[-1] == small_tokenizer.eos_id
            assert small_tokenizer.decode(ids[1:-1]) == record["text"]
            assert opened.document_id(number) == record["id"]


def test_megatron_core_reads_it(tokens: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDataset
    prefix = tokens / "train" / "english" / "00001"
    ours, theirs = store.Store(prefix), IndexedDataset(str(prefix))
    assert len(ours) == len(theirs) > 5
    np.testing.assert_array_equal(theirs.sequence_lengths, ours.lengths)
    np.testing.assert_array_equal(theirs.document_indices, np.arange(len(ours) + 1))
    for number in range(len(ours)):
        np.testing.assert_array_equal(theirs[number], ours.tokens(number))
    np.testing.assert_array_equal(theirs.get(3, offset=2, length=5), ours.tokens(3, 2, 7))


def test_wide_vocabularies_take_int32(documents: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    class Wide:
        bos_id, eos_id, sha256, origin = 1, 2, "", "wide"
        vocab_size = store.UINT16_VOCAB

        def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
            return [np.array([65_499, len(text)], np.int32) for text in texts]

    path = write_shard(tmp_path / "a.jsonl.zst", [{"text": "abc", "id": "a"}])
    store.build(path, tmp_path / "wide", Wide())
    opened = store.Store(tmp_path / "wide")
    assert opened.dtype == np.int32 and opened.tokens(0).tolist() == [1, 65_499, 3, 2]


def test_table_says_what_each_document_is(documents: Path, tokens: Path) -> None:
    record = list(read_records(documents / "train/code/00000.jsonl.zst"))[2]
    opened = store.Store(tokens / "train/code/00000")
    row = pq.read_table(opened.file(".parquet")).to_pylist()[2]
    assert row["id"] == record["id"] and row["document"] == 2
    assert (row["file"], row["position"]) == ("code.jsonl.gz", 7)
    assert row["start"] == opened.lengths[:2].sum() and row["length"] == opened.lengths[2]
    assert row["bytes"] == len(record["text"].encode())
    assert row["scores"] == [("quality", 0.5)]
    assert '"collection": "python-stdlib"' in row["metadata"]


def test_same_documents_same_bytes(documents: Path, small_tokenizer: Tokenizer, tokens: Path, tmp_path: Path) -> None:
    written = store.build(documents / "train/chinese/00000.jsonl.zst", tmp_path / "x", small_tokenizer)
    again, first = store.Store(tmp_path / "x"), store.Store(tokens / "train/chinese/00000")
    for suffix in store.SUFFIXES:
        assert again.file(suffix).read_bytes() == first.file(suffix).read_bytes(), suffix
    assert written.tokens == first.num_tokens and written.documents == len(first)
    assert first.facts()["text_bytes"] == written.text_bytes


def test_no_documents_make_an_empty_store(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_shard(tmp_path / "none.jsonl.zst", [])
    assert store.build(path, tmp_path / "none", small_tokenizer) == store.WrittenStore(0, 0, 0)
    assert len(store.Store(tmp_path / "none")) == 0


def test_damage_is_noticed(copied: Path) -> None:
    opened = store.Store(copied)
    content = opened.file(".bin").read_bytes()
    with opened.file(".bin").open("r+b") as file:
        file.truncate(200)
    with pytest.raises(ValueError, match=r"it was cut or belongs to another index; delete the folder of the stage"):
        store.Store(copied)
    index = opened.file(".idx").read_bytes()
    opened.file(".idx").write_bytes(index[:17] + b"\x05" + index[18:])
    with pytest.raises(ValueError, match=r"dtype code 5; what can be read is version 1 with dtype codes 4"):
        store.Store(copied)
    opened.file(".idx").write_bytes(index[:-8])
    with pytest.raises(ValueError, match="it was cut, or its documents have several sequences, which is not supported"):
        store.Store(copied)
    swapped = bytearray(index)  # one token moves from one document's length to another's, so that sizes stay the same
    first, second = (int.from_bytes(index[at : at + 4], "little") for at in (34, 38))
    swapped[34:42] = (first + 1).to_bytes(4, "little") + (second - 1).to_bytes(4, "little")
    opened.file(".idx").write_bytes(swapped)
    opened.file(".bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"00000\.idx does not match its checksum.*delete the folder"):
        store.SourceStores.in_folder(copied.parent)
    opened.file(".idx").write_bytes(b"PK" + index)
    with pytest.raises(ValueError, match=r"is no token index \(it does not start with "):
        store.Store(copied)
    opened.file(".bin").unlink()
    with pytest.raises(ValueError, match=r"no \.bin"):
        store.Store(copied)


def test_a_changed_digit_in_the_manifest_is_noticed(copied: Path) -> None:
    opened = store.Store(copied)
    path = opened.file(".json")
    text = path.read_text()
    for key, value in opened.facts().items():
        changed = text.replace(f'"{key}": {json.dumps(value)}', f'"{key}": {json.dumps(_other(value))}')
        assert changed != text
        path.write_text(changed)
        with pytest.raises(ValueError, match=r"00000\.json .*damaged"):
            opened.facts()
    path.write_text(text.replace('"sha256"', '"sha255"'))
    with pytest.raises(ValueError, match="is damaged"):
        opened.facts()
    path.unlink()
    with pytest.raises(ValueError, match=r"has no \.json file"):
        opened.facts()


def _other(value: int | str) -> int | str:
    return value + 10 if isinstance(value, int) else value[:-1] + ("0" if value[-1] != "0" else "1")


def test_broken_documents_leave_nothing_behind(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    cases = {
        b'{"text": "fine", "id": "1"}\n{"text": 3}\n': "line 2",
        b'{"text": "fine"\n': "line 1",
    }
    for content, message in cases.items():
        path = tmp_path / "bad.jsonl.zst"
        path.write_bytes(zstandard.compress(content))
        with pytest.raises(ValueError, match=message):
            store.build(path, tmp_path / "out" / "00000", small_tokenizer)
    path.write_bytes(zstandard.compress(b'{"text": "fine"}\n' * 1000)[:-12])
    with pytest.raises(ValueError, match=r"bad\.jsonl\.zst: Truncated .*that made it again"):
        store.build(path, tmp_path / "out" / "00000", small_tokenizer)
    with pytest.raises(ValueError, match="No such file"):
        store.build(tmp_path / "absent.jsonl.zst", tmp_path / "out" / "00000", small_tokenizer)
    assert list((tmp_path / "out").iterdir()) == []


def test_shards_count_on_from_store_to_store(tokens: Path) -> None:
    shards = store.SourceStores.in_folder(tokens / "train" / "english")
    first, second = shards.stores
    assert shards.locate(0) == (first, 0)
    assert shards.locate(len(first) - 1) == (first, len(first) - 1)
    assert shards.locate(len(first)) == (second, 0)
    assert len(shards.lengths) == len(first) + len(second)
    with pytest.raises(ValueError, match="no token store"):
        store.SourceStores.in_folder(tokens / "train" / "absent")
