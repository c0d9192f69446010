"""Tests harmful input files: their content is set aside with position and reason, in bounded memory."""

import gzip
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from configs.sources import ExtractConfig, SourceConfig
from data_pipeline.extraction.extract import repair
from data_pipeline.extraction.page_limits import too_complex
from data_pipeline.reading.decompression import Fault, members
from data_pipeline.reading.input_records import BROKEN, FoundFile
from data_pipeline.reading.parquet import read_parquet
from tests.unit.data_pipeline.reading.raw_files import PAGE, read, reasons, warc

ROOT = Path(__file__).parents[4]
SOUND = b'{"text": "a sound line"}\n'
MB = 1_000_000


def zstd(content: bytes, level: int = 3) -> bytes:
    return zstandard.ZstdCompressor(level=level, write_checksum=True).compress(content)


# Reads files in a process that may allocate 48 MB more than it has after all imports.
BOUNDED = """
import json, resource, sys
import pyarrow.parquet
from configs.data import ExtractConfig, SourceConfig
from data_pipeline.reading.input_records import FoundFile
from data_pipeline.reading.source_reader import read_file
jobs, limits = json.loads(sys.argv[1]), ExtractConfig(**json.loads(sys.argv[2]))
def read(path, kind):
    source = SourceConfig(files=("-",), format=kind, rules={"any": "r"})
    for record in read_file(FoundFile(path, 1), source, limits, lambda size: None):
        yield [record.reason, record.position, record.offset, record.size, record.count, len(record.text)]
open(jobs[0][0] + ".warm", "wb").write(b"x" * 100)
for kind in ("jsonl", "warc", "parquet", "text"):
    list(read(jobs[0][0] + ".warm", kind))
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 48_000_000, size + 48_000_000))
for job in jobs:
    print(json.dumps(list(read(*job))))
"""


def read_bounded(*jobs: tuple[Path, str], **limits: float) -> list[list[list]]:
    """Reads each (path, format); returns [reason, position, offset, size, count, characters] of each record."""
    command = [
        sys.executable,
        "-c",
        BOUNDED,
        json.dumps([(str(path), kind) for path, kind in jobs]),
        json.dumps(limits),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_bound_on_memory_is_one(tmp_path: Path) -> None:
    """Reads a line of the limit's length, which does not fit into the memory: so the bound of later tests is tight."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "' + b"a" * 60 * MB + b'"}\n')
    with pytest.raises(AssertionError, match="MemoryError"):
        read_bounded((path, "jsonl"), max_record_bytes=100 * MB)


def test_a_line_too_long_is_never_held(tmp_path: Path) -> None:
    long = os.urandom(3 * MB).hex().encode() * 10
    packs = {
        "plain": bytes,
        "gzip": lambda content: gzip.compress(content, 1),
        "zstd": lambda content: zstd(content, 1),
    }
    jobs = []
    for name, pack in packs.items():
        # The content says what a file is, not its name.
        (tmp_path / name).write_bytes(pack(SOUND + long + b"\n" + SOUND))
        jobs.append((tmp_path / name, "jsonl"))
    for found in read_bounded(*jobs, max_record_bytes=MB):
        assert found == [
            ["", 1, 0, len(SOUND) - 1, 1, 12],
            ["record_too_large", 2, len(SOUND), 60 * MB, 1, 300],
            ["", 3, len(SOUND) + 60 * MB + 1, len(SOUND) - 1, 1, 12],
        ]


@pytest.mark.full
def test_a_line_of_half_a_gigabyte(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as out:
        out.write(SOUND)
        out.seek(500 * MB)  # a sparse file: the gap reads as NUL bytes and takes no space
        out.write(b"\n" + SOUND)
    (found,) = read_bounded((path, "jsonl"))
    assert [record[0] for record in found] == ["", "record_too_large", ""]


def test_a_bomb_is_left_at_the_stated_ratio(tmp_path: Path) -> None:
    paths = []
    for pack in (gzip.compress, zstd):
        paths.append(tmp_path / f"{pack.__name__}.bin")
        paths[-1].write_bytes(pack(b"\0" * 100 * MB))
        assert paths[-1].stat().st_size < MB / 5
    kinds = ("jsonl", "text", "warc", "html", "code")
    for found in read_bounded(*((path, kind) for path in paths for kind in kinds)):
        assert [record[0] for record in found] == ["expansion_limit"]


def test_reading_goes_on_after_a_bomb(tmp_path: Path) -> None:
    bomb = gzip.compress(b"\0" * 5 * MB)
    records = read(tmp_path / "a.jsonl.gz", gzip.compress(SOUND) + bomb + gzip.compress(SOUND * 2))
    assert reasons(records) == ["", "expansion_limit", "", ""]


def test_a_file_of_many_members_has_an_absolute_limit(tmp_path: Path) -> None:
    content = gzip.compress(SOUND * 10_000) * 20
    records = read(tmp_path / "a.jsonl.gz", content, max_expanded_bytes=MB)
    assert reasons(records).count("expansion_limit") == 1
    assert reasons(records)[-1] == "expansion_limit"
    assert 0.7 * MB < sum(record.size + 1 for record in records if not record.reason) <= MB


def test_text_that_repeats_itself_is_no_bomb(tmp_path: Path) -> None:
    assert len(gzip.compress(SOUND * 30_000)) * 200 < len(SOUND * 30_000) < 1 << 20
    assert set(reasons(read(tmp_path / "a.jsonl.gz", gzip.compress(SOUND * 30_000)))) == {""}


def test_a_page_that_inflates_inside_its_record_is_a_bomb_too(tmp_path: Path) -> None:
    body = gzip.compress(b"<p>" + b"a" * 50 * MB)
    pages = [*warc([body], extra=[("Content-Encoding", "gzip")]), *warc([PAGE.encode()])]
    assert reasons(read(tmp_path / "a.warc.gz", b"".join(pages), "warc")) == ["expansion_limit", ""]


@pytest.mark.full
def test_large_warc_records_and_parquet_rows(tmp_path: Path) -> None:
    page = b"<p>" + os.urandom(MB).hex().encode() * 30
    members = warc([PAGE.encode(), page, PAGE.encode()])
    (tmp_path / "a.warc").write_bytes(b"".join(gzip.decompress(member) for member in members))
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), pa.array(["x" * 900_000]))
    pq.write_table(pa.table({"text": column}), tmp_path / "dictionary.parquet")  # a megabyte that decodes to gigabytes
    letter = pa.table({"text": ["a" * 60 * MB]})
    pq.write_table(letter, tmp_path / "page.parquet", use_dictionary=False, compression="zstd")
    pages, rows, letters = read_bounded(
        (tmp_path / "a.warc", "warc"),
        (tmp_path / "dictionary.parquet", "parquet"),
        (tmp_path / "page.parquet", "parquet"),
        max_record_bytes=MB,
    )
    assert [record[0] for record in pages] == ["", "record_too_large", ""]
    assert pages[1][3] == len(page)
    assert [row[:5] for row in rows] == [["", row, 0, 900_000, 1] for row in range(1, 5001)]
    assert [row[0] for row in letters] == ["expansion_limit"]


@pytest.mark.parametrize(("suffix", "pack", "kind"), [("gz", gzip.compress, "gzip"), ("zst", zstd, "zstd")])
def test_truncated_and_corrupt_files(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes], kind: str) -> None:
    lines = b"".join(json.dumps({"text": os.urandom(30).hex()}).encode() + b"\n" for _ in range(20_000))
    content = pack(lines)
    cut = read(tmp_path / f"a.jsonl.{suffix}", content[: len(content) // 2])
    assert reasons(cut)[-1] == f"cut_{kind}"
    assert 5_000 < len(cut) < 15_000
    assert (
        b"".join(json.dumps({"text": record.text}).encode() + b"\n" for record in cut[:-1]) == lines[: cut[-1].offset]
    )

    damaged = bytearray(content)
    damaged[len(content) // 2 : len(content) // 2 + 20] = b"\xff" * 20
    records = read(tmp_path / f"b.jsonl.{suffix}", bytes(damaged) + pack(SOUND * 3))
    assert f"corrupt_{kind}" in reasons(records)
    assert reasons(records)[-3:] == ["", "", ""], "what comes after the damage is read"
    assert set(reasons(records)) <= BROKEN | {""}


def test_a_zstandard_window_above_the_limit(tmp_path: Path) -> None:
    settings = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    content = compressor.compress(SOUND * 10) + compressor.flush()
    assert reasons(read(tmp_path / "a.jsonl.zst", content + zstd(SOUND))) == ["zstd_window_too_large", ""]


def test_skippable_zstandard_frames_are_skipped(tmp_path: Path) -> None:
    def skippable(number: int, size: int) -> bytes:
        return bytes([0x50 + number, 0x2A, 0x4D, 0x18]) + size.to_bytes(4, "little") + os.urandom(size)

    for number, size in ((0, 5), (7, 0), (15, 200_000)):
        frame = skippable(number, size)
        for content in (frame + zstd(SOUND) + zstd(SOUND), zstd(SOUND) + frame + frame + zstd(SOUND) + frame):
            assert reasons(read(tmp_path / "a.jsonl.zst", content)) == ["", ""]


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_zeros_behind_members_are_padding(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    for size in (1, 511, 200_000):
        zeros = b"\0" * size
        content = pack(SOUND) + zeros + pack(SOUND * 2) + zeros
        assert reasons(read(tmp_path / "a.jsonl", content)) == ["", "", ""]
    records = read(tmp_path / "a.jsonl", pack(SOUND) + b"\0" * 100 + b"no member")
    assert [(record.reason, record.size) for record in records[1:]] == [
        (f"corrupt_{'zstd' if pack is zstd else 'gzip'}", 0)
    ]
    pages = warc([PAGE.encode()] * 2)
    assert reasons(read(tmp_path / "a.warc.gz", b"\0\0".join([*pages, b""]) + b"\0" * 9999, "warc")) == ["", ""]


def test_members_are_read_whole_whatever_the_blocks(tmp_path: Path) -> None:
    parts = [os.urandom(size) for size in (0, 1, 65_535, 65_536, 65_537, 300_000)]
    for pack in (gzip.compress, zstd):
        path = tmp_path / "a"
        path.write_bytes(b"".join(pack(part) for part in parts))
        with path.open("rb") as file:
            found = list(members(file, ExtractConfig(), lambda size: None))
            assert not any(isinstance(item, Fault) for item in found)
        with path.open("rb") as file:
            content = [b"".join(item.blocks()) for item in members(file, ExtractConfig(), lambda size: None)]
        assert content == parts


def test_damage_in_an_uncompressed_warc_costs_one_record(tmp_path: Path) -> None:
    pages = [gzip.decompress(member) for member in warc([PAGE.format(n).encode() for n in range(40)])]
    pages[20] = b"CRAW" + pages[20][4:]  # not the beginning of a record
    records = read(tmp_path / "a.warc", b"".join(pages), "warc")
    assert reasons(records) == [""] * 20 + ["bad_warc"] + [""] * 19
    assert [record.metadata["url"][-2:].strip("/") for record in records if not record.reason] == [
        str(n) for n in range(40) if n != 20
    ]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("wrong", [-60, 40])
def test_a_warc_record_of_a_wrong_length_is_no_whole_page(
    tmp_path: Path, pack: Callable[[bytes], bytes], wrong: int
) -> None:
    pages = [gzip.decompress(member) for member in warc([PAGE.format(n).encode() for n in range(3)])]
    length = int(re.findall(rb"\r\nContent-Length: (\d+)", pages[1])[0])
    pages[1] = pages[1].replace(b"Content-Length: %d" % length, b"Content-Length: %d" % (length + wrong))
    records = read(tmp_path / "a.warc", b"".join(map(pack, pages)), "warc")
    assert [record.reason for record in records if record.reason != "bad_warc"] == ["", "cut_record", ""]
    assert [record.html for record in records if record.reason] == [False] * (len(records) - 2)


def test_segments_of_a_warc_record_are_no_whole_pages_and_cut_pages_are_counted(tmp_path: Path) -> None:
    page = gzip.decompress(warc([PAGE.encode()])[0])
    (segment,) = read(tmp_path / "a.warc", page.replace(b"\r\n", b"\r\nWARC-Segment-Number: 1\r\n", 1), "warc")
    assert segment.reason == "cut_record"
    (cut,) = read(tmp_path / "a.warc", page.replace(b"\r\n", b"\r\nWARC-Truncated: length\r\n", 1), "warc")
    assert (cut.reason, cut.notes) == ("", {"cut short by the crawler"})


def test_zstandard_with_a_dictionary_is_not_called_damaged(tmp_path: Path) -> None:
    samples = [b"%d of %s" % (number, SOUND) for number in range(500)]
    dictionary = zstandard.train_dictionary(1000, samples)
    content = zstandard.ZstdCompressor(dict_data=dictionary).compress(SOUND)
    stored = dictionary.as_bytes()
    stored = b"\x5d\x2a\x4d\x18" + len(stored).to_bytes(4, "little") + stored  # as WARC files carry theirs
    for packed in (content, stored + content):
        assert reasons(read(tmp_path / "a.jsonl.zst", packed)) == ["unsupported_compression"]


def test_nuls(tmp_path: Path) -> None:
    hole = b"\0" * 4096 + SOUND
    assert reasons(read(tmp_path / "a.jsonl", SOUND + hole + SOUND)) == ["", "nul_bytes", ""]
    (record,) = read(tmp_path / "a.txt", b"words\0words", "text")
    assert (record.reason, record.offset) == ("nul_bytes", 5)
    assert repair("one\0two") == "onetwo"


EXTRACTING = """
import json, sys, time
from configs.data import ExtractConfig, SourceConfig
from data_pipeline.extraction.extract import Extract
from data_pipeline.reading.source_reader import SourceReader, find_units
tallies = sys.argv[1]
for kind, *paths in json.loads(sys.argv[2]):
    for path in paths:
        units = find_units("s", SourceConfig(files=(path,), format=kind, rules={"any": "r"}), 1)
        started = time.monotonic()
        read = SourceReader(units, ExtractConfig(), tallies, tallies).run()
        results = [document.metadata["raw"]["reason"] for document in Extract(ExtractConfig()).run(read)]
        print(json.dumps([path, results, time.monotonic() - started]), flush=True)
"""


def extract(folder: Path, *jobs: list[str]) -> list[tuple[str, list[str], float]]:
    """Extracts files in a process of its own, so that a crash is noticed; returns (path, reasons, seconds) of each."""
    command = [sys.executable, "-c", EXTRACTING, str(folder), json.dumps(jobs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-2000:])
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_one_repeated_character_is_quick(tmp_path: Path) -> None:
    letters = ["a", "é", "界", "Ã", "<", "&", "\u0301", "\x1b", " a", "\n\n\n-"]
    lines, pages = ["jsonl"], ["html"]
    for number, letter in enumerate(letters):
        text = letter * (MB // 4 // len(letter))
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"text": text}))
        (tmp_path / f"{number}.html").write_text(text)
        lines.append(str(tmp_path / f"{number}.jsonl"))
        pages.append(str(tmp_path / f"{number}.html"))
    for path, found, seconds in extract(tmp_path, lines, pages):
        assert len(found) == 1
        assert seconds < 30, path  # prose takes some hundredths; quadratic time would take many minutes


def test_pages_beyond_all_measure(tmp_path: Path) -> None:
    nested = (b"<div>" * 200_000 + b"deep" + b"</div>" * 200_000, b"<b><a>" * 50_000, b"<table><tr><td>" * 20_000)
    many = " ".join(f"a{number}=1" for number in range(50_000))
    nested += (f"<div {many}>text</div>".encode(),)
    for number, page in enumerate(nested):
        (tmp_path / f"{number}.html").write_bytes(page)
    found = extract(tmp_path, ["html", *(str(tmp_path / f"{number}.html") for number in range(4))])
    assert [reasons for _, reasons, _ in found] == [["too_complex"]] * 4
    assert not too_complex("<p>one<li>two<br><td>" * 9000 + "<div><b>x</b></div>" * 9000)


def test_zeros_in_an_uncompressed_warc_are_padding_and_what_is_cut_is_not(tmp_path: Path) -> None:
    pages = [gzip.decompress(member) for member in warc([PAGE.format(n).encode() for n in range(3)])]
    whole, other = b"".join(pages), pages[2].replace(b"WARC-Type: response", b"WARC-Type: metadata")
    for size in (1, 511, 200_000):
        zeros = b"\0" * size
        for content, count in (
            (whole + zeros, 3),
            (zeros.join([*pages, b""]), 3),
            (pages[0] + other + zeros, 1),
            (pages[0] + other + zeros + pages[1] + zeros, 2),
        ):
            assert reasons(read(tmp_path / "a.warc", content, "warc")) == [""] * count
        # Only zeros, a truncated record header, and damage before or after the zeros.
        for content, expected in (
            (zeros, ["bad_warc"]),
            (whole + pages[0][:40] + zeros, ["", "", "", "bad_warc"]),
            (pages[0] + zeros + b"CRAW" + pages[1][4:] + zeros + pages[2], ["", "bad_warc", ""]),
            (pages[0] + b"CRAW" + pages[1][4:] + zeros, ["", "bad_warc"]),
        ):
            found = reasons(read(tmp_path / "a.warc", content, "warc"))
            assert [reason.replace("cut_record", "bad_warc") for reason in found] == expected


def test_a_parquet_file_of_fewer_rows_than_its_footer_counts_is_set_aside(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b", "c", "d", "e"]}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    rows = b"\x16\x0a\x19\x1c"  # as Thrift writes a count of 5, and after it a list of one row group
    assert whole.count(rows) == 1
    source, file = SourceConfig(files=("-",), format="parquet", rules={"any": "r"}), FoundFile("-", len(whole))
    damaged = whole.replace(rows, b"\x16\x0c\x19\x1c")
    for content, texts in ((damaged, ["the footer contradicts itself"]), (whole, list("abcde"))):
        records = list(read_parquet(io.BytesIO(content), file, source, ExtractConfig(), lambda size: None))
        assert [record.text for record in records] == texts
        assert {record.reason for record in records} == {"" if content is whole else "bad_parquet"}
