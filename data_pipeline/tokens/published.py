"""Opens tokenizers in the forms in which models publish them, only to measure them: none has to fit a data run.

The forms are tokenizer.json, any sentencepiece model, GPT-2's two files (vocab.json and merges.txt, or encoder.json and
vocab.bpe), and the ranks of tiktoken of GPT-2 and of Qwen, whose file lacks the pattern that divides text into words.
"""

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from configs.loader import ConfigError
from data_pipeline.core.integrity import remedy
from data_pipeline.tokens.huggingface_tokenizer import HuggingFaceTokenizer, byte_alphabet
from data_pipeline.tokens.tokenizer import HUGGINGFACE_FILE, SENTENCEPIECE_FILE, SPACE, Tokenizer

_GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_PATTERNS = {"gpt2": _GPT2, "r50k_base": _GPT2, "qwen": _QWEN}  # by the name of a .tiktoken file


class Encoding(Protocol):
    """Function of texts that returns the ids of each."""

    def __call__(self, texts: Sequence[str], /) -> list[list[int]]: ...


@dataclass(frozen=True)
class Published:
    """A tokenizer to measure; `spellings` are the texts of all ids, empty for control symbols and unused numbers."""

    path: str
    encode: Encoding
    spellings: list[str]
    sha256: str = ""

    @property
    def vocab_size(self) -> int:
        """The number of ids."""
        return len(self.spellings)

    def count(self, texts: Sequence[str]) -> np.ndarray:
        """Returns int64 [vocab_size], how often each id is in the texts."""
        return np.bincount(np.concatenate([[], *self.encode(texts)]).astype(np.int64), minlength=self.vocab_size)


def open_published(path: str | Path) -> Published:
    """Opens a tokenizer by its folder or file. Raises ConfigError if it is none, or in a form that is not known."""
    given = Path(path)
    for file in [given] if not given.is_dir() else [given / SENTENCEPIECE_FILE, given / HUGGINGFACE_FILE]:
        if file.is_file() and file.suffix in (".model", ".json") and file.name not in dict(_GPT2_FILES):
            return _of_file(file)
    folder = given if given.is_dir() else given.parent
    for vocabulary, merges in _GPT2_FILES:
        if (given.is_dir() or given.name in (vocabulary, merges)) and (folder / vocabulary).is_file():
            return _of_gpt2(folder / vocabulary, folder / merges)
    if given.is_file() and given.suffix == ".tiktoken":
        return _of_ranks(given)
    raise ConfigError(
        f"{path} is no tokenizer that can be measured; name a folder or file of {HUGGINGFACE_FILE}, a sentencepiece "
        f"model, {' or '.join(' with '.join(pair) for pair in _GPT2_FILES)}, or {' or '.join(_PATTERNS)}.tiktoken"
    )


def _of_file(file: Path) -> Published:
    try:
        tokenizer = Tokenizer.load(file, complete=False)
    except ValueError as error:
        if file.suffix == ".model":
            return _of_sentencepiece(file)
        raise ConfigError(str(error)) from None
    return _of_tokenizer(tokenizer, str(file))


def _of_tokenizer(tokenizer: Tokenizer, path: str) -> Published:
    """Describes a tokenizer that Trivium can read; bytes that are no whole character are spelled as \\xNN."""
    symbols = set(tokenizer.special_ids.values())
    known = bool(tokenizer.token_bytes.any())
    spellings = [
        "" if number in symbols else _text(tokenizer.bytes_of(number)) if known else piece
        for number, piece in enumerate(tokenizer.pieces)
    ]

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [ids.tolist() for ids in tokenizer.encode_arrays(texts)]

    return Published(path, encode, spellings, tokenizer.sha256)


def _of_sentencepiece(file: Path) -> Published:
    """Opens a sentencepiece model with whatever normalisation it has."""
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.Load(str(file))
    except (RuntimeError, OSError):
        what = remedy(file, "restore it, or name another tokenizer")
        raise ConfigError(f"{file} is no sentencepiece model; {what}") from None
    spellings = [
        "" if model.is_control(one) or model.is_unknown(one) else model.id_to_piece(one).replace(SPACE, " ")
        for one in range(model.vocab_size())
    ]
    return Published(str(file), lambda texts: model.encode(list(texts)), spellings)


def _of_gpt2(vocabulary: Path, merges: Path) -> Published:
    try:
        ids = json.loads(vocabulary.read_text(encoding="utf-8"))
        lines = merges.read_text(encoding="utf-8").splitlines()
        pairs = [(one, other) for one, other in (line.split(" ") for line in lines if line and "#version" not in line)]
        return _byte_level(ids, pairs, _GPT2, str(vocabulary.parent))
    except Exception as error:  # tokenizers raises no class of its own
        said = str(error).partition("\n")[0]
        raise ConfigError(
            f"{vocabulary} and {merges.name} are not GPT-2's files ({said}); restore them, or name another tokenizer"
        ) from None


def _of_ranks(file: Path) -> Published:
    """Opens a file of tiktoken's ranks, one token in base64 and its rank a line."""
    pattern = _PATTERNS.get(file.stem)
    if pattern is None:
        raise ConfigError(
            f"{file} does not say how text is divided into words, and that is known for {', '.join(_PATTERNS)} alone; "
            f"name the model's {HUGGINGFACE_FILE} instead"
        )
    spelled = {byte: one for one, byte in byte_alphabet().items()}
    try:
        lines = [line.split() for line in file.read_text(encoding="ascii").splitlines() if line]
        ids = {"".join(spelled[byte] for byte in base64.b64decode(token)): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error) as error:
        raise ConfigError(f"{file} is no file of ranks ({error}); restore it, or name another tokenizer") from None
    # tiktoken merges the neighbours that make the token of the lowest rank, however that token is divided.
    pairs = [
        (piece[:at], piece[at:])
        for piece in sorted(ids, key=ids.__getitem__)
        for at in range(1, len(piece))
        if piece[:at] in ids and piece[at:] in ids
    ]
    return _byte_level(ids, pairs, pattern, str(file))


def _byte_level(ids: Mapping[str, int], pairs: list[tuple[str, str]], pattern: str, path: str) -> Published:
    fast = tokenizers.Tokenizer(models.BPE(dict(ids), pairs))
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Sequence([words, in_bytes]), decoders.ByteLevel()
    return _of_tokenizer(HuggingFaceTokenizer(fast.to_str().encode(), path, complete=False), path)


def _text(content: bytes) -> str:
    """Returns bytes as text; what is not UTF-8 is spelled as \\xNN."""
    return content.decode("utf-8", errors="backslashreplace")
