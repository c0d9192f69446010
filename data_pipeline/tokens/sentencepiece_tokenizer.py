"""Tokenizer of a sentencepiece model, BPE or Unigram, with byte fallback.

The model keeps every character: it uses identity normalisation, adds and removes no spaces, and encodes unseen
characters as their UTF-8 bytes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from data_pipeline.tokens.bpe_cache import PartTable
from data_pipeline.tokens.tokenizer import PROBE, SPACE, Tokenizer, check_unicode, read_info, remade

BPE_KIND, UNIGRAM_KIND = "sentencepiece-bpe", "sentencepiece-unigram"


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model as a Tokenizer. Raises ValueError for a model that does not keep every character."""

    def __init__(self, model: bytes, origin: str, threads: int = 1) -> None:
        self.threads = threads
        self._processor = sp = sentencepiece.SentencePieceProcessor()
        try:
            sp.LoadFromSerializedProto(model)
        except RuntimeError:
            raise ValueError(f"tokenizer {origin} is not a sentencepiece model; {remade(origin)}") from None
        pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
        special_ids = {piece: i for i, piece in enumerate(pieces) if sp.is_control(i) or sp.is_unknown(i)}
        own_bytes = [
            b""
            if piece in special_ids
            else bytes([int(piece[3:-1], 16)])
            if sp.is_byte(i)
            else piece.replace(SPACE, " ").encode()
            for i, piece in enumerate(pieces)
        ]
        super().__init__(model, origin, pieces, special_ids, own_bytes)
        self.unk_id, self.bos_id, self.eos_id, self.pad_id = sp.unk_id(), sp.bos_id(), sp.eos_id(), sp.pad_id()
        self.symbols = self._symbols_of_roles()
        self._space_ids = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        if self.unk_id in self._space_ids or self.decode(self.encode(PROBE)) != PROBE:
            raise ValueError(
                f"tokenizer {origin} does not keep text as it is (no byte fallback, or a normalisation); "
                "token stores need one trained with `trivium data run`"
            )
        # The table is only for BPE models that `train` made, for which its ids are known to be right.
        self._parts = PartTable(self.pieces, self.encode_batch) if _trained_here(origin) == BPE_KIND else None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns a list of ids for each text; raises ValueError for a text that is not valid Unicode."""
        try:
            # A real U+2581 is encoded as its bytes, apart from the text before and after it.
            if not any(SPACE in text for text in texts):
                return self._processor.encode(list(texts), num_threads=self.threads)
            return [self._encode_around_marks(text) for text in texts]
        except TypeError:  # sentencepiece's error for half a surrogate pair
            for text in texts:
                check_unicode(text)
            raise

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns int32 ids of each text, for BPE several times as fast as `encode_batch` (see `bpe_cache`)."""
        return super().encode_arrays(texts) if self._parts is None else self._parts.ids(texts)

    def _encode_around_marks(self, text: str) -> list[int]:
        """Encodes a text that contains U+2581, each of which becomes its three bytes."""
        first, *rest = self._processor.encode(text.split(SPACE), num_threads=self.threads)
        ids = list(first)
        for part in rest:
            ids += [*self._space_ids, *part]
        return ids


def _trained_here(origin: str) -> str | None:
    """Returns the kind of a tokenizer that `train` wrote beside its info.json, None for another file."""
    return read_info(Path(origin)).get("kind")
