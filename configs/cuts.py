"""Config sections of the stages that cut text out of documents, of decontamination and of the documents stage.

A stage is off if its section is absent or has `enabled = false`; [documents], which says what happens to texts of which
little is left, always applies. The rest of a data run's config is in `configs.data`.
"""

from typing import Literal

from pydantic import Field, model_validator

from configs.section import Section

Kind = Literal["email", "ip", "phone", "card", "key", "secret"]
KINDS: tuple[Kind, ...] = ("email", "ip", "phone", "card", "key", "secret")


class DecontaminateConfig(Section):
    """Documents that share an n-gram with evaluation files (GPT-3, arXiv 2005.14165, appendix C)."""

    enabled: bool = True
    """Whether the stage is on; false is the same as no section."""
    files: tuple[str, ...] = Field(min_length=1)
    """The evaluation files, compressed or not, as paths or glob patterns relative to the working directory."""
    format: Literal["jsonl", "parquet", "text"] = "jsonl"
    """Whether each line of a file is an item, or each row if it is Parquet (jsonl, parquet), or all of it is one."""
    text_keys: tuple[str, ...] = ("text",)
    """The keys of a JSON line, or the columns, whose values (strings or lists of strings) are an item's text; files may
    have different ones of them, and keys may be nested, as in "a.b"."""
    id_key: str = "id"
    """The key of a JSON line, or the column, that names the item; without it the item is named after its line."""
    ngram: int = Field(default=13, ge=2)
    """The length of an n-gram in words, or in pairs of characters in CJK text."""
    min_words: int = Field(default=8, ge=2)
    """An item shorter than an n-gram is looked for whole from this many words on (pairs of characters in CJK text)."""
    min_share: float = Field(default=0.0, ge=0, le=1)
    """The share of an item's n-grams that must be in one document to count; 0: a single n-gram is enough."""
    action: Literal["drop", "cut"] = "drop"
    """Whether the document is dropped, or the matching text is cut out of it."""
    margin: int = Field(default=200, ge=0)
    """The number of characters around a match that are cut with it; action = "drop" does not use it."""

    @model_validator(mode="after")
    def _lengths(self) -> "DecontaminateConfig":
        if self.min_words > self.ngram:
            raise ValueError(
                f"min_words = {self.min_words} is above ngram = {self.ngram}, so items in between would not be looked "
                "for; set it to ngram or lower"
            )
        return self


class LinesConfig(Section):
    """Lines or paragraphs that occur more than `max_copies` times: the first copies stay, the others are cut.

    Six copies of a line are what Llama 3 allows (arXiv 2407.21783, section 3.1.1).
    """

    enabled: bool = True
    """Whether the stage is on; false is the same as no section."""
    unit: Literal["line", "paragraph"] = "line"
    """The unit that is counted and cut: single lines, or paragraphs between blank lines."""
    max_copies: int = Field(default=6, ge=1)
    """The number of copies that stay."""
    min_chars: int = Field(default=20, ge=1)
    """The minimum length of a line or paragraph that can be cut, in characters without white space at its ends."""
    scope: Literal["source", "all"] = "all"
    """Whether copies are counted in each source by itself, or in all together."""
    sources: tuple[str, ...] | None = None
    """The sources that take part, by name; left out, all do."""


class SubstringsConfig(Section):
    """Substrings of at least `min_bytes` that occur earlier are cut (Lee et al. 2022, arXiv 2107.06499).

    The paper takes 50 tokens, about 200 bytes of English.
    """

    enabled: bool = True
    """Whether the stage is on; false is the same as no section."""
    min_bytes: int = Field(default=200, ge=32)
    """The length in bytes of UTF-8 from which a repeated substring is cut."""
    sources: tuple[str, ...] | None = None
    """The sources that take part, by name; left out, all do."""


class PiiConfig(Section):
    """Personal data and credentials: the kinds to look for, and what is done with them.

    The kind `secret` is any long random value assigned to a name like password. It makes many mistakes, so it is off by
    default.
    """

    enabled: bool = True
    """Whether the stage is on; false is the same as no section."""
    actions: dict[Kind, Literal["replace", "drop_document"]] = Field(
        default={"email": "replace", "ip": "replace", "phone": "replace", "card": "replace", "key": "replace"},
        min_length=1,
    )
    """The kinds to look for, and whether each is replaced or its document dropped; other kinds are ignored."""
    replacements: dict[Kind, str] = Field(default_factory=dict)
    """Replacement texts by kind, other than <EMAIL>, <IP_ADDRESS>, <PHONE>, <CARD>, <KEY>, <SECRET>."""
    private_ips: bool = False
    """Whether IP addresses outside the public internet (private, reserved, documentation) are looked for as well."""

    @model_validator(mode="after")
    def _replacements_used(self) -> "PiiConfig":
        for kind in self.replacements:
            if self.actions.get(kind) != "replace":
                # All of them, since actions that are given take the place of those that are on by default.
                wanted = ", ".join(f'{name} = "{action}"' for name, action in {**self.actions, kind: "replace"}.items())
                raise ValueError(f"replacements.{kind} has no effect; set actions = {{ {wanted} }}, or leave it out")
        return self


class DocumentsConfig(Section):
    """Limits beyond which a document that stages have cut is dropped, with the reason mostly_cut.

    It is dropped if it lost a large share and little is left. So a document that lost a long licence but has text of
    its own stays, and so does a short one that lost a line.
    """

    cut_share_max: float = Field(default=0.8, ge=0, le=1)
    """The share of a document's bytes that may be cut, however few are left."""
    left_bytes_min: int = Field(default=500, ge=0)
    """The number of bytes left with which a document stays, whatever share was cut; 500 are about 80 English words."""
