"""Tests sources on S3 with moto's server: listing, reading, keys that change with an object, no secrets in files."""

import gzip
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from configs.data import DataConfig
from configs.loader import ConfigError, load
from configs.sources import ExtractConfig, SourceConfig
from data_pipeline.command import main
from data_pipeline.core.shards import read_records
from data_pipeline.extraction.extract_stage import input_units, inputs_hash
from data_pipeline.reading.source_files import find_files
from data_pipeline.reading.source_reader import find_units, read_file
from tests.data_runs import ROOT, prose_and_pages, run_folder
from tests.object_store import SECRET, serve
from tests.unit.data_pipeline.reading.raw_files import PAGE, warc


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Client of a server on loopback that has a bucket named corpus; sets its address and credentials in os.environ."""
    with serve("corpus") as (client, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield client


def put(s3: Any, key: str, content: bytes) -> None:
    s3.put_object(Bucket="corpus", Key=key, Body=content)


def source(*files: str, kind: str = "jsonl", **options: Any) -> SourceConfig:
    return SourceConfig(files=files, format=kind, rules={"any": "r"}, **options)


def texts(config: SourceConfig) -> list[str]:
    return [
        record.reason or record.text
        for unit in find_units("s", config, 1000)
        for file in unit.files
        for record in read_file(file, config, ExtractConfig(), lambda size: None)
    ]


def test_every_format_is_read(s3: Any, tmp_path: Path) -> None:
    put(s3, "a/one.jsonl.gz", gzip.compress(b'{"text": "one"}\n{"text'))
    put(s3, "a/b/two.jsonl", b'{"text": "two"}')
    put(s3, "a/none.jsonl", b"")
    put(s3, "a/folder/", b"")
    put(s3, "web/x.warc.gz", b"".join([warc([PAGE.encode()])[0], b"\x1f\x8b\x08 damaged", warc([PAGE.encode()])[0]]))
    put(s3, "code/src/a.py", b"pass")
    put(s3, "code/node_modules/x/b.js", b"var b")
    put(s3, "code/.git/c.py", b"pass")
    pq.write_table(pa.table({"text": ["rows"] * 3}), tmp_path / "p.parquet")
    put(s3, "p.parquet", (tmp_path / "p.parquet").read_bytes())
    assert texts(source("s3://corpus/a")) == ["two", "empty_file", "one", "bad_json"]
    assert texts(source("s3://corpus/a/*.jsonl.gz")) == ["one", "bad_json"]
    assert texts(source("s3://corpus/**/two.jsonl")) == ["two"]
    assert texts(source("s3://corpus/web/x.warc.gz", kind="warc")) == [PAGE, "corrupt_gzip", PAGE]
    assert texts(source("s3://corpus/p.parquet", kind="parquet")) == ["rows"] * 3
    assert texts(source("s3://corpus/code", kind="code", skip_vendored=True)) == ["vendored_folder", "pass"]
    (file, *_) = find_files("s", source("s3://corpus/code", kind="code"))
    assert (file.path, file.inner_path) == ("s3://corpus/code/node_modules/x/b.js", "node_modules/x/b.js")


def test_a_large_object_is_read_in_blocks(s3: Any) -> None:
    lines = b"".join(json.dumps({"text": f"{number} {'x' * 1000}"}).encode() + b"\n" for number in range(12_000))
    put(s3, "large.jsonl", lines)
    read = texts(source("s3://corpus/large.jsonl"))
    assert len(read) == 12_000 and all(text.startswith(f"{number} x") for number, text in enumerate(read))


def test_the_key_follows_the_object(s3: Any, tmp_path: Path) -> None:
    config_file = tmp_path / "data.toml"
    prose_and_pages(config_file, "s3://corpus/in")
    put(s3, "in/prose.jsonl", b'{"text": "one"}')
    put(s3, "in/pages.warc.gz", b"page")

    def key() -> str:
        config = load(DataConfig, config_file)
        return inputs_hash(config, input_units(config), tmp_path / "inputs.json")

    first = key()
    assert key() == first
    put(s3, "in/prose.jsonl", b'{"text": "two"}')  # another object of the same size
    second = key()
    assert second != first
    put(s3, "in/prose2.jsonl", b'{"text": "two"}')
    assert key() not in (first, second)


def test_a_run_from_s3_is_the_run_from_disk_and_keeps_no_secret(s3: Any, tmp_path: Path, capfd) -> None:
    records = gzip.decompress((ROOT / "data/demo/english.jsonl.gz").read_bytes()).splitlines()[::20]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/prose.jsonl").write_bytes(b"\n".join(records))
    (tmp_path / "in/pages.warc.gz").write_bytes((ROOT / "data/demo/web.warc.gz").read_bytes()[:300_000])
    local = tmp_path / "local.toml"
    prose_and_pages(local, tmp_path / "in")
    assert main([str(local)]) == 0
    for name in ("prose.jsonl", "pages.warc.gz"):
        put(s3, f"in/{name}", (tmp_path / "in" / name).read_bytes())
    remote = tmp_path / "remote.toml"
    prose_and_pages(remote, "s3://corpus/in", "remote")
    assert main([str(remote), "run.workers=2"]) == 0

    def documents(run_dir: Path) -> dict[str, list[str]]:
        """Texts by file, without metadata, in which paths differ."""
        return {
            path.relative_to(run_dir).as_posix(): [record["text"] for record in read_records(path)]
            for path in sorted(run_dir.glob("documents/*/*/*.zst"))
        }

    assert documents(run_folder(local)) == documents(tmp_path / "remote") != {}
    written = [path for path in (tmp_path / "remote").rglob("*") if path.is_file()]
    for path in written:
        content = path.read_bytes()
        content = zstandard.ZstdDecompressor().decompressobj().decompress(content) if path.suffix == ".zst" else content
        assert SECRET.encode() not in content and b"AKIDEXAMPLE" not in content, path
    said = "".join(capfd.readouterr())
    assert SECRET not in said and "AKIDEXAMPLE" not in said


def test_a_connection_that_breaks_is_an_error(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks the connection to the store, which raises an error; records are not counted as broken for it."""
    put(s3, "a.jsonl", b'{"text": "x"}\n' * 1000)
    (unit,) = find_units("s", source("s3://corpus/a.jsonl"), 1)
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # else each request is tried again for many seconds
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(ConnectionError, match=r"s3://corpus/a.jsonl could not be read \(\w+\); run the same command"):
        list(read_file(unit.files[0], unit.config, ExtractConfig(), lambda size: None))
    with pytest.raises(ConfigError, match=r"cannot be listed .*; check the address, and endpoint .*AWS_ENDPOINT_URL"):
        find_files("s", unit.config)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    assert [file.path for file in find_files("s", unit.config)] == ["s3://corpus/a.jsonl"]
    assert len(list(read_file(unit.files[0], unit.config, ExtractConfig(), lambda size: None))) == 1000


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://corpus/none/*.jsonl", "matches no file"),
        ("s3://nobucket/a", "matches no file|cannot be listed"),
        ("nosuch://a/b", "'nosuch://a/b' cannot be listed"),
    ],
)
def test_addresses_that_lead_nowhere(s3: Any, address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_files("s", source(address))


@pytest.mark.parametrize(
    "address", [f"s3://AKID:{SECRET}@corpus/a", f"https://x.org/a?X-Amz-Signature={SECRET}", "simplecache::s3://a/b"]
)
def test_an_address_with_credentials_is_refused_and_not_repeated(tmp_path: Path, address: str) -> None:
    config = tmp_path / "data.toml"
    prose_and_pages(config, tmp_path / "in")
    with pytest.raises(ConfigError, match=r"files: an address with") as caught:
        load(DataConfig, config, [f"sources.prose.files=['{address}']"])
    assert SECRET not in str(caught.value)


def test_a_local_key_is_of_contents(tmp_path: Path) -> None:
    """Compares cache keys of a local file, which depend on its content and not on its modification time."""
    config_file = tmp_path / "data.toml"
    prose_and_pages(config_file, tmp_path / "in")
    (tmp_path / "in").mkdir()
    for name in ("prose.jsonl", "pages.warc.gz"):
        (tmp_path / "in" / name).write_bytes(hashlib.sha256(name.encode()).digest())
    config = load(DataConfig, config_file)
    first = inputs_hash(config, input_units(config), tmp_path / "inputs.json")
    (tmp_path / "in/prose.jsonl").touch()
    assert inputs_hash(config, input_units(config), tmp_path / "inputs.json") == first
    (tmp_path / "in/prose.jsonl").write_bytes(b"other")
    assert inputs_hash(config, input_units(config), tmp_path / "inputs.json") != first
