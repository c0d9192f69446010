"""Sections of a data run for the stages that take parts out of documents, and decontamination.

Each stage is off while its section is absent, or has `enabled = false`. Also here: what the documents stage does
with texts of which little is left. The rest of a data run's config is in `configs.data`.
"""

from typing import Literal

from pydantic import Field, model_validator

from configs.base import Section

Kind = Literal["email", "ip", "phone", "card", "key", "secret"]
KINDS: tuple[Kind, ...] = ("email", "ip", "phone", "card", "key", "secret")


class DecontaminateConfig(Section):
    """Documents that share an n-gram with evaluation files (GPT-3, arXiv 2005.14165, appendix C)."""

    enabled: bool = True
    files: tuple[str, ...] = Field(min_length=1)  # paths or glob patterns, relative to the working directory
    format: Literal["jsonl", "text"] = "jsonl"  # text: a file is one item
    text_keys: tuple[str, ...] = ("text",)  # jsonl: joined to one text; a value is a string or a list of strings
    id_key: str = "id"  # jsonl: an item without it is named after its line
    ngram: int = Field(default=13, ge=2)  # words; twice as many characters in CJK text
    # Items shorter than an n-gram are looked for whole if they have this many words (twice the characters), else not.
    min_words: int = Field(default=8, ge=2)
    # An item counts once this share of its n-grams is in a document; 0: a single one will do.
    min_share: float = Field(default=0.0, ge=0, le=1)
    action: Literal["drop", "cut"] = "drop"  # the document, or what was matched and `margin` characters around it
    margin: int = Field(default=200, ge=0)

    @model_validator(mode="after")
    def _lengths(self) -> "DecontaminateConfig":
        if self.min_words > self.ngram:
            raise ValueError(
                f"min_words = {self.min_words} is above ngram = {self.ngram}, so that items in between would be looked "
                "for by nothing; set it to ngram or lower"
            )
        return self


class LinesConfig(Section):
    """Lines or paragraphs that occur more than `max_copies` times: the first ones stay, the others are cut.

    Six copies of a line are what Llama 3 allows (arXiv 2407.21783, section 3.1.1).
    """

    enabled: bool = True
    unit: Literal["line", "paragraph"] = "line"
    max_copies: int = Field(default=6, ge=1)
    min_chars: int = Field(default=20, ge=1)  # without white space at its ends; shorter ones are never cut
    scope: Literal["source", "all"] = "all"  # where copies are counted
    sources: tuple[str, ...] | None = None  # which sources take part; all of them unless said


class SubstringsConfig(Section):
    """Substrings of at least `min_bytes` that occur earlier are cut (Lee et al. 2022, arXiv 2107.06499).

    The paper takes 50 tokens, about 200 bytes of English.
    """

    enabled: bool = True
    min_bytes: int = Field(default=200, ge=32)
    sources: tuple[str, ...] | None = None  # which sources take part; all of them unless said


class PiiConfig(Section):
    """Personal data, keys and tokens: what is looked for, and what becomes of it.

    `secret` is any long random value assigned to a name like password: half guessing, so not on unless asked for.
    """

    enabled: bool = True
    actions: dict[Kind, Literal["replace", "drop_document"]] = Field(
        default={"email": "replace", "ip": "replace", "phone": "replace", "card": "replace", "key": "replace"},
        min_length=1,
    )
    # Others than <EMAIL>, <IP_ADDRESS>, <PHONE>, <CARD>, <KEY>, <SECRET>.
    replacements: dict[Kind, str] = Field(default_factory=dict)
    private_ips: bool = False  # addresses that name no host of the internet: private, reserved, documentation

    @model_validator(mode="after")
    def _replacements_used(self) -> "PiiConfig":
        for kind in self.replacements:
            if self.actions.get(kind) != "replace":
                raise ValueError(
                    f'replacements.{kind} is used by nothing; set actions.{kind} = "replace" or leave it out'
                )
        return self


class DocumentsConfig(Section):
    """What the documents stage publishes of texts that stages have cut."""

    cut_share_max: float = Field(default=0.8, ge=0, le=1)  # of a document's bytes; beyond it goes as mostly_cut
