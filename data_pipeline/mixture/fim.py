"""Fill-in-the-middle (FIM): rearranges pieces of some documents so that a model learns to fill a gap in a text.

Bavarian et al., "Efficient Training of Language Models to Fill in the Middle", 2022, arXiv:2207.14255. A piece is cut
at two random positions into prefix, middle and suffix and becomes, after <s> if it begins a document,

    PSM   <|fim_prefix|> prefix <|fim_suffix|> suffix <|fim_middle|> middle
    SPM   <|fim_prefix|> <|fim_suffix|> suffix <|fim_middle|> prefix middle    (the paper's second variant, appendix D)

Pieces are rearranged when rows are read, after the plan has cut documents into pieces. This is the paper's
context-level FIM; the paper finds it better than rearranging documents before they are cut, since no row then holds a
middle without its prefix. Doing it at tokenization is not possible: only the plan knows the pieces, and another rate
would mean writing the token stores again. The plan reserves three positions for the control symbols of each such piece
and describes pieces by tokens of the stored document, so that provenance stays exact. The choice of documents and of
the form is drawn by (seed, source, document), once for all epochs; the cuts by (seed, source, document, start).

The loss covers all parts, as in the paper. The middle is always followed by </s>: as a token if the piece ends the
document, else as the label of the piece's last position. Held-out rows are not rearranged. Cuts within a token, which
the paper prefers, would need the text and are not supported.
"""

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from data_pipeline.mixture.epochs import generator
from data_pipeline.tokens.tokenizer import FIM_CONTROLS

SENTINELS = len(FIM_CONTROLS)
PLAIN, PSM, SPM = 0, 1, 2
NAMES = {PSM: "psm", SPM: "spm"}


@dataclass(frozen=True)
class FimSymbols:
    """Ids of the control symbols that rearranged pieces contain or follow."""

    prefix: int
    suffix: int
    middle: int
    bos: int
    eos: int

    @classmethod
    def of(cls, special_ids: dict[str, int], bos: int, eos: int) -> "FimSymbols":
        """Takes the ids from a tokenizer's; raises ValueError if it was trained without these symbols.

        `bos` and `eos` begin and end a document; -1 if nothing begins one.
        """
        missing = [name for name in FIM_CONTROLS if name not in special_ids]
        if missing:
            raise ValueError(
                f"mixture.fim needs a tokenizer with {', '.join(missing)}; run all of `trivium data run` with "
                "mixture.fim set, so that it is trained with them, or leave mixture.fim out"
            )
        prefix, suffix, middle = (special_ids[name] for name in FIM_CONTROLS)
        return cls(prefix, suffix, middle, bos, eos)


def draw(seed: int, source: str, documents: int, rate: float, spm: float) -> np.ndarray:
    """Draws PLAIN, PSM or SPM for each document, int8; `rate` of them are rearranged, `spm` of these as SPM."""
    drawn = generator(seed, source, 0, "fim").random((documents, 2))
    return np.where(drawn[:, 0] >= rate, PLAIN, np.where(drawn[:, 1] < spm, SPM, PSM)).astype(np.int8)


def cuts(seed: int, source: str, document: int, start: int, length: int) -> tuple[int, int]:
    """Draws begin and end of the middle: two uniform positions from 0 to `length`, the smaller one first."""
    key = hashlib.sha256(json.dumps([seed, source, document, start, "fim"]).encode()).digest()
    first, second = (int.from_bytes(key[at : at + 8], "little") % (length + 1) for at in (0, 8))
    return min(first, second), max(first, second)


def rearranged(
    piece: np.ndarray, form: int, symbols: FimSymbols, seed: int, source: str, document: int, start: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens, labels) of a piece, tokens [start, start + len(piece)) of a document, in form PSM or SPM.

    There are SENTINELS more tokens than in the piece. Labels are the next tokens; a closing </s> has none.
    """
    head, ended = int(piece[0] == symbols.bos), int(piece[-1] == symbols.eos)
    text = piece[head : len(piece) - ended]
    begin, end = cuts(seed, source, document, start, len(text))
    prefix, middle, suffix = text[:begin], text[begin:end], text[end:]
    first, second, third = np.array([[symbols.prefix], [symbols.suffix], [symbols.middle]])
    if form == PSM:
        parts = [first, prefix, second, suffix, third, middle]
    else:
        parts = [first, second, suffix, third, prefix, middle]
    tokens = np.concatenate([piece[:head], *parts, piece[len(piece) - ended :]]).astype(np.int64)
    return tokens, tokens[1:] if ended else np.append(tokens[1:], symbols.eos)
