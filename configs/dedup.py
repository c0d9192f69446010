"""Config section [dedup] of a data run: which documents are duplicates of others."""

from typing import Literal

from pydantic import Field, field_validator

from configs.section import Section


class DedupConfig(Section):
    """MinHash after FineWeb: `bands` x `rows` 64-bit hashes over word n-grams (2n characters in CJK text)."""

    exact: bool = True
    """Whether documents whose texts differ only in case and white space are duplicates."""
    url: bool = False
    """Whether documents with the same URL are duplicates, however their texts differ."""
    minhash: bool = True
    """Whether near-duplicates are found by MinHash; the keys below are its settings."""
    bands: int = Field(default=14, ge=1)
    """The number of bands; documents that agree in all rows of one band are compared."""
    rows: int = Field(default=8, ge=1)
    """The number of hashes in a band; more of them require more similarity."""
    ngram: int = Field(default=5, ge=1)
    """The length of an n-gram in words, or in pairs of characters in CJK text."""
    seed: int = Field(default=1, ge=0)
    """The seed of the hash functions."""
    verify: float | Literal[False] = 0.75
    """The minimum exact Jaccard similarity of a near-duplicate to the document that is kept; with false, all documents
    that agree in a band, directly or through others, are near-duplicates without comparing their texts."""
    index: tuple[str, ...] = ()
    """The run.dir of earlier runs; documents that duplicate theirs are dropped."""
    memory_mb: int = Field(default=1024, ge=1)
    """The memory of one task that looks for duplicates, in MiB."""

    @field_validator("verify", mode="before")
    @classmethod
    def _similarity(cls, value: object) -> object:
        if value is False or (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1):
            return value
        raise ValueError(
            f"{value!r} is not a similarity above 0 and up to 1; set for example 0.75, or false to compare no texts"
        )
