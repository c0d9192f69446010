"""Config of tokenizers: how one is trained, and the root config of `trivium tokenizer train`."""

from enum import StrEnum
from typing import Literal

from pydantic import Field, field_validator, model_validator

from configs.section import Section

RESERVED_NAME = "<|reserved_{}|>"  # the names of tokens without a use, by number
CONTROLS = ("<unk>", "<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


class TokenizerKind(StrEnum):
    """The algorithm of a tokenizer."""

    BPE = "bpe"
    UNIGRAM = "unigram"
    BYTE_BPE = "byte_bpe"
    WORDPIECE = "wordpiece"


class TokenizerTraining(Section):
    """A tokenizer that is trained on a sample of text."""

    kind: TokenizerKind = TokenizerKind.BPE
    """The algorithm: BPE or Unigram of sentencepiece, both with byte fallback, byte-level BPE as in GPT-2, or WordPiece
    as in BERT, which keeps neither white space nor unknown characters."""
    vocab_size: int = Field(default=8192, ge=300)
    """The number of tokens, including control symbols and bytes, before vocab_multiple rounds it up."""
    vocab_multiple: int = Field(default=1, ge=1, le=65_536)
    """The number that the vocabulary's size is made a multiple of, by reserved tokens at its end."""
    special_tokens: tuple[str, ...] = ()
    """More control symbols, such as "<|tool|>", that text never becomes; their ids follow those of <s> and the others,
    within vocab_size."""
    reserved_tokens: int = Field(default=0, ge=0, le=65_536)
    """The number of control symbols without a use yet, <|reserved_0|> and so on; their ids follow the special tokens,
    within vocab_size."""
    whitespace_runs: int = Field(default=0, ge=0, le=256)
    """The longest run of spaces or of tabs, as code is indented with, that is one token even if it is rare in the
    text."""
    train_bytes: int = Field(default=8_000_000, ge=1)
    """The maximum number of bytes of text that it is trained on."""
    character_coverage: float = Field(default=0.9995, ge=0.98, le=1)
    """The share of the text's characters that get a token of their own; others become bytes, or <unk>."""
    max_piece_length: int = Field(default=16, ge=1)
    """The maximum length of a token, in characters, or in bytes if it is byte-level BPE; WordPiece has no maximum."""
    seed: int = Field(default=0, ge=0)
    """The seed that draws the sample of text."""

    @field_validator("special_tokens")
    @classmethod
    def _names_can_be_symbols(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if len(name) < 2 or any(one.isspace() or one in "\0\u2581\u2585" for one in name):
                raise ValueError(
                    f"{name!r} cannot be a control symbol; use two characters or more, without white space and U+2581, "
                    "such as <|tool|>"
                )
            if name in CONTROLS or (name.startswith(("<|reserved_", "<0x"))):
                raise ValueError(f"{name!r} is a token that every tokenizer has, or may have; leave it out")
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{repeated[0]!r} stands there twice; leave one out")
        return names

    @model_validator(mode="after")
    def _white_space_is_kept(self) -> "TokenizerTraining":
        if self.whitespace_runs and self.kind == TokenizerKind.WORDPIECE:
            raise ValueError(
                f"whitespace_runs = {self.whitespace_runs}: WordPiece keeps no white space; leave the key out, or "
                "choose another kind"
            )
        return self

    def symbols(self) -> tuple[str, ...]:
        """Returns the special and the reserved tokens, in the order of their ids."""
        return (*self.special_tokens, *(RESERVED_NAME.format(number) for number in range(self.reserved_tokens)))


_ROLES = ("end_of_document", "begin_of_document", "padding")


class TokenizerConfig(TokenizerTraining):
    """A tokenizer that is trained on a sample of all sources together, or one that exists already."""

    file: str | None = None
    """The folder or file of a tokenizer to use as it is: a tokenizer.json of Hugging Face's, or one that Trivium
    trained; left out, one is trained."""
    end_of_document: str | None = None
    """The token that ends a document, if the tokenizer was trained elsewhere; left out, the end that the files beside
    it name."""
    begin_of_document: str | None = None
    """The token that begins a document, if the tokenizer was trained elsewhere, "" for none; left out, the one that the
    tokenizer itself puts before a text."""
    padding: str | None = None
    """The token that fills rows, if the tokenizer was trained elsewhere; left out, its own, or the end of a
    document."""

    @model_validator(mode="after")
    def _trained_or_taken(self) -> "TokenizerConfig":
        if self.file is None:
            if given := [key for key in _ROLES if getattr(self, key) is not None]:
                raise ValueError(
                    f"{given[0]} = {getattr(self, given[0])!r} is for a tokenizer that was trained elsewhere; set "
                    "tokenizer.file as well, or leave it out"
                )
            return self
        for key, field in TokenizerTraining.model_fields.items():
            if getattr(self, key) != field.default:
                raise ValueError(
                    f"{key} = {getattr(self, key)!r} is for training, and tokenizer.file = {self.file!r} is taken as "
                    f"it is; leave out {key}, or tokenizer.file"
                )
        return self


class TextConfig(Section):
    """The text that a tokenizer is trained on: files, the documents of a data run, or both."""

    files: tuple[str, ...] = ()
    """Paths, globs or folders of text, relative to the working directory; they may be compressed with gzip or
    Zstandard."""
    format: Literal["jsonl", "parquet", "text", "code"] | None = None
    """The format of the files; left out, their extensions tell it, such as .jsonl.gz, .parquet, .txt or .py."""
    text_key: str = "text"
    """The key or column that holds the text (jsonl, parquet); if it is nested, a path such as "a.b"."""
    encoding: str = "utf-8"
    """The encoding of text or code, by its web name such as windows-1251."""
    run: str | None = None
    """The folder of a data run whose documents for training are read, not those held out."""

    @model_validator(mode="after")
    def _there_is_text(self) -> "TextConfig":
        if not self.files and self.run is None:
            raise ValueError("it names no text; set text.files, or text.run to the folder of a data run")
        return self


class TokenizerTrainConfig(Section):
    """The root of the config of `trivium tokenizer train`: text in, a folder with the tokenizer out."""

    out: str
    """The folder to write; it must not exist yet."""
    text: TextConfig
    """The text that it is trained on."""
    tokenizer: TokenizerTraining = TokenizerTraining()
    """The tokenizer that is trained."""
