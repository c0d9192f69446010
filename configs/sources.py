"""Config sections for the input of a data run: sources, extraction of texts, identification of their language."""

from typing import Literal

from pydantic import Field, model_validator

from configs.addresses import holds_credentials
from configs.section import Section

ANY_LANGUAGE = "any"
# Folders that stages keep beside a folder for each source: no source may have these names.
RESERVED = ("cuts", "drops", "matches", "rejected", "scratch", "work")


class SourceConfig(Section):
    """One named part of the mixture: its files, their format, and a rule set for each language that it may contain.

    Files may be compressed with gzip or Zstandard. Credentials never belong here: they come from the environment or
    fsspec's own configuration.
    """

    files: tuple[str, ...] = Field(min_length=1)
    """Paths, globs or folders, relative to the working directory, or addresses such as s3://bucket/folder."""
    format: Literal["jsonl", "warc", "parquet", "text", "html", "code"]
    """A document's unit: a line or row (jsonl, parquet), a page (warc), or a file (html, code, text if not lines)."""
    rules: dict[str, str] = Field(min_length=1)
    """The rule set, by its name under [rules], for each lid.176 code or "any"; other languages are dropped."""
    text_key: str = "text"
    """The key or column that holds the text (jsonl, parquet); if it is nested, a path such as "a.b"."""
    id_key: str = "id"
    """The key or column that holds the id (jsonl, parquet); a record without one is named after its file and line."""
    url_key: str = "url"
    """The key or column that holds the URL (jsonl, parquet)."""
    metadata_key: str = "metadata"
    """The key or column of an object that is kept as metadata.record (jsonl, parquet)."""
    fields: Literal["all"] | tuple[str, ...] = "all"
    """The other keys or columns that are kept, under metadata.fields (jsonl, parquet); [] for none."""
    encoding: str = "utf-8"
    """The encoding of text or code, by its web name such as windows-1251; a mark or valid UTF-8 overrides it."""
    document_per: Literal["file", "line"] = "file"
    """Whether a file of text is one document, or every line of it that is not blank is one."""
    extensions: tuple[str, ...] = ()
    """The extensions of the files to read in a folder, such as [".py", ".go"]; empty for all of the format."""
    skip_vendored: bool = False
    """Whether folders of other people's code (node_modules, vendor...) are left out (code)."""
    skip_generated: bool = False
    """Whether folders of built code (build, dist...) are left out (code)."""

    @model_validator(mode="after")
    def _keys_fit_the_format(self) -> "SourceConfig":
        records = self.format in ("jsonl", "parquet")
        for key in ("text_key", "id_key", "url_key", "metadata_key", "fields"):
            if getattr(self, key) != type(self).model_fields[key].default and not records:
                raise ValueError(f"{key} = {getattr(self, key)!r} says nothing of format {self.format!r}; leave it out")
        if self.encoding != "utf-8" and self.format not in ("text", "code"):
            raise ValueError(
                f"encoding = {self.encoding!r} is for the formats 'text' and 'code', not {self.format!r}, which says "
                "what its encoding is, or is UTF-8; leave it out"
            )
        if self.document_per != "file" and self.format != "text":
            raise ValueError(f"document_per = 'line' is for format 'text', not {self.format!r}; leave it out")
        for key in ("skip_vendored", "skip_generated"):
            if getattr(self, key) and self.format != "code":
                raise ValueError(f"{key} is for format 'code', not {self.format!r}; leave it out")
        for ending in self.extensions:
            if not ending.startswith(".") or ending != ending.lower():
                raise ValueError(f"extensions: {ending!r} should be in lower case with its dot, as in '.py'")
        for path in self.files:
            if holds_credentials(path):
                raise ValueError(
                    f"files: an address with {path.partition('://')[0]}:// holds credentials, a query or a chain "
                    "of file systems; give the plain address, and the credentials in the environment"
                )
        return self

    def rule_set(self, language: str) -> str | None:
        """Returns the rule set's name for a document's language; None if the source does not expect the language."""
        return self.rules.get(language, self.rules.get(ANY_LANGUAGE))


class BlocklistConfig(Section):
    """Files of unwanted URLs, one entry a line, `#` for comments, .gz or .zst too; local.

    Lists such as UT1 (dsi.ut-capitole.fr/blacklists) are in this form. Pages that match are dropped as blocked_url.
    """

    domains: tuple[str, ...] = ()
    """Files of domains: example.com stands for that host and every host below it."""
    hosts: tuple[str, ...] = ()
    """Files of hosts: www.example.com stands for that host alone."""
    prefixes: tuple[str, ...] = ()
    """Files of URL prefixes: example.com/forum stands for that path on that host and everything below it."""


class ExtractConfig(Section):
    """Extraction of texts from files, and limits beyond which records are set aside as broken or too large."""

    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    """The share of a source's records that may be broken (bad JSON, no text, cut files); above it the run stops."""
    repair: bool = True
    """Whether ftfy repairs wrongly decoded characters, stray control characters and line ends."""
    extractor: Literal["resiliparse", "trafilatura"] = "resiliparse"
    """The library that extracts a page's main text; where it finds none, the other one is tried."""
    blocklist: BlocklistConfig = BlocklistConfig()
    """URLs whose pages are dropped."""
    seconds_per_page: int = Field(default=60, ge=1)
    """The processor time, in seconds, that extraction of a page of many tags may take."""
    max_record_bytes: int = Field(default=16_000_000, ge=1_000)
    """The maximum size of a line, page or file, in bytes; a larger one is set aside without reading it into memory."""
    max_undecoded_share: float = Field(default=0.02, ge=0, le=1)
    """The share of a page's characters that its encoding may leave undecoded (U+FFFD); above it the page is broken."""
    max_fields_bytes: int = Field(default=10_000, ge=0)
    """The maximum size of a record's other fields, in bytes of JSON; fields beyond it are left out and counted."""
    max_expansion: float = Field(default=200.0, gt=1)
    """The maximum ratio of decompressed to compressed bytes, checked beyond 1 MiB of content; prose has 3 to 10."""
    max_expanded_bytes: int = Field(default=200_000_000_000, ge=1_000_000)
    """The maximum size of one decompressed file, in bytes."""


class LanguageConfig(Section):
    """Identification of a document's language."""

    max_chars: int = Field(default=10_000, ge=100)
    """The number of characters, from a document's start, by which its language is identified."""
    paragraphs: bool = False
    """Whether the language of every paragraph is identified too, for the score language_share."""
    min_paragraph_chars: int = Field(default=100, ge=1)
    """The minimum length of a paragraph, in characters; a shorter one is taken to be in the document's language."""
