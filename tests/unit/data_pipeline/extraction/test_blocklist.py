"""Tests which URLs a blocklist blocks, and which lists are refused."""

import bz2
import gzip
import re
from pathlib import Path

import pytest
import zstandard

from configs.loader import ConfigError
from configs.sources import BlocklistConfig, ExtractConfig
from data_pipeline.extraction.blocklist import Blocklist
from data_pipeline.extraction.extract import Extract


@pytest.fixture
def config(tmp_path: Path) -> BlocklistConfig:
    (tmp_path / "domains").write_text("# a comment\nexample.com\n\nBücher.example # and another\nco.uk.example.\n")
    (tmp_path / "hosts.gz").write_bytes(gzip.compress(b"www.host.org\n10.0.0.1\n"))
    (tmp_path / "prefixes").write_text("path.net/forum\nhttps://path.net/a/b/\n", encoding="utf-8-sig")
    return BlocklistConfig(
        domains=(str(tmp_path / "domains"),),
        hosts=(str(tmp_path / "hosts.gz"),),
        prefixes=(str(tmp_path / "prefixes"),),
    )


@pytest.mark.parametrize(
    ("url", "blocked"),
    [
        ("http://example.com/", True),
        ("https://a.b.EXAMPLE.com.:8080/x?y#z", True),
        ("http://user:word@example.com", True),
        ("http://notexample.com/", False),
        ("http://example.com.org/", False),
        ("http://com/", False),
        ("http://xn--bcher-kva.example/", True),
        ("http://context.bücher.example/", True),
        ("http://www.host.org/any", True),
        ("http://host.org/", False),
        ("http://a.www.host.org/", False),
        ("http://10.0.0.1:80/", True),
        ("http://path.net/forum", True),
        ("http://path.net/forum/thread/1", True),
        ("http://path.net/forum?page=2", True),
        ("http://path.net/%66orum/x", True),
        ("http://path.net/x/../forum/", True),
        ("http://path.net/forumula", False),
        ("http://path.net/a", False),
        ("http://path.net/a/b", True),
        ("http://www.path.net/forum", False),
        ("http://[::1", False),
        ("http://" + "ü" * 80 + ".de/", False),
        ("no url at all", False),
        ("", False),
    ],
)
def test_what_is_blocked(config: BlocklistConfig, url: str, blocked: bool) -> None:
    assert Blocklist.load(config).blocks(url) is blocked


def test_an_empty_list_blocks_nothing() -> None:
    assert not Blocklist.load(BlocklistConfig()).blocks("http://example.com/")


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        (
            "domains",
            "example.com/path",
            "line 2: 'example.com/path' has a path; it belongs in extract.blocklist.prefixes",
        ),
        (
            "prefixes",
            "example.com",
            "line 2: 'example.com' has no path; a whole host belongs in extract.blocklist.hosts",
        ),
        ("hosts", "0.0.0.0 example.com", "line 2: '0.0.0.0 example.com' names no host"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path: Path, kind: str, line: str, message: str) -> None:
    path = tmp_path / "list"
    path.write_text(f"fine.org/x\n{line}\n" if kind == "prefixes" else f"fine.org\n{line}\n")
    with pytest.raises(ConfigError, match=message):
        Blocklist.load(BlocklistConfig(**{kind: (str(path),)}))
    with pytest.raises(ConfigError, match=f"extract.blocklist.{kind}: .* cannot be read"):
        Blocklist.load(BlocklistConfig(**{kind: (str(tmp_path / "none"),)}))


@pytest.mark.parametrize(
    ("kind", "line", "words", "right"),
    [
        ("hosts", "0.0.0.0 example.com", "names no host; write one entry per line", ("hosts", "0.0.0.0\nexample.com")),
        ("hosts", "http://[::1", "or remove the line", ("hosts", "")),
        ("hosts", "example.com/path", "belongs in extract.blocklist.prefixes", ("prefixes", "example.com/path")),
        ("prefixes", "example.com", "belongs in extract.blocklist.hosts", ("hosts", "example.com")),
    ],
)
def test_a_list_is_right_once_it_is_as_the_message_says(
    tmp_path: Path, kind: str, line: str, words: str, right: tuple[str, str]
) -> None:
    (tmp_path / "list").write_text(line)
    with pytest.raises(ConfigError, match=re.escape(words)):
        Blocklist.load(BlocklistConfig(**{kind: (str(tmp_path / "list"),)}))
    (tmp_path / "list").write_text(right[1])
    Blocklist.load(BlocklistConfig(**{right[0]: (str(tmp_path / "list"),)}))


def test_a_file_that_cannot_be_read_is_right_once_it_is_as_the_message_says(tmp_path: Path) -> None:
    text = "bücher.example\n"
    broken = {
        "none": None,
        "latin": text.encode("latin-1"),
        "text.gz": text.encode(),
        "cut.gz": gzip.compress(b"x")[:9],
        "changed.gz": gzip.compress(text.encode())[:10] + b"\xff" * 20,
        "list.bz2": bz2.compress(text.encode()),
    }
    for name, content in broken.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"name a file of UTF-8 text, plain or compressed by gzip or Zstandard$"):
            Blocklist.load(BlocklistConfig(hosts=(str(path),)))
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        assert Blocklist.load(BlocklistConfig(hosts=(str(path),))).blocks("http://bücher.example/")
    for name, content in (("a.zst", zstandard.compress(text.encode())), ("a.txt", text.encode("utf-16"))):
        (tmp_path / name).write_bytes(content)
        assert Blocklist.load(BlocklistConfig(hosts=(str(tmp_path / name),))).blocks("http://bücher.example/")


def test_blocked_pages_are_not_extracted(config: BlocklistConfig) -> None:
    from datatrove.data import Document

    def page(metadata: dict) -> Document:
        return Document(text="<p>text</p>", id="1", metadata={"raw": {"reason": "", "html": True}, **metadata})

    documents = [
        page({"url": "http://example.com"}),
        page({"record": {"url": "http://path.net/forum"}}),
        page({"url": "http://fine.org"}),
        page({}),
    ]
    done = list(Extract(ExtractConfig(blocklist=config)).run(documents))
    assert [document.metadata["raw"]["reason"] for document in done] == ["blocked_url", "blocked_url", "", ""]
    assert [document.text for document in done][1:3] == ["<p>text</p>", "text"]
