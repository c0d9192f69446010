"""Interface of all tokenizers, their control symbols, and how one is loaded from disk.

A tokenizer is one file. `tokenizer.model` holds a sentencepiece model (BPE or Unigram with byte fallback, see
`sentencepiece_tokenizer`), `tokenizer.json` one of Hugging Face's tokenizers library (byte-level BPE or WordPiece, see
`huggingface_tokenizer`). All but WordPiece are lossless: decode(encode(text)) == text, and each id stands for a fixed
number of bytes, from which bits per byte are computed. Text that spells a control symbol (<s>, <|user|>, ...) is never
encoded as one; callers insert control symbols by id. A tokenizer.json that was trained elsewhere has control symbols of
its own, whose roles tokenizer_config.json or another file beside it says (`foreign`).
"""

import hashlib
import json
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.differences import changes
from configs.tokenizer import CONTROLS
from data_pipeline.core.integrity import remedy

if TYPE_CHECKING:
    from data_pipeline.tokens.foreign import Named

SENTENCEPIECE_FILE, HUGGINGFACE_FILE, INFO_FILE = "tokenizer.model", "tokenizer.json", "info.json"
ROLES_FILE = "tokenizer_config.json"  # beside a tokenizer.json that was trained elsewhere
SPECIALS = CONTROLS  # ids 0..7
UNK, BOS, EOS, PAD = SPECIALS[:4]
CHAT_CONTROLS = SPECIALS[4:]
FIM_CONTROLS = (
    "<|fim_prefix|>",
    "<|fim_suffix|>",
    "<|fim_middle|>",
)  # ids 8..10 if the mixture uses fill-in-the-middle
SPACE = "\u2581"  # spells a space in sentencepiece's pieces; it would decode a real one in a text as a space
_DRAWN_TEXTS, _DRAWN_TOKENS = 300, 24  # on which two tokenizers of the same tokens are compared
# Parts of a tokenizer.json that do not change the ids of a text here; what begins a document is compared by itself.
_UNUSED = ("truncation", "padding", "post_processor", "version")
PROBE = "  a\tb\r\n\n 中文\u3000 é e\u0301 ﬁ \0"  # a lossless tokenizer keeps it


class Tokenizer(ABC):
    """A trained tokenizer.

    `special_ids` are the ids of control symbols by name, in order; `token_bytes`, int64 [vocab_size], are the UTF-8
    bytes of each id, 0 for control symbols, and 0 for all ids of a tokenizer whose ids stand for no bytes. It is
    `lossless` if it keeps every text as it is. `bos_id`, which begins a document, is -1 if nothing does; `eos_id` ends
    one, and is -1 for a tokenizer loaded without `complete` whose files name no end. `tells_begin` is false if no file
    beside a tokenizer says what begins a document. `symbols` are the
    tokens by transformers' names of their roles, such as bos_token, which is there even if nothing puts it before a
    text; they are the variables of a chat template. `added_ids` are the ids of tokens that are looked for in a text
    before it is encoded, by name: those of `special_ids`, and others that stand for their own text. `sha256` is the
    checksum of its file `origin`. `pieces` are the spellings of all ids. A `foreign` tokenizer was trained elsewhere,
    and may have a chat template.
    """

    lossless = True
    foreign = False
    tells_begin = True
    chat_template: str | None = None

    def __init__(
        self, content: bytes, origin: str, pieces: Sequence[str], special_ids: dict[str, int], own_bytes: list[bytes]
    ) -> None:
        self.origin, self.sha256 = origin, hashlib.sha256(content).hexdigest()
        self.pieces, self.special_ids, self._bytes = list(pieces), special_ids, own_bytes
        self.vocab_size = len(self.pieces)
        self.unk_id, self.bos_id, self.eos_id, self.pad_id = (special_ids.get(name, -1) for name in SPECIALS[:4])
        self.symbols = self._symbols_of_roles()
        self.token_bytes = np.array([len(piece) for piece in own_bytes], dtype=np.int64)
        self._ids = {piece: i for i, piece in enumerate(self.pieces)}
        self.added_ids = dict(special_ids)

    @staticmethod
    def load(path: str | Path, threads: int = 1, named: "Named | None" = None, complete: bool = True) -> "Tokenizer":
        """Loads a tokenizer from its folder or its file; verifies the checksum in the folder's info.json, if any.

        `threads` is the number of threads that encode a batch; 1 by default, since the pipeline runs several processes.
        `named` are roles of a foreign tokenizer's tokens that a config gives; with `complete` the end of a document
        must be among the known ones. Raises ValueError if the file is missing, damaged, or a tokenizer that Trivium
        cannot use.
        """
        # Imported here, since both modules import this one.
        from data_pipeline.tokens.huggingface_tokenizer import HuggingFaceTokenizer
        from data_pipeline.tokens.sentencepiece_tokenizer import SentencePieceTokenizer

        path = tokenizer_file(path)
        if not path.is_file():
            raise ValueError(
                f"tokenizer {path} does not exist; make it with `trivium data run` or `trivium tokenizer train`"
            )
        content = path.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        expected = str(read_info(path).get("sha256", found))
        if expected != found:
            raise ValueError(
                f"tokenizer {path} has SHA-256 {found[:12]}..., but {path.with_name(INFO_FILE)} expects "
                f"{expected[:12]}...: the file was changed or damaged; {remade(path)}"
            )
        if path.suffix == ".json":
            return HuggingFaceTokenizer(content, str(path), threads, named, complete)
        return SentencePieceTokenizer(content, str(path), threads)

    def _symbols_of_roles(self) -> dict[str, str]:
        ids = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id, "unk": self.unk_id}
        return {f"{role}_token": self.pieces[number] for role, number in ids.items() if number >= 0}

    def encode(self, text: str) -> list[int]:
        """Returns the ids of plain text, which are never control symbols."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns a list of ids for each text; raises ValueError for a text that is not valid Unicode."""

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns int32 ids of each text, the same as `encode_batch`, but faster for some tokenizers."""
        return [np.array(ids, np.int32) for ids in self.encode_batch(texts)]

    def encode_marked(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Encodes a text whose control symbols count as such, as in a rendered chat template.

        Returns ids and the span [start, end) in characters of each. Raises ValueError as `encode_batch`.
        """
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        at, symbol = 0, re.compile("(" + "|".join(map(re.escape, self.special_ids)) + ")")
        for part in filter(None, symbol.split(text)):
            if part in self.special_ids:
                ids.append(self.special_ids[part])
                spans.append((at, at + len(part)))
            else:
                found = self.encode(part)
                ids += found
                spans += [(at + begin, at + end) for begin, end in self._spans(part, found)]
            at += len(part)
        return ids, spans

    def _spans(self, text: str, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Returns the span of each id in the text that was encoded to `ids`; a character in several ids is in each."""
        character = np.repeat(np.arange(len(text)), [len(one.encode()) for one in text])
        ends = np.cumsum(self.token_bytes[list(ids)])
        begins = ends - self.token_bytes[list(ids)]
        return [(int(character[i]), int(character[j - 1]) + 1) for i, j in zip(begins, ends, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids: control symbols give no text, and bytes that are not UTF-8 give U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        return b"".join([self._bytes[i] for i in self._checked(ids)]).decode("utf-8", errors="replace")

    def spells_symbol(self, text: str) -> bool:
        """Whether a text spells a control symbol that the model itself would make of it, and so is encoded in parts."""
        return False

    def piece_to_id(self, piece: str) -> int:
        """Returns the id of a piece or control symbol by its spelling; the id of <unk> if there is none."""
        return self._ids.get(piece, self.unk_id)

    def bytes_of(self, token: int) -> bytes:
        """Returns the bytes that an id stands for; none for a control symbol, or if ids stand for no bytes."""
        return self._bytes[token]

    def id_to_piece(self, token: int) -> str:
        """Returns the spelling of an id's piece."""
        return self.pieces[token]

    def _checked(self, ids: Sequence[int]) -> list[int]:
        """Returns ids as integers; raises ValueError for one outside the vocabulary."""
        ids = [int(i) for i in ids]
        outside = [i for i in ids if not 0 <= i < self.vocab_size]
        if outside:
            raise ValueError(f"token id {outside[0]} is not in a vocabulary of {self.vocab_size}")
        return ids


def tokenizer_file(path: str | Path) -> Path:
    """Returns the tokenizer's file in a folder, or `path` itself if that is no folder.

    A folder without either file gives the name of a sentencepiece model, which then does not exist. A folder with both
    is a Hugging Face export, whose tokenizer.json is made from the sentencepiece model.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    files = [path / SENTENCEPIECE_FILE, path / HUGGINGFACE_FILE]
    return next((file for file in files if file.is_file()), files[0])


def file_name(tokenizer: Path) -> str:
    """Returns the name under which a copy of a tokenizer's file is found by `tokenizer_file`."""
    return HUGGINGFACE_FILE if tokenizer.suffix == ".json" else SENTENCEPIECE_FILE


def roles_beside(tokenizer: Path) -> bytes | None:
    """Returns the content of the file with the roles of a foreign tokenizer's tokens, None if it has none."""
    file = tokenizer.with_name(ROLES_FILE)
    return file.read_bytes() if tokenizer.suffix == ".json" and file.is_file() else None


def read_info(path: Path) -> dict[str, Any]:
    """Returns what info.json beside a tokenizer says, {} if there is none. Raises ValueError if it is damaged."""
    file = path.with_name(INFO_FILE)
    if not file.is_file():
        return {}
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        info = None
    if not isinstance(info, dict):
        raise ValueError(f"{file} is not a JSON object; {remade(file)}")
    return info


def remade(path: str | Path) -> str:
    """Says, as the second half of a sentence, how to get a damaged file of a tokenizer again."""
    return remedy(Path(path), "restore it, or train one with `trivium tokenizer train`")


def check_unicode(text: str) -> None:
    """Raises ValueError if `text` contains half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.start + 20]
        raise ValueError(
            f"text has half a surrogate pair at character {error.start} ({around!r}) and is no valid Unicode; "
            "repair or drop the document"
        ) from None


def difference(first: Tokenizer, second: Tokenizer, strict: bool = False) -> str:
    """Returns in words how two tokenizers differ; "" if they give every text the same ids. `strict` as for files.

    They may be of two formats. Files are compared in full; else some hundred texts are encoded by both.
    """
    if first.sha256 == second.sha256:
        return _difference_of_ends(first, second, strict)
    other = first.special_ids.keys() ^ second.special_ids.keys()
    return (
        _difference_of_pieces(first, second)
        or _difference_of_ends(first, second, strict)
        or (f"{min(other)!r} is a control symbol in one of them alone" if other else "")
        or _difference_of_ids(first, second)
    )


def difference_of_files(first: str | Path, second: str | Path, strict: bool = False) -> str:
    """Returns in words how the tokenizers of two files differ; "" if they have the same content and roles.

    If no file says what begins a document, any beginning will do, unless `strict`: then nothing begins it.
    """
    files = tokenizer_file(first), tokenizer_file(second)
    contents = [file.read_bytes() for file in files]
    same = contents[0] == contents[1]
    if same and files[0].suffix != ".json":  # else their roles are in other files
        return ""
    parts: list[str] = []
    try:
        one, other = (Tokenizer.load(file, complete=False) for file in files)
        found = difference(one, other, strict)
        if files[0].suffix == files[1].suffix == ".json" and not same:
            parts = _differing_parts(*map(json.loads, contents))
            same = not parts
    except ValueError as error:
        return "" if same else str(error)
    if same or found:
        return found
    if not parts:
        return f"their tokens and the ids of {_DRAWN_TEXTS + 1} texts are the same, and the rest of their files differs"
    return f"their tokens are the same, and {' and '.join(parts)} {'differs' if len(parts) == 1 else 'differ'}"


def _differing_parts(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Returns the parts in which two tokenizer.json differ, such as model.merges, without those that are not used."""
    found = changes(first, second)
    names = {".".join(key.split(".")[: 2 if key.startswith("model.") else 1]): None for key in found}
    return [name for name in names if name not in _UNUSED]


def _difference_of_pieces(first: Tokenizer, second: Tokenizer) -> str:
    if first.vocab_size != second.vocab_size:
        return f"the first has {first.vocab_size:,} tokens and the second {second.vocab_size:,}"
    for number, pieces in enumerate(zip(first.pieces, second.pieces, strict=True)):
        if pieces[0] != pieces[1]:
            return f"token {number} is {pieces[0]!r} in the first and {pieces[1]!r} in the second"
    return ""


def _difference_of_ends(first: Tokenizer, second: Tokenizer, strict: bool) -> str:
    """Returns in words what begins or ends a document in one alone; files that say nothing contradict no others."""
    tell_begin = strict or (first.tells_begin and second.tells_begin)
    for verb, ids in (("ends", (first.eos_id, second.eos_id)), ("begins", (first.bos_id, second.bos_id))):
        if ids[0] != ids[1] and (min(ids) >= 0 or (verb == "begins" and tell_begin)):
            one, other = (repr(first.pieces[number]) if number >= 0 else "nothing" for number in ids)
            return f"a document {verb} with {one} in the first and with {other} in the second"
    for role in ("eos_token", "bos_token"):  # which a chat template may write
        tokens = first.symbols.get(role), second.symbols.get(role)
        if None not in tokens and tokens[0] != tokens[1]:
            return f"{role} is {tokens[0]!r} in the first and {tokens[1]!r} in the second"
    return ""


def _difference_of_ids(first: Tokenizer, second: Tokenizer) -> str:
    """Returns in words the first of some random texts that is divided into other tokens; "" if there is none."""
    draw = random.Random(0)
    drawn = (draw.choices(range(first.vocab_size), k=_DRAWN_TOKENS) for _ in range(_DRAWN_TEXTS))
    texts = [PROBE, *map(first.decode, drawn)]
    for ones, others in zip(first.encode_batch(texts), second.encode_batch(texts), strict=True):
        if ones != others:
            at = next((i for i, pair in enumerate(zip(ones, others, strict=False)) if pair[0] != pair[1]), 0)
            tokens = (", ".join(repr(first.pieces[number]) for number in ids[at : at + 3]) for ids in (ones, others))
            return "the same text becomes {} in the first and {} in the second".format(*tokens)
    return ""
