"""Estimation of n-gram models of token ids, by interpolated modified Kneser-Ney smoothing (Chen and Goodman 1999).

The model is a backoff table as in an ARPA file (`ngram_models.LogprobTable`), held in memory. Each document is a
sentence, <s> tokens </s>. Every id of the vocabulary has a probability, so every text has one. Nothing is pruned, and
the arrays of all n-grams of the text are in memory at once: this is for texts of millions of tokens, `lmplz` for more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.scan.words import word_hash
from data_pipeline.scores.ngram_models import LogprobTable, sentences_logprob

_FALLBACK = (0.0, 0.5, 1.0, 1.5)  # discounts, as in `lmplz --discount_fallback`, where the text is too small for others


@dataclass(frozen=True)
class TokenNgrams:
    """A model of token ids: `hashes`, uint64 [vocab_size], stand for the ids in its table."""

    order: int
    hashes: np.ndarray
    table: LogprobTable
    bos: int
    eos: int

    def bits(self, documents: Sequence[np.ndarray]) -> float:
        """Returns the information, in bits, of all ids but <s> in `documents`, each the ids <s> tokens </s>."""
        tokens = [document[1:-1] for document in documents]
        firsts = np.zeros(sum(map(len, tokens)), np.bool_)
        firsts[np.cumsum([0, *map(len, tokens)])[:-1]] = True
        marks = self.hashes[[self.bos, self.eos, self.eos]]  # no id is unknown, so the third is never looked up
        return -sentences_logprob(
            self.hashes[np.concatenate(tokens)], firsts, marks, self.order, self.table
        ) / np.log10(2)


@dataclass(frozen=True)
class _Ngrams:
    """The different n-grams of one order: `count` [n-grams], where each ends in the text, and what it consists of.

    `context` and `suffix` [n-grams] are the numbers of the (n-1)-grams without its last and without its first token.
    """

    end: np.ndarray
    count: np.ndarray
    context: np.ndarray
    suffix: np.ndarray


def estimate(documents: Sequence[np.ndarray], vocab_size: int, bos: int, eos: int, order: int = 5) -> TokenNgrams:
    """Returns the model of `documents`, each the ids <s> tokens </s>. Raises ValueError if there is none."""
    if not documents:
        raise ValueError("an n-gram model needs at least one document")
    text = np.concatenate(documents).astype(np.int64)
    lengths = np.array([len(document) for document in documents])
    index = np.arange(len(text)) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # in the document, from 0
    levels = _adjusted(_count(text, index, vocab_size, order), index)
    hashes = np.array([word_hash(str(token)) for token in range(vocab_size)], np.uint64)
    table = LogprobTable.of_size(vocab_size + sum(len(level.end) for level in levels[1:]))
    lower, ids = np.full(1, 1 / (vocab_size - 1)), np.zeros((1, 0), np.int32)  # of the empty n-gram: any id but <s>
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for n, level in enumerate(levels, 1):
        contexts = len(lower) if n > 1 else 1
        discount = _discounts(level.count)
        total = np.bincount(level.context, level.count, contexts)
        left = np.bincount(level.context, discount, contexts) / np.maximum(total, 1)  # interpolation weights
        probability = (level.count - discount) / np.maximum(total, 1)[level.context]
        probability += left[level.context] * lower[level.suffix]
        if n > 1:
            found[-1] = (found[-1][0], np.log10(np.where(total > 0, np.maximum(left, 1e-30), 1.0)))
            table.add(hashes, ids, found[-1][0].astype(np.float32), found[-1][1].astype(np.float32))
        ids = text[level.end[:, None] + np.arange(1 - n, 1)].astype(np.int32)
        if n == 1:
            ids = np.arange(vocab_size, dtype=np.int32)[:, None]
        found.append((np.log10(np.maximum(probability, 1e-30)), np.zeros(len(probability))))
        lower = probability
    table.add(hashes, ids, found[-1][0].astype(np.float32), found[-1][1].astype(np.float32))
    return TokenNgrams(order, hashes, table, bos, eos)


def _count(text: np.ndarray, index: np.ndarray, vocab_size: int, order: int) -> list[_Ngrams]:
    """Counts the n-grams of every order up to `order`; the 1-grams are all ids of the vocabulary, seen or not."""
    zeros = np.zeros(vocab_size, np.int64)
    levels = [_Ngrams(zeros, np.bincount(text, minlength=vocab_size), zeros, zeros)]
    number = text  # of the n-gram that ends at each token of the text
    for n in range(2, order + 1):
        ends = np.flatnonzero(index >= n - 1)
        keys = number[ends - 1] * vocab_size + text[ends]
        _, first, own, count = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        end = ends[first]
        levels.append(_Ngrams(end, count, number[end - 1], number[end]))
        number = np.full(len(text), -1)
        number[ends] = own
    return levels


def _adjusted(levels: list[_Ngrams], index: np.ndarray) -> list[_Ngrams]:
    """Replaces the counts below the highest order by the number of different tokens that come before the n-gram.

    N-grams that begin a document have none before them and keep their counts; <s> alone is never predicted.
    """
    result = []
    for n, (level, longer) in enumerate(zip(levels, [*levels[1:], None], strict=True), 1):
        count = level.count
        if longer is not None:
            before = np.bincount(longer.suffix, minlength=len(count))
            begins = index[level.end] == n - 1 if n > 1 else np.zeros(len(count), np.bool_)
            count = np.where(begins, count, before)
        result.append(_Ngrams(level.end, count.astype(np.float64), level.context, level.suffix))
    return result


def _discounts(count: np.ndarray) -> np.ndarray:
    """Returns the discount of each n-gram by its count: of 1, of 2, and of 3 and more (Chen and Goodman, eq. 26)."""
    of = [int(np.sum(count == c)) for c in range(5)]  # n-grams that occur so many times
    values = np.array(_FALLBACK)
    if all(of[1:]):
        share = of[1] / (of[1] + 2 * of[2])
        found = np.array([0.0, *(c - (c + 1) * share * of[c + 1] / of[c] for c in (1, 2, 3))])
        if np.all(found[1:] > 0) and np.all(found[1:] <= (1, 2, 3)):
            values = found
    return values[np.minimum(count, 3).astype(np.int64)]
