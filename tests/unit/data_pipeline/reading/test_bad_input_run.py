"""Tests one run over all kinds of bad input: each is reported with file, offset and reason, the rest is published."""

import gzip
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import brotli
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.command import main
from data_pipeline.provenance.explain import main as explain
from data_pipeline.report.ledger_tables import main as report
from tests.data_runs import write_inputs
from tests.small_sources import write_config
from tests.unit.data_pipeline.extraction.slow_page import SLOW
from tests.unit.data_pipeline.reading.raw_files import PAGE, warc

MB = 1_000_000
SOUND = b'{"text": "a sound line"}\n'


def bad_lines(folder: Path, long_line: int) -> dict[str, tuple[str, int]]:
    """Writes JSON lines files, most with a bad line after a sound one; returns {file name: (reason, offset)}."""
    letters = b"".join(json.dumps({"text": f"line {number} " * 9}).encode() + b"\n" for number in range(999))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.jsonl", b"\0" * 50 * MB)
    files = {
        "utf8": (SOUND + b'{"text": "\xff\xfe"}', "invalid_utf8", len(SOUND)),
        "no-text": (SOUND + b'{"id": 1}', "missing_text", len(SOUND)),
        "nuls": (SOUND + b"\0" * 5000 + SOUND, "nul_bytes", len(SOUND)),
        "blank": (SOUND + b'{"text": " "}', "empty", len(SOUND)),
        "letter": (SOUND + b'{"text": "%s"}' % (b"a" * MB), "one_character", len(SOUND)),
        "nothing": (b"", "empty_file", 0),
        "archive": (archive.getvalue(), "unsupported_compression", 0),
    }
    packed_files = {
        "cut-gz": (gzip.compress(letters)[:-30], "cut_gzip", None),
        "cut-zst": (zstandard.compress(letters)[:-30], "cut_zstd", None),
        "bomb-gz": (gzip.compress(b"\0" * 50 * MB), "expansion_limit", 0),
        "bomb-zst": (zstandard.compress(b"\0" * 50 * MB), "expansion_limit", 0),
    }
    for name, (content, _, _) in (files | packed_files).items():
        (folder / f"prose-{name}.jsonl").write_bytes(content)
    with (folder / "prose-long.jsonl").open("wb") as out:
        out.write(SOUND)
        out.seek(long_line)  # a sparse file: the gap reads as NUL bytes and takes no space
        out.write(b"\n" + SOUND)
    expected = {name: (reason, offset) for name, (_, reason, offset) in (files | packed_files).items()}
    return {f"prose-{name}.jsonl": value for name, value in expected.items()} | {
        "prose-long.jsonl": ("record_too_large", len(SOUND))
    }


def bad_pages(folder: Path) -> dict[str, tuple[str, int]]:
    """Writes WARC files with a bad page after a sound one; returns {file name: (reason, byte of the bad record)}."""
    whole = warc([PAGE.encode()])[0]
    pages = {
        "cut": (whole[:-20], "cut_gzip"),
        "broken": (b"\x1f\x8b\x08" + b"\xff" * 100, "corrupt_gzip"),
        "deep": (warc([b"<div>" * 200_000])[0], "too_complex"),
        "slow": (warc([SLOW.encode()])[0], "page_too_slow"),
        "bomb": (warc([brotli.compress(b"a" * 10 * MB)], extra=[("Content-Encoding", "br")])[0], "expansion_limit"),
        "coding": (warc([bytes(range(256))], extra=[("Content-Encoding", "sdch")])[0], "unknown_content_encoding"),
    }
    for name, (content, _) in pages.items():
        (folder / f"pages-{name}.warc.gz").write_bytes(whole + content)
    return {f"pages-{name}.warc.gz": (reason, len(whole)) for name, (_, reason) in pages.items()}


@pytest.mark.parametrize("long_line", [17 * MB, pytest.param(500 * MB, marks=pytest.mark.full)])
def test_everything_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], long_line: int) -> None:
    config = write_inputs(tmp_path)
    expected = bad_lines(tmp_path, long_line) | bad_pages(tmp_path)
    (tmp_path / "prose-loop.jsonl").symlink_to("prose-loop.jsonl")
    # Documents of a file whose name is not UTF-8 pass all stages, and are found by its printable name.
    (tmp_path / "prose-1.jsonl").rename(os.fsdecode(os.fsencode(tmp_path) + b"/prose-\xff\n1.jsonl"))
    with (tmp_path / os.fsdecode(b"prose-\xff\n1.jsonl")).open("ab") as out:
        out.write(b"\n{")
    expected[r"prose-\xff\x0a1.jsonl"] = ("bad_json", None)
    expected["prose-loop.jsonl"] = ("symlink_loop", 0)
    command = [str(config), "run.workers=2", "extract.seconds_per_page=1"]
    assert main([*command, "extract.max_bad_share=0.01"]) == 1
    told = capsys.readouterr().err
    assert "(corrupt_gzip 1, cut_gzip 1, expansion_limit 1," in told and "over extract.max_bad_share = 0.01" in told
    assert "raise extract.max_bad_share to 0." in told
    assert main([*command, "extract.max_bad_share=0.5"]) == 0
    said = capsys.readouterr().out
    rejected = [
        json.loads(line)
        for path in sorted((tmp_path / "run/extract/rejected").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    # For lines compare the offset, for pages the position of the record.
    found = {}
    for record in rejected:
        name = Path(record["file"]).name
        found.setdefault(name, (record["reason"], record["position" if name.startswith("pages") else "offset"]))
    for name, (reason, offset) in expected.items():
        assert found[name][0] == reason, name
        assert offset is None or found[name][1] == offset, name
    assert set(found) == {*expected, "prose-0.jsonl"}
    shown = str(tmp_path / r"prose-\xff\x0a1.jsonl")
    stores = sorted((tmp_path / "run/tokens/train/prose").glob("*.parquet"))
    assert shown in pq.read_table(stores, columns=["file"])["file"].to_pylist()
    (broken,) = [record for record in rejected if record["file"] == shown]
    assert explain([str(config), "--id", broken["id"]]) == 0
    assert f"bad_json, at {shown}:" in capsys.readouterr().out
    assert report([str(config)]) == 0
    ledger = json.loads((tmp_path / "run/ledger.json").read_text())
    assert sum(ledger["set_aside"].values()) == sum(record["records"] for record in rejected)
    assert f"{len(rejected):,} records set aside (" in said
    extract = ledger["stages"][0]["total"]
    dropped = sum(amount["documents"] for amount in extract["dropped"].values())
    assert extract["notes"]["charset known by HTTP header"] > 10
    assert extract["in"]["documents"] == extract["kept"]["documents"] + dropped


def test_an_archive_under_another_name_is_read_once_it_is_unpacked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [str(write_config(tmp_path, {"big": 3}, "")), "--until", "extract"]
    lines = (tmp_path / "big.jsonl").rename(tmp_path / "lines")
    with tarfile.open(tmp_path / "big.jsonl", "w:gz") as archive:
        archive.add(lines, "big.jsonl")
    assert main(args) == 1
    told = "then repair the files or unpack those that are archives, and compress files with gzip or Zstandard alone\n"
    assert told in capsys.readouterr().err
    with tarfile.open(tmp_path / "big.jsonl") as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (tmp_path / "unpacked/big.jsonl").replace(tmp_path / "big.jsonl")
    assert main(args) == 0
