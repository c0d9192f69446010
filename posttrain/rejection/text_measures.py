"""Measures of a completion by which it may be set aside: repetition, long paragraphs, near-duplicates.

With mixed scripts (`posttrain.rewards.script`) they are those by which DeepSeek-R1's third step drops completions that
are hard to read (arXiv 2501.12948, 2.3.3).
"""

import re
from collections.abc import Sequence

import numpy as np

RUN = 8  # tokens of a run that is looked for again
NGRAM = 5  # words of an n-gram of near-duplicates


def repeated_share(tokens: Sequence[int], run: int = RUN) -> float:
    """Returns the share of a text's runs of `run` tokens that occurred before in it; 0 for a text without a run."""
    runs = [tuple(tokens[i : i + run]) for i in range(len(tokens) - run + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def longest_paragraph(text: str) -> int:
    """Returns the number of characters of the longest paragraph; blank lines divide paragraphs."""
    return max((len(part.strip()) for part in re.split(r"\n\s*\n", text)), default=0)


def word_ngrams(text: str) -> np.ndarray:
    """Returns the hashes of a text's word n-grams, each once, as the data pipeline's MinHash has them.

    The result is empty for a text with fewer words than an n-gram, or with mainly signs.
    """
    from data_pipeline.scan.minhash import shingles  # it loads compiled code

    return np.unique(shingles(text, NGRAM))


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Returns the Jaccard similarity of two sets of unique hashes; 0 if one is empty."""
    if not len(one) or not len(other):
        return 0.0
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)
