"""Tokenizer of a tokenizer.json of Hugging Face's tokenizers library, trained here or elsewhere.

Byte-level BPE (GPT-2) merges bytes, which its pieces spell as printable characters, so it keeps every text. WordPiece
(BERT) splits words at white space, which it forgets, and words with an unknown character become <unk>; what it decodes
is a text with single spaces, and bits per byte do not follow from its tokens. A tokenizer that was trained elsewhere
may be of any kind; its ids are those that the library gives, and `foreign` finds the roles of its special tokens.
"""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

from data_pipeline.tokens.foreign import Named, Roles, find_roles
from data_pipeline.tokens.tokenizer import PROBE, ROLES_FILE, SPECIALS, Tokenizer, check_unicode, remade


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json as a Tokenizer; RAYON_NUM_THREADS, and not `threads`, is the number of its threads.

    `named` are roles of tokens that a config gives. If the end of a document is not known, it is an error only if
    `complete`. Raises ValueError for a file that is no tokenizer, and for one trained here that changes text although
    it is a byte-level one.
    """

    def __init__(
        self, content: bytes, origin: str, threads: int = 1, named: Named | None = None, complete: bool = True
    ) -> None:
        try:
            self._fast = fast = tokenizers.Tokenizer.from_buffer(content)
            described = json.loads(content)
        except Exception as error:  # the library raises plain Exceptions
            raise ValueError(
                f"tokenizer {origin} is not a tokenizer.json that can be read ({error}); {remade(origin)}"
            ) from None
        if dropout := described["model"].get("dropout"):
            raise ValueError(
                f"tokenizer {origin} divides the same text otherwise each time (dropout {dropout} of its model); set "
                "dropout to null there"
            )
        # A text is never cut, filled up, or turned into a control symbol that it spells.
        fast.no_truncation()
        fast.no_padding()
        fast.encode_special_tokens = True
        vocabulary = fast.get_vocab()
        pieces = [""] * (max(vocabulary.values(), default=-1) + 1)  # an id without a piece stays empty
        for piece, number in vocabulary.items():
            pieces[number] = piece
        added = {token["content"]: token["id"] for token in described["added_tokens"]}
        special_ids = {token["content"]: token["id"] for token in described["added_tokens"] if token["special"]}
        roles: Roles | None = None
        self.foreign = not special_ids.keys() >= set(SPECIALS)
        if self.foreign:
            roles = find_roles(Path(origin).parent, fast, described, list(special_ids), named or Named(), complete)
            # transformers makes a control symbol of every token that has a role, whatever tokenizer.json says.
            taken = {token: vocabulary[token] for token in roles.named.values()}
            taken |= {pieces[one]: one for one in (roles.bos, roles.eos, roles.pad) if one >= 0}
            special_ids = dict(sorted((special_ids | taken).items(), key=lambda item: item[1]))
        own_bytes = _bytes_of(pieces, described, added, special_ids)
        super().__init__(content, origin, pieces, special_ids, own_bytes or [b""] * len(pieces))
        if roles is not None:
            self.unk_id, self.bos_id, self.eos_id, self.pad_id = roles.unk, roles.bos, roles.eos, roles.pad
            self.tells_begin = roles.bos >= 0 or Path(origin).with_name(ROLES_FILE).is_file()
            self.chat_template = roles.chat_template
            self.symbols = self._symbols_of_roles() | dict(roles.named)
            self.pad_id = max(self.pad_id, 0)  # without a role for it, any token can fill rows: none of them is trained
        self.added_ids = dict(sorted((added | special_ids).items(), key=lambda item: item[1]))
        self._marked: tokenizers.Tokenizer | None = None
        spelled = zip(special_ids.items(), self._plain(list(special_ids)), strict=True)
        made = [name for (name, one), ids in spelled if one != self.unk_id and one in ids]
        self._made = re.compile("|".join(map(re.escape, made))) if made else None
        self.lossless = own_bytes is not None and self._keeps(PROBE)
        if own_bytes is not None and not self.lossless and not self.foreign:
            raise ValueError(
                f"tokenizer {origin} does not keep text as it is; token stores need one trained with `trivium data run`"
            )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns a list of ids for each text; raises ValueError for a text that is not valid Unicode."""
        for text in texts:
            check_unicode(text)
        if self._made is None or not any(map(self.spells_symbol, texts)):
            return self._plain(texts)
        return [self._around_symbols(text) if self.spells_symbol(text) else self._plain([text])[0] for text in texts]

    def encode_marked(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Encodes a text whose control symbols count as such, as the library does for a rendered chat template."""
        check_unicode(text)
        if self._marked is None:  # a second one, since the first never makes control symbols of a text
            self._marked = tokenizers.Tokenizer.from_str(self._fast.to_str())
            self._marked.encode_special_tokens = False
            plain = [
                name
                for name in self.special_ids
                if self._marked.encode(name, add_special_tokens=False).ids != [self.special_ids[name]]
            ]
            self._marked.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in plain])
        found = self._marked.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def spells_symbol(self, text: str) -> bool:
        """Whether a text spells a control symbol that the model itself would make of it, and so is encoded in parts."""
        return self._made is not None and self._made.search(text) is not None

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids; that of WordPiece has a space between words, whatever was there before."""
        if self.lossless:
            return super().decode(ids)
        return self._fast.decode(self._checked(ids), skip_special_tokens=True)

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._fast.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _around_symbols(self, text: str) -> list[int]:
        """Encodes a text that spells control symbols, each of which is divided after its first character."""
        assert self._made is not None
        cuts = [0, *(found.start() + 1 for found in self._made.finditer(text)), len(text)]
        return [one for part in self._plain([text[i:j] for i, j in pairwise(cuts)]) for one in part]

    def _keeps(self, text: str) -> bool:
        return b"".join(self._bytes[one] for one in self.encode(text)) == text.encode()


def _bytes_of(
    pieces: Sequence[str], described: Mapping[str, Any], added: Mapping[str, int], special_ids: Mapping[str, int]
) -> list[bytes] | None:
    """Returns the bytes that each id stands for in a text, None if the kind of tokenizer has no such bytes.

    Control symbols stand for none. `added` are the tokens that are not pieces of the model, and spell themselves.
    """
    types, known = _types(described["decoder"]), set(pieces)
    if "ByteLevel" in types:
        alphabet = byte_alphabet()

        def spelled(piece: str) -> bytes:
            return bytes(alphabet[one] for one in piece) if all(one in alphabet for one in piece) else piece.encode()

    elif "ByteFallback" in types and all(f"<0x{byte:02X}>" in known for byte in range(256)):
        spaces = [part for part in _parts(described["decoder"]) if part.get("type") == "Replace"]

        def spelled(piece: str) -> bytes:
            if len(piece) == 6 and piece.startswith("<0x"):
                return bytes([int(piece[3:5], 16)])
            for part in spaces:
                piece = piece.replace(part["pattern"].get("String", "\0"), part["content"])
            return piece.encode()

    else:
        return None
    return [b"" if piece in special_ids else piece.encode() if piece in added else spelled(piece) for piece in pieces]


def byte_alphabet() -> dict[str, int]:
    """Returns the byte that each character of a byte-level piece stands for, as in GPT-2.

    Bytes that are printable in Latin-1 stand for themselves; the others, in order, are spelled from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    return alphabet


def _types(part: Mapping[str, Any] | None) -> set[str]:
    """Returns the types of a tokenizer's part and of the parts in it."""
    return {one.get("type", "") for one in _parts(part)}


def _parts(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Returns a tokenizer's part and the parts in it, in their order."""
    if part is None:
        return []
    inner = [one for value in part.values() if isinstance(value, list) for one in value if isinstance(one, dict)]
    return [part, *(found for one in inner for found in _parts(one))]
