"""Tests sources on remote file systems of fsspec, mainly HTTP: what is read, and what is refused with a reason."""

import email.utils
import gzip
import http.server
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from configs.loader import ConfigError
from configs.sources import ExtractConfig, SourceConfig
from data_pipeline.command import main
from data_pipeline.core.shards import read_records
from data_pipeline.reading.source_files import find_files
from data_pipeline.reading.source_reader import find_units, read_file
from tests.data_runs import ROOT, prose_and_pages


class Server(http.server.BaseHTTPRequestHandler):
    """HTTP server that supports range requests, as object stores and nginx do.

    Under /whole/ it ignores ranges, under /unsized/ it sends no size either, and under /broken/ it answers with 503.
    """

    files: dict[str, bytes]

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, with_body: bool) -> None:
        kind, _, name = self.path.strip("/").partition("/")
        content = self.files.get(name)
        if kind == "broken" or content is None:
            self.send_error(503 if kind == "broken" else 404)
            return
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(part[1]), min(int(part[2]) + 1, len(content))) if part and kind == "files" else (0, None)
        body = content[start:end]
        self.send_response(206 if end else 200)
        if end:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        if kind != "unsized":
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", email.utils.formatdate(0))
        self.end_headers()
        if with_body:
            try:
                self.wfile.write(body)
            except BrokenPipeError:
                self.close_connection = True  # the client has closed the connection: it needed only a part

    def log_message(self, *args: object) -> None:
        """Prints nothing."""


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Starts a server on loopback; yields (address, files)."""
    files: dict[str, bytes] = {}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Mine", (Server,), {"files": files}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    fsspec.get_filesystem_class("http").clear_instance_cache()
    yield f"http://127.0.0.1:{server.server_port}", files
    server.shutdown()
    server.server_close()


def source(*addresses: str, kind: str = "jsonl") -> SourceConfig:
    return SourceConfig(files=addresses, format=kind, rules={"any": "r"})


def texts(config: SourceConfig) -> list[str]:
    return [
        record.reason or record.text
        for unit in find_units("s", config, 1)
        for file in unit.files
        for record in read_file(file, config, ExtractConfig(), lambda size: None)
    ]


def test_files_over_http(web: tuple[str, dict[str, bytes]], tmp_path: Path) -> None:
    address, files = web
    files["a.jsonl.gz"] = gzip.compress(b'{"text": "one"}\n{"text"')
    files["empty.jsonl"] = b""
    files["page.html"] = b"<p>a page"
    files["big.jsonl"] = b"".join(b'{"text": "%d %s"}\n' % (number, b"x" * 1000) for number in range(6_000))
    pq.write_table(pa.table({"text": ["rows"] * 3}), tmp_path / "p.parquet")
    files["p.parquet"] = (tmp_path / "p.parquet").read_bytes()
    here = f"{address}/files"
    assert texts(source(f"{here}/a.jsonl.gz", f"{here}/empty.jsonl")) == ["one", "bad_json", "empty_file"]
    assert texts(source(f"{here}/page.html", kind="html")) == ["<p>a page"]
    assert texts(source(f"{here}/p.parquet", kind="parquet")) == ["rows"] * 3
    big = texts(source(f"{here}/big.jsonl"))
    assert len(big) == 6_000 and all(text.startswith(f"{number} x") for number, text in enumerate(big))
    (file,) = find_files("s", source(f"{here}/a.jsonl.gz"))
    assert (file.size, file.inner_path) == (len(files["a.jsonl.gz"]), "a.jsonl.gz")
    assert file.identity == "Last-Modified=Thu, 01 Jan 1970 00:00:00 -0000"
    # Without range requests, a file of at most one block can be read.
    assert texts(source(f"{address}/whole/a.jsonl.gz")) == ["one", "bad_json"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("files/none.jsonl", "matches no file"),
        ("broken/big.jsonl", r"cannot be read \(ClientResponseError 503\); check the address"),
        ("files/*.jsonl", "HTTP servers do not list files; give the address of each file"),
        ("files/", "HTTP servers do not list files"),
        ("unsized/big.jsonl", "does not state the file's size"),
    ],
)
def test_what_http_cannot_give_is_refused(web: tuple[str, dict[str, bytes]], path: str, message: str) -> None:
    address, files = web
    files["big.jsonl"] = b'{"text": "one"}\n'
    with pytest.raises(ConfigError, match=message):
        find_files("s", source(f"{address}/{path}"))


def test_servers_that_go_or_send_no_parts_are_errors_and_cost_no_record(web: tuple[str, dict[str, bytes]]) -> None:
    address, files = web
    files["big.jsonl"] = b'{"text": "one"}\n' * 400_000
    with pytest.raises(ValueError, match=r"does not support HTTP range requests, .* above 4 MiB .*; copy the file"):
        texts(source(f"{address}/whole/big.jsonl"))
    (unit,) = find_units("s", source(f"{address}/files/big.jsonl"), 1)
    del files["big.jsonl"]
    with pytest.raises(ConnectionError, match=r"big\.jsonl could not be read"):
        list(read_file(unit.files[0], unit.config, ExtractConfig(), lambda size: None))
    with pytest.raises(ConfigError, match=r"cannot be read \(ClientConnector\w*Error\)"):
        find_files("s", source("http://127.0.0.1:9/a.jsonl"))
    with pytest.raises(ValidationError, match="holds credentials, a query or a chain"):
        source("https://example.org/a.jsonl?sig=secret")


@pytest.mark.full
def test_a_run_over_http_is_the_run_from_disk(web: tuple[str, dict[str, bytes]], tmp_path: Path) -> None:
    address, files = web
    records = gzip.decompress((ROOT / "data/demo/english.jsonl.gz").read_bytes()).splitlines()[::20]
    files["prose.jsonl"] = b"\n".join(records)
    files["pages.warc.gz"] = (ROOT / "data/demo/web.warc.gz").read_bytes()[:300_000]
    (tmp_path / "in").mkdir()
    for name, content in files.items():
        (tmp_path / "in" / name).write_bytes(content)
    prose_and_pages(tmp_path / "local.toml", tmp_path / "in", "local")
    remote = prose_and_pages(tmp_path / "remote.toml", f"{address}/files", "remote")
    remote.write_text(remote.read_text().replace("*.jsonl*", ".jsonl").replace("*.warc.gz", ".warc.gz"))

    def documents(name: str) -> dict[str, list[str]]:
        assert main([str(tmp_path / f"{name}.toml"), "run.workers=2"]) == 0
        return {
            path.relative_to(tmp_path / name).as_posix(): [record["text"] for record in read_records(path)]
            for path in sorted((tmp_path / name).glob("documents/*/*/*.zst"))
        }

    assert documents("remote") == documents("local") != {}


def test_other_file_systems(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/test_remote/a.jsonl", b'{"text": "one"}\n')
    memory.pipe("/test_remote/b/c.jsonl.gz", gzip.compress(b'{"text": "two"}\n'))
    assert texts(source("memory://test_remote")) == ["one", "two"]
    assert texts(source("memory://test_remote/*.jsonl")) == ["one"]
    memory.rm("/test_remote", recursive=True)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "three"}\n')
    assert texts(source((tmp_path / "a.jsonl").as_uri())) == texts(source(tmp_path.as_uri())) == ["three"]


def test_a_file_system_whose_package_is_missing_is_read_after_either_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for address, package in (("gs://b/a.jsonl", "gcsfs"), ("dropbox://folder/a.jsonl", "dropboxdrivefs")):
        with pytest.raises(ConfigError, match=rf"{package}.*; install that package, or copy the files"):
            find_files("s", source(address))
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "copied"}\n')
    assert texts(source(str(tmp_path / "a.jsonl"))) == ["copied"]

    # A package of that name, whose file system is fsspec's own in memory: Dropbox itself cannot run in a test.
    (tmp_path / "dropboxdrivefs.py").write_text(
        "from fsspec.implementations.memory import MemoryFileSystem as Memory\n\n\n"
        "class DropboxDriveFileSystem(Memory):\n    protocol = 'dropbox'\n\n    @classmethod\n"
        "    def _strip_protocol(cls, path):\n        return Memory._strip_protocol(path.removeprefix('dropbox://'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        fsspec.filesystem("dropbox").pipe("/folder/a.jsonl", b'{"text": "installed"}\n')
        assert texts(source("dropbox://folder/a.jsonl")) == ["installed"]
    finally:  # else fsspec keeps the class to the end of the process
        del sys.modules["fsspec.registry"]._registry["dropbox"]


def test_a_client_that_says_much_is_quoted_with_one_line() -> None:
    with pytest.raises(ConfigError, match=r"cannot be listed \(OSError: .*\); check the address") as raised:
        find_files("s", source("hdfs://folder/a.jsonl"))  # pyarrow lists every path where libjvm.so could be
    assert len(str(raised.value).splitlines()) == 1
