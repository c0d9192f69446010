"""Fill-in-the-middle: pieces of some documents rearranged so that a model learns to write what stands in between.

Bavarian et al., "Efficient Training of Language Models to Fill in the Middle", 2022, arXiv:2207.14255. A piece is cut
at two random places into prefix, middle and suffix, and becomes, after <s> where it begins a document,

    PSM   <|fim_prefix|> prefix <|fim_suffix|> suffix <|fim_middle|> middle
    SPM   <|fim_prefix|> <|fim_suffix|> suffix <|fim_middle|> prefix middle    (the paper's second variant, appendix D)

It is done where rows are read, on each piece of a document that the plan puts into a row: the paper's context-level
FIM, which it finds better than rearranging documents that are cut afterwards, since no row then holds a middle without
its prefix. Nor could it be done at tokenizing: only the plan knows the pieces, and token stores would have to be
written again for another rate. The plan keeps three positions for the control symbols of each such piece, and tells
pieces by tokens of the stored document, so that provenance stays exact. Which documents, and which of the two forms,
is drawn by (seed, source, document), once for all epochs; where a piece is cut by (seed, source, document, start).

Loss falls on all parts, as in the paper. The middle is always followed by </s>: by the token where the piece ends the
document, and else as the label of the piece's last position. Held-out rows stay as they were written. Left out: cuts
within a token, which the paper prefers and which need text, not tokens.
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
    """Ids of the control symbols."""

    prefix: int
    suffix: int
    middle: int
    bos: int
    eos: int

    @classmethod
    def of(cls, special_ids: dict[str, int]) -> "FimSymbols":
        """Errors: ValueError for a tokenizer that was trained without them."""
        missing = [name for name in FIM_CONTROLS if name not in special_ids]
        if missing:
            raise ValueError(
                f"mixture.fim needs a tokenizer with {', '.join(missing)}; run all of `trivium data run` with "
                "mixture.fim set, so that it is trained with them, or leave mixture.fim out"
            )
        return cls(*(special_ids[name] for name in (*FIM_CONTROLS, "<s>", "</s>")))


def draw(seed: int, source: str, documents: int, rate: float, spm: float) -> np.ndarray:
    """PLAIN, PSM or SPM for each document, int8: `rate` of them rearranged, `spm` of those as SPM."""
    drawn = generator(seed, source, 0, "fim").random((documents, 2))
    return np.where(drawn[:, 0] >= rate, PLAIN, np.where(drawn[:, 1] < spm, SPM, PSM)).astype(np.int8)


def cuts(seed: int, source: str, document: int, start: int, length: int) -> tuple[int, int]:
    """Where the middle of a piece with `length` tokens of text begins and ends, each of length + 1 indices alike."""
    key = hashlib.sha256(json.dumps([seed, source, document, start, "fim"]).encode()).digest()
    first, second = (int.from_bytes(key[at : at + 8], "little") % (length + 1) for at in (0, 8))
    return min(first, second), max(first, second)


def rearranged(
    piece: np.ndarray, form: int, symbols: FimSymbols, seed: int, source: str, document: int, start: int
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, labels) of tokens [start, start + len(piece)) of a document, in form PSM or SPM.

    Tokens are SENTINELS more than the piece has. Labels are the next tokens; there is none for a closing </s>.
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
