"""Tests JSON lines in UTF-16 and UTF-32: sources, the check of their keys, and evaluation files."""

import gzip
import json
from pathlib import Path

import pytest

from configs.cuts import DecontaminateConfig
from configs.loader import ConfigError
from configs.sources import ExtractConfig, SourceConfig
from data_pipeline.cutting.evaluation_items import read_items
from data_pipeline.reading.keys import check_keys
from data_pipeline.reading.source_reader import find_units
from tests.unit.data_pipeline.reading.encodings import JAPANESE, RUSSIAN
from tests.unit.data_pipeline.reading.raw_files import read, reasons

TEXTS = [RUSSIAN, JAPANESE, "plain", "𝔘nicode \ufffd with a replacement character of its own", "ਊ\u0a0a\u0a00 \u0d0a"]
UNMARKED = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
CODECS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", *UNMARKED)


def lines(texts: list[str], end: str = "\n") -> str:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + end for text in texts)


@pytest.mark.parametrize("codec", CODECS)
def test_json_lines_are_read_in_every_encoding_of_unicode(tmp_path: Path, codec: str) -> None:
    for end in ("\n", "\r\n", "\n\n"):
        content = lines(TEXTS, end).encode(codec)
        for packed in (content, gzip.compress(content[:99]) + gzip.compress(content[99:])):  # within a character
            found = read(tmp_path / "a.jsonl", packed)
            assert [(record.text, record.reason) for record in found] == [(text, "") for text in TEXTS]
    assert [record.text for record in read(tmp_path / "a", lines(TEXTS[:1]).strip().encode(codec))] == TEXTS[:1]
    items = DecontaminateConfig(files=(str(tmp_path / "eval.jsonl"),))
    Path(items.files[0]).write_bytes(lines(TEXTS).encode(codec))
    assert [item.text for item in read_items(items.files, items)] == TEXTS
    source = SourceConfig(files=items.files, format="jsonl", rules={"any": "r"}, text_key="body")
    with pytest.raises(ConfigError, match="the keys there are text;"):
        check_keys(find_units("s", source, 1000), ExtractConfig())


def test_damage_in_a_wide_encoding_costs_its_own_lines(tmp_path: Path) -> None:
    content = lines(["one", "two?", "three"]).encode("utf-16")
    found = read(tmp_path / "a", content.replace("?".encode("utf-16-le"), b"\x00\xdc"))
    assert [record.text for record in found] == ["one", "two\ufffd", "three"]
    assert [record.notes for record in found] == [set(), {"lone surrogates replaced"}, set()]
    cut = read(tmp_path / "a", content[:-3])
    assert reasons(cut) == ["", "", "bad_json"] and cut[2].position == 3
    first, second = (lines([text] * 3000).encode("utf-16") for text in ("one", "two"))
    broken = gzip.compress(first, 1)
    broken = broken[: len(broken) // 2] + bytes(9) + broken[len(broken) // 2 + 9 :]
    found = read(tmp_path / "a", broken + gzip.compress(second))
    assert reasons(found).count("corrupt_gzip") == 1
    assert [record.text for record in found if not record.reason][-3000:] == ["two"] * 3000
