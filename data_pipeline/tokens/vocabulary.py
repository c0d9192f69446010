"""Sizes and symbols of a vocabulary that all kinds of tokenizers share, and messages about them."""

from collections.abc import Sequence

from configs.tokenizer import RESERVED_NAME, TokenizerTraining
from data_pipeline.tokens.tokenizer import SPECIALS

LEAST_SIZE = 300  # the smallest tokenizer.vocab_size that a config allows
CHUNK_CHARS = 1000  # training reads chunks of documents of about this size, split at line ends


def symbols(settings: TokenizerTraining, controls: Sequence[str]) -> tuple[str, ...]:
    """Returns the control symbols in the order of their ids: SPECIALS, `controls`, special and reserved tokens.

    Raises ValueError if they leave no room in the vocabulary for bytes and a piece.
    """
    found = tuple(dict.fromkeys([*SPECIALS, *controls, *settings.symbols()]))
    if settings.vocab_size < (least := len(found) + 256 + 1):
        raise ValueError(
            f"tokenizer.vocab_size = {settings.vocab_size} is too small: {len(found)} control symbols, 256 bytes and "
            f"one piece take {least}"
        )
    return found


def padding(settings: TokenizerTraining) -> list[str]:
    """Returns the names of the reserved tokens that make the vocabulary's size a multiple of `vocab_multiple`."""
    count = -settings.vocab_size % settings.vocab_multiple
    return [RESERVED_NAME.format(settings.reserved_tokens + number) for number in range(count)]


def too_small_for_runs(settings: TokenizerTraining, lacking: int) -> str:
    """Returns the message for a vocabulary in which runs of white space lack room for `lacking` pieces."""
    return (
        f"tokenizer.vocab_size = {settings.vocab_size} has no room for tokenizer.whitespace_runs = "
        f"{settings.whitespace_runs}; raise tokenizer.vocab_size to {settings.vocab_size + lacking}, or lower "
        "tokenizer.whitespace_runs"
    )


def runs_of(characters: str, longest: int, least: int = 1) -> list[str]:
    """Returns the runs of each character, from `least` to `longest` of it, the shorter ones first."""
    return [one * size for one in characters for size in range(least, longest + 1)]
