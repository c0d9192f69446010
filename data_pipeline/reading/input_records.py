"""Data classes of the readers (FoundFile, InputUnit, Record) and the reasons why a record cannot be used.

A record that cannot be used is never lost: readers yield it with a reason, and `extraction.extract.SetAside` counts it
and writes down its location. The readers themselves are in the other modules of this package, one per format.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from configs.sources import SourceConfig

NOT_READ = "unsupported_compression"  # of a file in bzip2, xz or zip, for example
# Reasons by which content is lost: such records count towards extract.max_bad_share, and every one is set aside.
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
        NOT_READ,
        "bad_warc",
        "cut_record",
        "bad_content_encoding",
        "unknown_content_encoding",
        "bad_parquet",
        "too_complex",  # a page whose nesting or attributes no extractor handles in reasonable time
        "page_too_slow",  # above extract.seconds_per_page
        "extractor_failed",  # a parser raised an error on the page, or crashed
    }
)
# Reasons by which text may be in another encoding than its source says.
UNDECODABLE = frozenset({"invalid_utf8", "invalid_utf16", "invalid_utf32", "undecodable", "nul_bytes"})
# Reasons by which nothing is lost: such records are set aside too, but do not count towards extract.max_bad_share.
HARMLESS = frozenset(
    {
        *("empty_file", "seen_before", "symlink_loop", "not_a_file"),
        "one_character",  # a text that repeats a single character
    }
)
# Reasons for intact records that hold no wanted document: they are counted, and a few are kept as samples.
UNWANTED = frozenset(
    {"http_error", "not_html", "no_main_text", "blocked_url", "binary", "vendored_folder", "generated_folder"}
)

SAMPLE_BYTES = 300

Advance = Callable[[int], None]  # called with the number of bytes just read from storage, for the progress bar


@dataclass(frozen=True)
class FoundFile:
    """A path that a source's patterns match; it is not read if it has a `reason`.

    `size` is in stored bytes. `root` is the folder that was searched, or the folder of a file that a pattern names; it
    is empty over HTTP. `identity` is the version of a remote object, such as its ETag; versions of local files are
    recognized by their content. `name` is the file's name within the ids of its documents: see `ids`.
    """

    path: str
    size: int
    root: str = ""
    reason: str = ""
    identity: str = ""
    name: str = ""

    @property
    def inner_path(self) -> str:
        """The path below `root`, or the file's name if there is no root."""
        return self.path.removeprefix(self.root).lstrip("/") if self.root else self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class InputUnit:
    """A unit of work for one worker: a file, or several small ones; `index` is its number within the source."""

    source: str
    index: int
    files: tuple[FoundFile, ...]
    config: SourceConfig

    @property
    def size(self) -> int:
        """Stored bytes of all files."""
        return sum(file.size for file in self.files)


@dataclass
class Record:
    """One record of a file, which will become one document.

    `text` is its text, or an HTML page if `html` is set, or a sample of its content if `reason` says why it cannot be
    used. `position` is a line or row (from 1), or the byte offset of a WARC record. `offset` is the byte in the
    decompressed content at which a line starts or, in a file that is one document, at which the damage is. `size` is in
    bytes. `count` is above 1 if several lost records are reported as one. `id` is the record's own id, or empty.
    `charset_from` says how a page's encoding was found. `notes` name what was repaired or left out, for the ledger.
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
    """Returns the first `SAMPLE_BYTES` bytes as text, with U+FFFD for what is not UTF-8."""
    return bytes(content[:SAMPLE_BYTES]).decode("utf-8", errors="replace")
