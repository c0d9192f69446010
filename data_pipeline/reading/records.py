"""What readers are given and what they give: files of a source, records of a file, and why a record cannot be used.

A record that cannot be used is never lost: it is yielded with a reason, and `extraction.SetAside` counts it and keeps
where it was. Reading itself lives in the modules beside this one, one a format.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from configs.sources import SourceConfig

# Content is lost with these: they count towards extract.max_bad_share, and every one is set aside.
BROKEN = frozenset(
    {
        "unreadable",  # no permission, a dangling link, an input/output error
        "invalid_utf8",
        *("invalid_utf16", "invalid_utf32"),  # after a byte order mark, or where sources.NAME.encoding says so
        "undecodable",  # a page above extract.max_undecoded_share; text in another encoding than sources.NAME.encoding
        "nul_bytes",
        "bad_json",
        "not_an_object",
        "missing_text",
        "text_not_a_string",
        "empty",  # a record without text
        "record_too_large",  # above extract.max_record_bytes
        "expansion_limit",  # above extract.max_expansion or extract.max_expanded_bytes
        "cut_gzip",
        "corrupt_gzip",
        "cut_zstd",
        "corrupt_zstd",
        "zstd_window_too_large",
        "bad_warc",
        "cut_record",
        "bad_content_encoding",
        "unknown_content_encoding",
        "bad_parquet",
        "too_complex",  # a page that no extractor reads in reasonable time
        "page_too_slow",  # above extract.seconds_per_page
        "extractor_failed",  # a parser raised an error over the page, or crashed
    }
)
# Nothing is lost with these: set aside as well, counted towards no share.
HARMLESS = frozenset(
    {
        *("empty_file", "seen_before", "symlink_loop", "not_a_file"),
        "one_character",  # a text of one character over and over
    }
)
# Sound records without a wanted document: counted, a few of them kept as samples.
UNWANTED = frozenset(
    {"http_error", "not_html", "no_main_text", "blocked_url", "binary", "vendored_folder", "generated_folder"}
)

SAMPLE_BYTES = 300

Advance = Callable[[int], None]  # told of bytes read from storage, for the progress bar


@dataclass(frozen=True)
class FoundFile:
    """A path that a source's patterns lead to; with a `reason`, one that is not to be read.

    `root` is the folder that was searched, empty for a file that was named itself. `identity` says which version of
    a remote object it is (its ETag, say); local files are told apart by their content. `name` is what its documents are
    named after: see `ids`.
    """

    path: str
    size: int
    root: str = ""
    reason: str = ""
    identity: str = ""
    name: str = ""

    @property
    def inner_path(self) -> str:
        """The path below the folder that was searched."""
        return self.path.removeprefix(self.root).lstrip("/") if self.root else self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class InputUnit:
    """What one worker reads in one go: a file, or several small ones. `index` is its place within the source."""

    source: str
    index: int
    files: tuple[FoundFile, ...]
    config: SourceConfig

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


@dataclass
class Record:
    """What was read: text or, with `html`, a page; with a `reason`, a sample of what cannot be used.

    `position` is a line or row (from 1), or the byte offset of a WARC record. `offset` is the byte at which a line
    starts, in the file's decompressed content, or that of the damage in a file that is one document. `size` is in
    bytes. `count` is above 1 where many records are lost as one. `id` is the record's own, empty where it has none.
    `charset_from` is what a page's encoding was known by. `notes` name what was mended or left out, for the ledger.
    """

    position: int
    size: int
    text: str = ""
    id: str = ""
    html: bool = False
    reason: str = ""
    offset: int = 0
    count: int = 1
    charset_from: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: set[str] = field(default_factory=set)


def sample(content: bytes) -> str:
    return bytes(content[:SAMPLE_BYTES]).decode("utf-8", errors="replace")
