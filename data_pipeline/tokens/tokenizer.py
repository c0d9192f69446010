"""Lossless tokenizer: training and use of a sentencepiece BPE model with byte fallback.

The model keeps every character: it uses identity normalisation, adds and removes no spaces, and encodes unseen
characters as their UTF-8 bytes. Therefore decode(encode(text)) == text, and each id stands for a fixed number of bytes,
from which bits per byte are computed. Text that spells a control symbol (<s>, <|user|>, ...) is never encoded as one;
callers insert control symbols by id. Unigram, WordPiece and tokenizers trained elsewhere are not supported.
"""

import hashlib
import heapq
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from configs.data import TokenizerConfig
from configs.files import write_atomic
from data_pipeline.core.shards import read_records
from data_pipeline.tokens.bpe_cache import PartTable

KIND = "sentencepiece-bpe"
MODEL_FILE, INFO_FILE = "tokenizer.model", "tokenizer.json"
UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"
CHAT_CONTROLS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
SPECIALS = (UNK, BOS, EOS, PAD, *CHAT_CONTROLS)  # ids 0..7
FIM_CONTROLS = (
    "<|fim_prefix|>",
    "<|fim_suffix|>",
    "<|fim_middle|>",
)  # ids 8..10 if the mixture uses fill-in-the-middle

SPACE = "\u2581"  # stands for a space in pieces; sentencepiece would decode a real one in a text as a space
_LEAST_SIZE = 300  # the smallest tokenizer.vocab_size that a config allows
_CHUNK_CHARS = 1000  # training reads chunks of documents of about this size, split at line ends
# sentencepiece's trainer skips a sentence that contains its own marks, so texts are split at them.
_TRAINER_MARKS = re.compile("[\t\0\u2581\u2585]")
_PROBE = "  a\tb\r\n\n 中文\u3000 é e\u0301 ﬁ \0"


def train(
    inputs: Sequence[Path],
    out: Path,
    settings: TokenizerConfig,
    *,
    controls: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Trains on up to `settings.train_bytes` of UTF-8 text from JSONL files and publishes the model in folder `out`.

    The model depends on the texts alone, not on their order or their distribution over files. `controls` are control
    symbols beyond SPECIALS, whose ids follow theirs. `progress` is called with the bytes of text read since its last
    call. Returns the content of tokenizer.json. Raises ValueError for missing or damaged files, for no text at all, and
    for a vocabulary that is too small for the symbols or too large for the text.
    """
    specials = (*SPECIALS, *controls)
    if settings.vocab_size < (least := len(specials) + 256 + 1):
        raise ValueError(
            f"tokenizer.vocab_size = {settings.vocab_size} is too small: {len(specials)} control symbols, 256 "
            f"bytes and one piece take {least}"
        )
    sample, used, available = _sample(inputs, settings.train_bytes, settings.seed, progress)
    if not sample:
        raise ValueError(f"no text to train a tokenizer on in {len(inputs)} files; check what the filters dropped")
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=written,
            model_type="bpe",
            vocab_size=settings.vocab_size,
            character_coverage=settings.character_coverage,
            max_sentencepiece_length=settings.max_piece_length,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=8 * _CHUNK_CHARS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            unk_piece=UNK,
            bos_piece=BOS,
            eos_piece=EOS,
            pad_piece=PAD,
            control_symbols=[*CHAT_CONTROLS, *controls],
            num_threads=1,  # the order of equal counts must not depend on threads
            minloglevel=2,
        )
    except RuntimeError as error:
        said = " ".join(str(error).split())
        remedy = _remedy(said)
        raise ValueError(
            f"sentencepiece cannot make tokenizer.vocab_size = {settings.vocab_size} pieces from {used:,} bytes of "
            f"text; {remedy} (it says: {said})"
        ) from None
    model = written.getvalue()
    info = {
        "kind": KIND,
        "vocab_size": settings.vocab_size,
        "special_ids": {name: number for number, name in enumerate(specials)},
        "sha256": hashlib.sha256(model).hexdigest(),
        "trained_on_bytes": used,
        "available_bytes": available,
        "settings": {
            "seed": settings.seed,
            "train_bytes": settings.train_bytes,
            "character_coverage": settings.character_coverage,
            "max_piece_length": settings.max_piece_length,
        },
    }
    out = Path(out)
    write_atomic(out / MODEL_FILE, model)
    write_atomic(out / INFO_FILE, (json.dumps(info, indent=1) + "\n").encode())
    return info


def _remedy(said: str) -> str:
    """Returns what to do about a refused vocabulary size, from the trainer's message, which has the possible sizes."""
    if "required_chars" in said:  # not even single characters fit
        least = re.search(r"\d+ vs (\d+)", said)
        return f"raise tokenizer.vocab_size{f' to {least[1]}' if least else ''}"
    most = re.search(r"value <= (\d+)", said)
    if most and int(most[1]) < _LEAST_SIZE:
        return "give it more text"
    return f"lower tokenizer.vocab_size{f' to {most[1]}' if most else ''}, or give it more text"


def _sample(
    inputs: Sequence[Path], limit: int, seed: int, progress: Callable[[int], None] | None
) -> tuple[list[str], int, int]:
    """Draws up to `limit` bytes of chunks, those with the lowest hashes of seed and content.

    Returns (chunks by ascending hash, their bytes, bytes of all texts). Takes one pass and memory in proportion to
    `limit`. The draw does not depend on files and their order.
    """
    chosen: list[tuple[int, str]] = []
    used = available = 0
    bar = 2**64
    for path in inputs:
        for document in read_records(path):
            read = len(document["text"].encode())
            available += read
            for chunk in _chunks(document["text"]):
                digest = hashlib.blake2b(chunk.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
                drawn = int.from_bytes(digest, "little")
                if drawn >= bar:
                    continue
                heapq.heappush(chosen, (-drawn, chunk))
                used += len(chunk.encode())
                # No later chunk with a higher hash than a removed one gets in, or the order of reading would matter.
                while used > limit or (chosen and -chosen[0][0] >= bar):
                    highest, put_out = heapq.heappop(chosen)
                    used -= len(put_out.encode())
                    bar = -highest
            if progress:
                progress(read)
    return [chunk for _, chunk in sorted(chosen, reverse=True)], used, available


def _chunks(text: str) -> Iterator[str]:
    """Yields pieces of `text` of up to _CHUNK_CHARS characters, split at line ends if possible."""
    for part in _TRAINER_MARKS.split(text):
        chunk = ""
        for line in part.splitlines(keepends=True):
            if chunk and len(chunk) + len(line) > _CHUNK_CHARS:
                yield chunk
                chunk = ""
            while len(line) > _CHUNK_CHARS:
                yield line[:_CHUNK_CHARS]
                line = line[_CHUNK_CHARS:]
            chunk += line
        if chunk:
            yield chunk


class Tokenizer:
    """A trained tokenizer; `token_bytes`, int64 [vocab_size], are the UTF-8 bytes of each id, 0 for control symbols.

    `threads` is the number of threads that encode a batch; 1 by default, since the pipeline runs several processes.
    """

    def __init__(self, model: bytes, origin: str, threads: int = 1) -> None:
        self.origin, self.threads = origin, threads
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise ValueError(
                f"tokenizer {origin} is not a sentencepiece model; train it again with `trivium data run`"
            ) from None
        sp = self._processor
        self.vocab_size: int = sp.vocab_size()
        self.unk_id, self.bos_id, self.eos_id, self.pad_id = (
            sp.unk_id(),
            sp.bos_id(),
            sp.eos_id(),
            sp.pad_id(),
        )
        self._pieces = [sp.id_to_piece(i) for i in range(self.vocab_size)]
        self.special_ids = {piece: i for i, piece in enumerate(self._pieces) if sp.is_control(i) or sp.is_unknown(i)}
        self._bytes = [
            b""
            if piece in self.special_ids
            else bytes([int(piece[3:-1], 16)])
            if sp.is_byte(i)
            else piece.replace(SPACE, " ").encode()
            for i, piece in enumerate(self._pieces)
        ]
        self.token_bytes = np.array([len(piece) for piece in self._bytes], dtype=np.int64)
        self._parts: PartTable | None = None  # only for models of `train`, for which its ids are known to be right
        self._space_ids = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        if self.unk_id in self._space_ids or self.decode(self.encode(_PROBE)) != _PROBE:
            raise ValueError(
                f"tokenizer {origin} does not keep text as it is (no byte fallback, or a normalisation); "
                "token stores need one trained with `trivium data run`"
            )

    @classmethod
    def load(cls, path: str | Path, threads: int = 1) -> "Tokenizer":
        """Loads a tokenizer from its folder or its tokenizer.model; verifies the checksum in tokenizer.json, if any.

        Raises ValueError if the file is missing, damaged, or a model that does not keep every character.
        """
        path = Path(path)
        path = path / MODEL_FILE if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"tokenizer {path} does not exist; make it with `trivium data run`")
        tokenizer = cls(path.read_bytes(), str(path), threads)
        # A Hugging Face folder also has a tokenizer.json, in another format.
        info_path = path.with_name(INFO_FILE)
        info = json.loads(info_path.read_text(encoding="utf-8")) if info_path.is_file() else {}
        if info.get("kind") == KIND and info["sha256"] != tokenizer.sha256:
            raise ValueError(
                f"tokenizer {path} has SHA-256 {tokenizer.sha256[:12]}..., but {info_path} expects "
                f"{info['sha256'][:12]}...: the file was changed or damaged; run its stage again"
            )
        if info.get("kind") == KIND:
            tokenizer._parts = PartTable(tokenizer._pieces, tokenizer.encode_batch)
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Returns the ids of plain text, which are never control symbols."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns a list of ids for each text; raises ValueError for a text that is not valid Unicode."""
        try:
            # A real U+2581 is encoded as its bytes, apart from the text before and after it.
            if not any(SPACE in text for text in texts):
                return self._processor.encode(list(texts), num_threads=self.threads)
            return [self._encode_around_marks(text) for text in texts]
        except TypeError:  # sentencepiece's error for half a surrogate pair
            for text in texts:
                _check_unicode(text)
            raise

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns int32 ids of each text, the same as `encode_batch`, but several times as fast (see `bpe_cache`)."""
        if self._parts is None:
            return [np.array(ids, np.int32) for ids in self.encode_batch(texts)]
        return self._parts.ids(texts)

    def _encode_around_marks(self, text: str) -> list[int]:
        """Encodes a text that contains U+2581, each of which becomes its three bytes."""
        first, *rest = self._processor.encode(text.split(SPACE), num_threads=self.threads)
        ids = list(first)
        for part in rest:
            ids += [*self._space_ids, *part]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids: control symbols give no text, and bytes that are not UTF-8 give U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        outside = [i for i in ids if not 0 <= i < self.vocab_size]
        if outside:
            raise ValueError(f"token id {outside[0]} is not in a vocabulary of {self.vocab_size}")
        return b"".join([self._bytes[i] for i in ids]).decode("utf-8", errors="replace")

    def piece_to_id(self, piece: str) -> int:
        """Returns the id of a piece or control symbol by its spelling; the id of <unk> if there is none."""
        return self._processor.piece_to_id(piece)

    def id_to_piece(self, token: int) -> str:
        """Returns the spelling of an id's piece."""
        return self._pieces[token]


def _check_unicode(text: str) -> None:
    """Raises ValueError if `text` contains half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.start + 20]
        raise ValueError(
            f"text has half a surrogate pair at character {error.start} ({around!r}) and is no valid Unicode; "
            "repair or drop the document"
        ) from None
