"""Tests which files a source has (patterns, folders, links, loops, unreadable ones) and how they form units of work."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pydantic import ValidationError

from configs.loader import ConfigError
from configs.sources import ExtractConfig, SourceConfig
from data_pipeline.reading.input_records import Record
from data_pipeline.reading.names import openable, printable
from data_pipeline.reading.source_files import find_files
from data_pipeline.reading.source_reader import find_units, read_file


def source(*files: Path | str, kind: str = "text", **options: object) -> SourceConfig:
    return SourceConfig(files=tuple(map(str, files)), format=kind, rules={"any": "r"}, **options)


def write(path: Path, content: str | bytes = "some text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def found(config: SourceConfig, folder: Path) -> dict[str, str]:
    """Finds a source's files; returns {path below `folder`: reason why it is not read}."""
    return {os.path.relpath(file.path, folder): file.reason for file in find_files("s", config)}


def read_named(config: SourceConfig) -> dict[str, Record]:
    """Reads files of one record each; returns {name that the document's id is made of: record}."""
    return {
        file.name: record
        for unit in find_units("s", config, 1000)
        for file in unit.files
        for record in read_file(file, config, ExtractConfig(), lambda size: None)
    }


def read_all(config: SourceConfig) -> list[Record]:
    return [
        record
        for unit in find_units("s", config, 1000)
        for file in unit.files
        for record in read_file(file, config, ExtractConfig(), lambda size: None)
    ]


def test_a_folder_is_searched_for_its_format(tmp_path: Path) -> None:
    for name in ("a.txt", "b/c.md", "b/d.TXT.gz", "b/e.png", "b/f", "b/g.html", ".hidden/h.txt"):
        write(tmp_path / name)
    assert list(found(source(tmp_path), tmp_path)) == [".hidden/h.txt", "a.txt", "b/c.md", "b/d.TXT.gz"]
    assert list(found(source(tmp_path, kind="html"), tmp_path)) == ["b/g.html"]
    assert list(found(source(tmp_path, extensions=(".png",)), tmp_path)) == ["b/e.png"]


def test_other_compressions_are_refused_by_name_and_set_aside_in_a_folder(tmp_path: Path) -> None:
    line = b'{"text": "one"}\n'
    packed = {"bz2": bz2.compress(line), "xz": lzma.compress(line), "br": b"\x0b", "zip": b"PK\x03\x04", "tar.gz": b""}
    for ending, content in packed.items():
        (tmp_path / f"a.jsonl.{ending}").write_bytes(content)
        with pytest.raises(ConfigError, match=rf"a\.jsonl\.{ending} cannot be read, .* compress each file with gzip"):
            find_units("s", source(tmp_path / f"a.jsonl.{ending}", kind="jsonl"), 1000)
    with pytest.raises(ConfigError, match=r"a\.jsonl\.br and 4 more cannot be read"):
        find_units("s", source(tmp_path, kind="jsonl"), 1000)
    (tmp_path / "b.jsonl").write_bytes(line)
    (tmp_path / "c.jsonl").write_bytes(packed["xz"])  # the name says nothing, the first bytes do
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as members:
        members.add(tmp_path / "b.jsonl", "b.jsonl")
    for name, content in (("d", archive.getvalue()), ("e", gzip.compress(archive.getvalue()))):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(content)
    (tmp_path / "f.jsonl.zst").write_bytes(zstandard.compress(gzip.compress(line)))
    records = read_all(source(tmp_path, kind="jsonl"))
    assert sorted(record.reason for record in records) == ["", *["unsupported_compression"] * 9]
    assert [record.text for record in records if not record.reason] == ["one"]


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "b/c.txt", "b/d/e.txt", "b/d/f.bin"):
        write(tmp_path / name)
    assert list(found(source(tmp_path / "**/*.txt"), tmp_path)) == ["a.txt", "b/c.txt", "b/d/e.txt"]
    assert list(found(source(tmp_path / "*/*.txt"), tmp_path)) == ["b/c.txt"]
    assert list(found(source(tmp_path / "b/d/*"), tmp_path)) == ["b/d/e.txt", "b/d/f.bin"], (
        "a pattern is taken at its word"
    )
    monkeypatch.chdir(tmp_path)
    assert [file.path for file in find_files("s", source("**/*.txt"))] == ["a.txt", "b/c.txt", "b/d/e.txt"]
    assert [file.path for file in find_files("s", source("b/**/*.txt", "b/c.txt"))] == ["b/c.txt", "b/d/e.txt"]
    told = r"sources.s.files: 'd/\*.txt' matches no file, looked for from \S+; correct the path, or run from the folder"
    with pytest.raises(ConfigError, match=told):
        find_files("s", source("d/*.txt"))
    assert find_files("s", source("b/d/*.txt"))
    monkeypatch.chdir(tmp_path / "b")
    assert find_files("s", source("d/*.txt"))


STRANGE = {
    b"caf\xe9\xff.txt": r"caf\xe9\xff.txt",
    b"two\nlines\x1b[2J.txt": r"two\x0alines\x1b[2J.txt",
    rb"back\slash\xff.txt": r"back\\slash\\xff.txt",
    "la\u0308nge\u2028\x85.txt".encode(): "la\u0308nge\\u2028\\u0085.txt",
    b"%41 [1] {a,b} *?~$HOME.txt": "%41 [1] {a,b} *?~$HOME.txt",
    b"n" * 251 + b".txt": "n" * 251 + ".txt",
    b" .txt": " .txt",
}


@pytest.mark.parametrize("pattern", ["", "*", "*/*.txt", "**/*.txt"])
def test_names_that_cannot_be_shown(tmp_path: Path, pattern: str) -> None:
    """Reads files and folders whatever bytes their names have, and shows their names as printable text."""
    for folder in (b"plain", b"fol\xffder [0-9] \n"):
        os.mkdir(os.fsencode(tmp_path) + b"/" + folder)
        for name in STRANGE:
            with open(b"/".join([os.fsencode(tmp_path), folder, name]), "wb") as out:
                out.write(name.hex().encode())
    config = source(tmp_path / pattern)
    files = [file for unit in find_units("s", config, 1000) for file in unit.files]
    texts = {
        file.path.removeprefix(f"{tmp_path}/"): record.text
        for file in files
        for record in read_file(file, config, ExtractConfig(), lambda size: None)
    }
    assert texts == {
        f"{folder}/{shown}": name.hex()
        for folder in (r"fol\xffder [0-9] \x0a", "plain")
        for name, shown in STRANGE.items()
    }
    assert all(file.inner_path.isprintable() for file in files)


def test_a_name_and_what_shows_it_are_two_names() -> None:
    names = [os.fsdecode(name) for name in STRANGE]
    for name in [*names, *map(printable, names), "\\", r"\\x41", r"\x4", "\udcff\xff", "a/b.c", "話.txt", "😀.md"]:
        assert openable(printable(name)) == name
        assert printable(name).isprintable()
    assert printable("data/話 100% [b].txt") == "data/話 100% [b].txt"


def test_brackets_in_folders_that_exist_are_their_own(tmp_path: Path) -> None:
    for name in ("run [12]/a.txt", "run [12]/b/c.txt", "run 1/d.txt", "run 2/x[1].txt"):
        write(tmp_path / name)
    assert list(found(source(tmp_path / "run [12]/*.txt"), tmp_path)) == ["run [12]/a.txt"]
    assert list(found(source(tmp_path / "run [12]/**/*.txt"), tmp_path)) == ["run [12]/a.txt", "run [12]/b/c.txt"]
    assert list(found(source(tmp_path / "run [1]/*.txt"), tmp_path)) == ["run 1/d.txt"]
    assert list(found(source(tmp_path / "run 2/x[1].txt"), tmp_path)) == ["run 2/x[1].txt"]
    assert list(found(source(tmp_path / "run 2/*[[]*"), tmp_path)) == ["run 2/x[1].txt"]


@pytest.mark.parametrize("pattern", ["", "**/*.txt"])
def test_loops_and_files_reached_twice(tmp_path: Path, pattern: str) -> None:
    write(tmp_path / "b/c.txt")
    write(tmp_path / "d/e.txt", "other")
    (tmp_path / "a.txt").symlink_to("b/c.txt")  # sorts before its target, which is still the one that is read
    (tmp_path / "hard.txt").hardlink_to(tmp_path / "d/e.txt")
    (tmp_path / "b/up").symlink_to(tmp_path)
    (tmp_path / "b/over").symlink_to(tmp_path / "d")
    (tmp_path / "self.txt").symlink_to("self.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    config = source(tmp_path / pattern)
    assert found(config, tmp_path) == {
        "a.txt": "seen_before",
        "b/c.txt": "",
        "b/over": "seen_before",
        "b/up": "symlink_loop",
        "d/e.txt": "",
        "gone.txt": "unreadable",
        "hard.txt": "seen_before",
        "pipe.txt": "not_a_file",
        "self.txt": "symlink_loop",
    }
    records = read_all(config)
    assert sorted(record.text for record in records if not record.reason) == ["other", "some text"]
    assert len(records) == 9, "each is accounted for"


def test_a_folder_behind_a_link_is_read(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere/a.txt")
    (tmp_path / "here").mkdir()
    (tmp_path / "here/link").symlink_to(tmp_path / "elsewhere")
    assert found(source(tmp_path / "here"), tmp_path / "here") == {"link/a.txt": ""}


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """Yields a folder and switches from root, who may read everything, to a user for whom permissions count."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        if os.geteuid() == 0:
            os.seteuid(65534)
            try:
                yield Path(name)
            finally:
                os.seteuid(0)
        else:
            yield Path(name)


def test_what_may_not_be_read_is_set_aside(as_nobody: Path) -> None:
    euid = os.geteuid()
    if euid == 65534:
        os.seteuid(0)
    write(as_nobody / "a.txt")
    write(as_nobody / "closed.txt").chmod(0)
    write(as_nobody / "folder/b.txt")
    (as_nobody / "folder").chmod(0)
    os.seteuid(euid)
    records = read_all(source(as_nobody))
    assert sorted((record.reason, record.text) for record in records) == [
        ("", "some text"),
        ("unreadable", ""),
        ("unreadable", "PermissionError: Permission denied"),
    ]
    if euid == 65534:
        os.seteuid(0)
    (as_nobody / "folder").chmod(0o755)


def test_small_files_share_a_unit_and_large_ones_do_not(tmp_path: Path) -> None:
    for number in range(10):
        write(tmp_path / f"{number}.txt", "x" * 400)
    units = find_units("s", source(tmp_path), 1000)
    assert [len(unit.files) for unit in units] == [2] * 5
    assert [unit.index for unit in units] == [0, 1, 2, 3, 4]
    for number in range(10):
        write(tmp_path / f"{number}.jsonl", "x" * 400)
    assert [len(unit.files) for unit in find_units("s", source(tmp_path, kind="jsonl"), 1000)] == [1] * 10


def test_a_code_tree(tmp_path: Path) -> None:
    write(tmp_path / "src/a.py", "print('one')\n")
    write(tmp_path / "src/b.h", b"\x7fELF\0\0\0")
    write(tmp_path / "src/c.CPP", "int main;")
    write(tmp_path / "src/data.bin", "no code")
    write(tmp_path / "src/__init__.py", "")
    write(tmp_path / "src/latin.c", b"// \xe9t\xe9")
    write(tmp_path / "vendor/x/d.go", "package d")
    write(tmp_path / "web/dist/e.js", "var e")
    write(tmp_path / ".git/f.py", "no code")
    read = read_named(source(tmp_path, kind="code"))
    assert {path: record.reason for path, record in read.items()} == {
        "src/a.py": "",
        "src/b.h": "binary",
        "src/c.CPP": "",
        "src/__init__.py": "empty_file",
        "src/latin.c": "invalid_utf8",
        "vendor/x/d.go": "",
        "web/dist/e.js": "",
    }
    assert read["src/a.py"].metadata == {"path": "src/a.py", "code_language": "Python"}
    assert read["src/c.CPP"].metadata["code_language"] == "C++"
    assert read["src/latin.c"].offset == 3
    skipping = source(tmp_path, kind="code", skip_vendored=True, skip_generated=True, extensions=(".go", ".js", ".py"))
    read = read_named(skipping)
    assert {path: record.reason for path, record in read.items()} == {
        "src/a.py": "",
        "src/__init__.py": "empty_file",
        "vendor": "vendored_folder",
        "web/dist": "generated_folder",
    }


def test_text_and_pages_in_folders(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "ein schöner Text".encode("utf-16"))
    write(tmp_path / "b.txt", b"\xef\xbb\xbfwith a mark")
    write(tmp_path / "c.html", "<meta charset='gb18030'><p>话说天下大势</p>".encode("gb18030"))
    write(tmp_path / "d.txt", "  \n ")
    assert [(record.text, record.reason) for record in read_all(source(tmp_path))] == [
        ("ein schöner Text", ""),
        ("with a mark", ""),
        ("  \n ", "empty"),
    ]
    (page,) = read_all(source(tmp_path, kind="html"))
    assert page.html and "话说天下大势" in page.text


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary()])
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    texts = pa.array(["eins", None, "", "zwei", "drei"]).cast(kind)
    columns = {
        "number": range(5),
        "text": texts,
        "id": ["a", "b", "c", None, "e"],
        "metadata": [{"n": 1}] * 5,
        "url": ["http://x.org"] * 5,
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=2)
    records = read_all(source(tmp_path, kind="parquet"))
    assert [(record.position, record.text, record.id, record.reason) for record in records] == [
        (1, "eins", "a", ""),
        (2, "", "b", "missing_text"),
        (3, "", "c", "empty"),
        (4, "zwei", "", ""),
        (5, "drei", "e", ""),
    ]
    assert records[0].metadata == {"record": {"n": 1}, "url": "http://x.org", "fields": {"number": 0}}
    (record,) = read_all(source(tmp_path, kind="parquet", text_key="content"))
    assert (record.reason, record.count) == ("missing_text", 5)
    assert [record.reason for record in read_all(source(tmp_path, kind="parquet", text_key="number"))] == [
        "text_not_a_string"
    ] * 5
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    chunk = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(1)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    write(tmp_path / "a.parquet", bytes(content))
    records = read_all(source(tmp_path, kind="parquet"))
    assert [(record.position, record.reason, record.count) for record in records] == [
        (1, "", 1),
        (2, "missing_text", 1),
        (3, "bad_parquet", 2),
        (5, "", 1),
    ]
    write(tmp_path / "a.parquet", bytes(content[:-8]))
    assert [record.reason for record in read_all(source(tmp_path, kind="parquet"))] == ["bad_parquet"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "warc", "text_key": "body"}, "text_key = 'body' says nothing of format 'warc'"),
        ({"kind": "text", "skip_vendored": True}, "skip_vendored is for format 'code'"),
        ({"extensions": ("py",)}, "extensions: 'py' should be in lower case with its dot"),
    ],
)
def test_keys_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        source("x", **options)
