"""Tests that shards are read as they were written, and that a damaged shard is an error."""

import os
import time
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import zstandard
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers.jsonl import JsonlReader

from data_pipeline.core.integrity import file_sha256, is_seal, seal, unseal
from data_pipeline.core.shards import (
    ShardReader,
    TextWriter,
    read_records,
    shard_path,
    shards_under,
    write_records,
)
from tests.shards import write_shard

TEXTS = {"b/00000": ["line\nline", "\u2028 \x85 no line ends", "🙂 " * 200_000], "a/00001": ["春眠不觉晓"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "shards")


def document(shard: str, row: int, text: str) -> Document:
    return Document(text=text, id=f"{shard}:{row}", metadata={"source": shard[0], "shard": shard})


def record(_: PipelineStep, one: Document) -> dict[str, Any]:
    return {"text": one.text, "id": one.id, "metadata": {}}


def written(folder: Path) -> Path:
    documents = (document(shard, row, text) for shard, texts in TEXTS.items() for row, text in enumerate(texts))
    list(TextWriter(str(folder), "${shard}", record).run(documents))
    return folder


def test_texts_come_back_in_their_rows(folder: Path, tmp_path: Path) -> None:
    (progress := tmp_path / "progress").mkdir()
    assert shards_under(folder) == ["a/00001", "b/00000"]
    read = list(ShardReader(str(folder), shards_under(folder), str(progress)).run())
    found = [(one.metadata["shard"], one.metadata["row"], one.id, one.text) for one in read]
    assert found == [
        (shard, row, f"{shard}:{row}", text) for shard in sorted(TEXTS) for row, text in enumerate(TEXTS[shard])
    ]
    assert [one.metadata["bytes"] for one in read] == [len(one.text.encode()) for one in read]


def test_datatrove_and_zstd_read_them_and_bytes_are_the_same_again(folder: Path, tmp_path: Path) -> None:
    assert sorted(one.text for one in JsonlReader(str(folder)).run()) == sorted(chain.from_iterable(TEXTS.values()))
    again = written(tmp_path / "again")
    for shard in TEXTS:
        content = shard_path(folder, shard).read_bytes()
        assert content == shard_path(again, shard).read_bytes()
        assert zstandard.get_frame_parameters(content).has_checksum


def test_a_task_of_many_shards_has_few_files_open(tmp_path: Path) -> None:
    shards = [f"a/{number:05d}" for number in range(300)]
    opened = set()

    def counting(step: PipelineStep, one: Document) -> dict[str, Any]:
        opened.add(len(os.listdir("/proc/self/fd")))
        return record(step, one)

    writer = TextWriter(str(tmp_path), "${shard}", counting)
    list(writer.run(document(shard, row, "text") for shard in shards for row in range(2)))
    assert max(opened) - min(opened) <= 1
    assert shards_under(tmp_path) == shards
    assert {len(list(read_records(shard_path(tmp_path, shard)))) for shard in shards} == {2}


def test_a_closed_shard_is_not_begun_anew(tmp_path: Path) -> None:
    mixed = [document("a/0", 0, "one"), document("a/1", 0, "two"), document("a/0", 1, "three")]
    with pytest.raises(ValueError, match="shard a/0 of a do not come one after another"):
        list(TextWriter(str(tmp_path), "${shard}", record).run(iter(mixed)))


def test_a_damaged_shard_is_never_a_shorter_one(folder: Path) -> None:
    path = shard_path(folder, "b/00000")
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"b/00000\.jsonl\.zst(, line \d+)?: .*; delete the folder"):
            list(read_records(path))
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        with pytest.raises(ValueError, match=r"b/00000\.jsonl\.zst(, line \d+)?: .*; delete the folder"):
            list(read_records(path))
    path.unlink()
    with pytest.raises(ValueError, match="No such file"):
        list(read_records(path))


@pytest.mark.parametrize("record", [{"id": "a"}, {"text": 3}, {"text": ""}, ["text"]])
def test_a_record_without_text_names_its_line(record: dict, tmp_path: Path) -> None:
    path = write_shard(tmp_path / "00000.jsonl.zst", [{"text": "sound"}, record])
    with pytest.raises(ValueError, match=r"line 2: expected an object with text"):
        list(read_records(path))


def test_a_file_that_is_written_again_is_not_given_the_checksum_of_its_old_content(tmp_path: Path) -> None:
    path = tmp_path / "00000.jsonl.zst"
    for texts in ("one", "two"), ("three",):
        write_records(path, ({"text": text} for text in texts))
    assert unseal(path) == file_sha256(path)
    seal(path)
    path.write_bytes(b"another")
    os.utime(path, ns=(time.time_ns() + 10**9, time.time_ns() + 10**9))
    assert unseal(path) == file_sha256(path)
    assert not [one for one in tmp_path.iterdir() if is_seal(one)]
