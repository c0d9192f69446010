"""Tokenizer of a tokenizer.json of Hugging Face's tokenizers library: byte-level BPE, or WordPiece.

Byte-level BPE (GPT-2) merges bytes, which its pieces spell as printable characters, so it keeps every text. WordPiece
(BERT) splits words at white space, which it forgets, and words with an unknown character become <unk>; what it decodes
is a text with single spaces, and bits per byte do not follow from its tokens.
"""

import json
from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

from data_pipeline.tokens.tokenizer import PROBE, SPECIALS, Tokenizer, check_unicode


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json as a Tokenizer; RAYON_NUM_THREADS, and not `threads`, is the number of its threads.

    Raises ValueError for a file that is no tokenizer, that lacks a control symbol, or that changes text although it is
    a byte-level one.
    """

    def __init__(self, content: bytes, origin: str, threads: int = 1) -> None:
        try:
            self._fast = fast = tokenizers.Tokenizer.from_buffer(content)
            described = json.loads(content)
        except Exception as error:  # the library raises plain Exceptions
            raise ValueError(
                f"tokenizer {origin} is not a tokenizer.json that can be read ({error}); train it again with "
                "`trivium data run`"
            ) from None
        fast.encode_special_tokens = True  # text that spells a control symbol stays text
        vocabulary = fast.get_vocab()
        pieces = sorted(vocabulary, key=vocabulary.__getitem__)
        special_ids = {token["content"]: token["id"] for token in described["added_tokens"] if token["special"]}
        if missing := [name for name in SPECIALS if name not in special_ids]:
            raise ValueError(
                f"tokenizer {origin} has no {', '.join(missing)}; tokenizers trained elsewhere are not "
                "supported, train one with `trivium data run`"
            )
        self.lossless = "ByteLevel" in _types(described["decoder"])
        alphabet = byte_alphabet()
        own_bytes = [
            b"" if piece in special_ids or not self.lossless else bytes(alphabet[one] for one in piece)
            for piece in pieces
        ]
        super().__init__(content, origin, pieces, special_ids, own_bytes)
        if self.lossless and self.decode(self.encode(PROBE)) != PROBE:
            raise ValueError(
                f"tokenizer {origin} does not keep text as it is; token stores need one trained with `trivium data run`"
            )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns a list of ids for each text; raises ValueError for a text that is not valid Unicode."""
        for text in texts:
            check_unicode(text)
        return [found.ids for found in self._fast.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids; that of WordPiece has a space between words, whatever was there before."""
        if self.lossless:
            return super().decode(ids)
        return self._fast.decode(self._checked(ids), skip_special_tokens=True)


def byte_alphabet() -> dict[str, int]:
    """Returns the byte that each character of a byte-level piece stands for, as in GPT-2.

    Bytes that are printable in Latin-1 stand for themselves; the others, in order, are spelled from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    return alphabet


def _types(part: dict[str, Any] | None) -> set[str]:
    """Returns the types of a tokenizer's part and of the parts in it."""
    if part is None:
        return set()
    inner = [one for value in part.values() if isinstance(value, list) for one in value if isinstance(one, dict)]
    return {part.get("type", "")}.union(*(_types(one) for one in inner))
