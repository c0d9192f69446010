"""N-gram language models: perplexity of a text (ARPA files) and its mean unigram log-probability (word counts).

Both kinds of files are read into a hash table with open addressing, keyed by 64-bit hashes of n-grams; hash collisions
are ignored, as in KenLM's probing model (Heafield 2011). Look-ups are compiled. KenLM's binary files and quantised
models are not supported. Models of words are not estimated here: `lmplz --arpa` does that; `ngram_training` estimates
models of token ids.
"""

import contextlib
import gzip
import io
import json
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numba
import numpy as np

from data_pipeline.scan.characters import codes_of, kinds_of
from data_pipeline.scan.scores import in_lower_case
from data_pipeline.scan.words import BASE, Splitter, describe, mix, split, word_hash

UNSEEN = 1e-9  # probability of a word that is not in a unigram table, as in datatrove
_NO_UNK = -100.0  # log10 probability of an unknown word where an ARPA file has no <unk>, as in KenLM
_UNK = b"<unk>"
_HEADER_LINES = 1_000
_NEWLINE = 10


@dataclass(frozen=True)
class LogprobTable:
    """Hash table of n-grams of all orders, one per slot.

    `keys` are uint64, 0 for a free slot; `logprobs` and `backoffs` are float32, in log10.
    """

    keys: np.ndarray
    logprobs: np.ndarray
    backoffs: np.ndarray

    @classmethod
    def of_size(cls, size: int) -> "LogprobTable":
        """Returns an empty table for `size` n-grams, which will fill at most half of its slots, a power of two."""
        slots = 1 << max(4, (2 * size).bit_length())
        return cls(np.zeros(slots, np.uint64), np.zeros(slots, np.float32), np.zeros(slots, np.float32))

    def add(self, hashes: np.ndarray, ids: np.ndarray, logprobs: np.ndarray, backoffs: np.ndarray) -> None:
        """Adds n-grams of one order. `ids`, int32 [n-grams, order], index `hashes`, uint64 [words]."""
        _fill(self.keys, self.logprobs, self.backoffs, hashes, ids, logprobs, backoffs)


@numba.njit(cache=True, nogil=True)
def longer(key: np.uint64, word: np.uint64) -> np.uint64:
    """Returns the key of an n-gram extended by one word at its left; a single word's key is `longer(0, its hash)`."""
    return mix(key * BASE + word) | np.uint64(1)  # never 0, which is a free slot


@numba.njit(cache=True, nogil=True)
def _slot(keys: np.ndarray, key: np.uint64) -> int:
    """Returns the slot of `key`, or the free slot at which it would be stored."""
    mask = np.uint64(len(keys) - 1)
    index = (key >> np.uint64(1)) & mask
    while keys[index] != 0 and keys[index] != key:
        index = (index + np.uint64(1)) & mask
    return index  # type: ignore[return-value]


@numba.njit(cache=True, nogil=True)
def _fill(
    keys: np.ndarray,
    probs: np.ndarray,
    weights: np.ndarray,
    hashes: np.ndarray,
    ids: np.ndarray,
    logprobs: np.ndarray,
    backoffs: np.ndarray,
) -> None:
    """Stores n-grams in the arrays of a `LogprobTable`."""
    for row in range(len(ids)):
        key = np.uint64(0)
        for index in range(ids.shape[1] - 1, -1, -1):
            key = longer(key, hashes[ids[row, index]])
        slot = _slot(keys, key)
        keys[slot], probs[slot], weights[slot] = key, logprobs[row], backoffs[row]


def words_of(text: str, splitter: Splitter, lower: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns (hashes of the words, uint64 [words]; whether each is the first of its line, bool [words])."""
    codes = codes_of(in_lower_case(text) if lower else text)
    kinds = kinds_of(codes)
    starts, ends = split(codes, kinds, int(splitter))
    hashes, _ = describe(codes, kinds, starts, ends)
    return hashes, _firsts(codes, starts, ends)


@numba.njit(cache=True, nogil=True)
def _firsts(codes: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    firsts = np.zeros(len(starts), np.bool_)
    for word in range(len(starts)):
        firsts[word] = word == 0
        for index in range(ends[word - 1] if word else starts[word], starts[word]):
            firsts[word] |= codes[index] == _NEWLINE
    return firsts


class Unigrams:
    """Function of a text that returns the mean log10 probability of its words, by a table of word counts.

    Words that are not in the table have the probability `UNSEEN`. The score is that of peS2o (Soldaini and Lo 2023) and
    of datatrove's UnigramLogProbFilter, which uses the natural logarithm and so gives 2.3026 times this value.
    """

    def __init__(self, path: Path, splitter: Splitter = Splitter.words, lower: bool = True) -> None:
        self._splitter, self._lower = splitter, lower
        counts = _frequencies(path, lower)
        total = sum(counts.values())
        hashes = np.array([word_hash(word) for word in counts], np.uint64)
        probabilities = np.log10(np.fromiter(counts.values(), np.float64) / total).astype(np.float32)
        ids = np.arange(len(hashes), dtype=np.int32)[:, None]
        self._table = LogprobTable.of_size(len(hashes))
        self._table.add(hashes, ids, probabilities, np.zeros(len(hashes), np.float32))

    def __call__(self, text: str) -> float:
        """Returns the score; 0 for a text without words, as in datatrove."""
        hashes, _ = words_of(text, self._splitter, self._lower)
        if not len(hashes):
            return 0.0
        return float(_unigram_sum(hashes, self._table.keys, self._table.logprobs, np.log10(UNSEEN)) / len(hashes))


@numba.njit(cache=True, nogil=True)
def _unigram_sum(hashes: np.ndarray, keys: np.ndarray, logprobs: np.ndarray, unseen: float) -> float:
    total = 0.0
    for word in hashes:
        slot = _slot(keys, longer(np.uint64(0), word))
        total += logprobs[slot] if keys[slot] else unseen
    return total


def _frequencies(path: Path, lower: bool) -> dict[str, float]:
    """Reads {word: count} from JSON or lines of word, tab, count; raises ValueError that names the bad entry.

    Counts are above 0; with `lower`, words are lower-cased and the counts of equal ones are summed.
    """
    counts: dict[str, float] = {}
    with _bytes(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="\n") as lines:
        if ".json" in path.suffixes:
            try:
                pairs = list(json.load(lines).items())
            except (ValueError, AttributeError):
                raise ValueError(f"unigram table {path} is not a JSON object of the form {{word: count}}") from None
        else:
            pairs = [tuple(line.rstrip("\r\n").split("\t")) for line in lines]
    for number, pair in enumerate(pairs, 1):
        word, count = _entry(path, number, pair)
        word = word.lower() if lower else word
        counts[word] = counts.get(word, 0.0) + count
    if not counts:
        raise ValueError(f"unigram table {path} contains no words; each line should be a word, a tab and a count")
    return counts


def _entry(path: Path, number: int, pair: Sequence[Any]) -> tuple[str, float]:
    try:
        word, count = pair[0], float(pair[1])
        if len(pair) != 2 or not 0 < count < float("inf"):
            raise ValueError
    except (ValueError, TypeError, IndexError):
        raise ValueError(
            f"unigram table {path}, entry {number}: {str(pair)[:80]} should be a word and a count above 0"
        ) from None
    return word, count


class Arpa:
    """Function of a text that returns its perplexity under a backoff model (Katz 1987).

    It computes perplexity as CCNet does (Wenzek et al. 2020, arXiv 1911.00359): each line with words is a sentence
    between <s> and </s>, and perplexity is 10^(-log10 probability / (words + lines)), since each </s> is predicted too.
    Words that are not in the model count as its <unk>.
    """

    def __init__(self, path: Path, splitter: Splitter = Splitter.words, lower: bool = True) -> None:
        self._splitter, self._lower = splitter, lower
        self._order, self._table = _read_arpa(path)
        self._marks = np.array([word_hash(word) for word in ("<s>", "</s>", "<unk>")], np.uint64)

    def __call__(self, text: str) -> float:
        """Returns the perplexity; 1 for a text without words."""
        hashes, firsts = words_of(text, self._splitter, self._lower)
        if not len(hashes):
            return 1.0
        logprob = sentences_logprob(hashes, firsts, self._marks, self._order, self._table)
        return float(10 ** (-logprob / (len(hashes) + firsts.sum())))


def sentences_logprob(
    hashes: np.ndarray, firsts: np.ndarray, marks: np.ndarray, order: int, table: LogprobTable
) -> float:
    """Returns the log10 probability of all sentences, with a </s> after each, in a model of n-grams up to `order`.

    `hashes`, uint64 [words], and `firsts`, bool [words], are as from `words_of`; `marks` are the hashes of <s>, </s>
    and <unk>.
    """
    return _sentences(hashes, firsts, marks, order, table.keys, table.logprobs, table.backoffs)


@numba.njit(cache=True, nogil=True)
def _sentences(
    hashes: np.ndarray,
    firsts: np.ndarray,
    marks: np.ndarray,
    order: int,
    keys: np.ndarray,
    logprobs: np.ndarray,
    backoffs: np.ndarray,
) -> float:
    """Computes what `sentences_logprob` returns, in compiled code."""
    history = np.empty(order, np.uint64)  # words before the current one, the nearest first
    weights = np.zeros(order + 1)  # weights[n]: backoff of the n-gram that ends just before the current word
    total, known = 0.0, 0
    for index in range(len(hashes)):
        if firsts[index]:
            history[0], known = marks[0], min(1, order - 1)
            _weigh(history, known, weights, keys, backoffs)
        logprob, known = _step(hashes[index], marks[2], history, known, weights, keys, logprobs, backoffs)
        total += logprob
        if index + 1 == len(hashes) or firsts[index + 1]:
            logprob, known = _step(marks[1], marks[2], history, known, weights, keys, logprobs, backoffs)
            total += logprob
    return total


@numba.njit(cache=True, nogil=True)
def _step(
    word: np.uint64,
    unknown: np.uint64,
    history: np.ndarray,
    known: int,
    weights: np.ndarray,
    keys: np.ndarray,
    logprobs: np.ndarray,
    backoffs: np.ndarray,
) -> tuple[float, int]:
    """Returns (log10 p(word | history), new length of the history) and adds `word` to the history.

    `known` is the length of the history, in words.
    """
    order = len(history)
    if not keys[_slot(keys, longer(np.uint64(0), word))]:
        word = unknown
    key, found, logprob = longer(np.uint64(0), word), 0, 0.0
    for n in range(known + 1):  # find the longest n-gram in the model
        if n:
            key = longer(key, history[n - 1])
        slot = _slot(keys, key)
        if keys[slot]:
            found, logprob = n, np.float64(logprobs[slot])
    for n in range(found + 1, known + 1):  # add the backoff of each context longer than the one found
        logprob += weights[n]
    for n in range(min(known, order - 2), 0, -1):
        history[n] = history[n - 1]
    history[0] = word
    known = min(known + 1, order - 1)
    _weigh(history, known, weights, keys, backoffs)
    return logprob, known


@numba.njit(cache=True, nogil=True)
def _weigh(history: np.ndarray, known: int, weights: np.ndarray, keys: np.ndarray, backoffs: np.ndarray) -> None:
    key = np.uint64(0)
    for n in range(1, known + 1):
        key = longer(key, history[n - 1])
        weights[n] = np.float64(backoffs[_slot(keys, key)])  # 0 in a free slot


@contextlib.contextmanager
def _bytes(path: Path) -> Iterator[BinaryIO]:
    """Opens a file, gzipped or not. Raises ValueError inside the context where its gzip data are damaged."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with cast(BinaryIO, gzip.open(path, "rb")) if packed else path.open("rb") as file:
        try:
            yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is damaged, and cannot be read to its end ({error}); restore it") from None


def _read_arpa(path: Path) -> tuple[int, LogprobTable]:
    """Reads (order, table of all n-grams); raises ValueError that names file, line and what was expected."""
    with _bytes(path) as file:
        lines = enumerate(file, 1)
        sizes = _header(path, lines)
        ids: dict[bytes, int] = {}
        hashes = np.zeros(0, np.uint64)
        table = LogprobTable.of_size(sum(sizes) + 1)
        for order, size in enumerate(sizes, 1):
            words, logprobs, backoffs = _section(path, lines, order, ids)
            if len(logprobs) != size:
                raise ValueError(
                    f"{path} has {len(logprobs)} {order}-grams where its header says {size}; check that it is complete"
                )
            if order == 1:
                if _UNK not in ids:
                    ids[_UNK] = len(ids)
                    words.append(ids[_UNK])
                    logprobs.append(_NO_UNK)
                    backoffs.append(0.0)
                hashes = np.array([word_hash(word.decode("utf-8", "replace")) for word in ids], np.uint64)
            matrix = np.array(words, np.int32).reshape(-1, order)
            table.add(hashes, matrix, np.array(logprobs, np.float32), np.array(backoffs, np.float32))
        for _ in lines:  # the checksum of gzip data is at their end
            pass
        return len(sizes), table


def check_arpa(path: Path) -> None:
    """Raises ValueError if a file does not begin like one in ARPA format; reads no more than its header."""
    with _bytes(path) as file:
        _header(path, iter(enumerate(file, 1)))


def check_unigrams(path: Path) -> None:
    """Raises ValueError if the first line of a table of words and counts is none; a table in JSON is read whole."""
    if ".json" in path.suffixes:
        _frequencies(path, lower=False)
        return
    with _bytes(path) as file:
        _entry(path, 1, tuple(file.readline().decode("utf-8", "replace").rstrip("\r\n").split("\t")))


def _header(path: Path, lines: Iterator[tuple[int, bytes]]) -> list[int]:
    """Returns the number of n-grams of each order, from the header; reads up to the line before the first n-gram."""
    sizes: list[int] = []
    for number, line in lines:
        if line.startswith(b"ngram "):
            order, _, size = line[6:].partition(b"=")
            if order.strip() != b"%d" % (len(sizes) + 1) or not size.strip().isdigit():
                raise ValueError(f"{path}:{number}: {_shown(line)} should be 'ngram {len(sizes) + 1}=COUNT'")
            sizes.append(int(size))
        elif line.startswith(b"\\1-grams:") and sizes:
            return sizes
        elif number > _HEADER_LINES:
            break
    raise ValueError(f"{path} is not an ARPA file: it should begin with lines 'ngram 1=COUNT' and then \\1-grams:")


def _section(
    path: Path, lines: Iterator[tuple[int, bytes]], order: int, ids: dict[bytes, int]
) -> tuple[array, array, array]:
    """Reads (word ids, log10 probabilities, backoffs) of the n-grams of one order; order 1 fills `ids` first.

    Fields are separated by ASCII white space only, since words may contain other kinds.
    """
    words, logprobs, backoffs = array("i"), array("f"), array("f")
    for number, line in lines:
        parts = line.split()
        if not parts:
            continue
        if len(parts) == 1 and parts[0].startswith(b"\\"):
            break
        if b"<UNK>" in parts:
            parts = [_UNK if part == b"<UNK>" else part for part in parts]
        try:
            logprob, backoff = float(parts[0]), float(parts[order + 1]) if len(parts) == order + 2 else 0.0
            if not order + 1 <= len(parts) <= order + 2 or not logprob <= 0:
                raise ValueError
            if order == 1:
                ids[parts[1]] = len(ids)
            words.extend([ids[word] for word in parts[1 : order + 1]])
        except (ValueError, KeyError, IndexError):
            raise ValueError(
                f"{path}:{number}: {_shown(line)} should be a log10 probability, {order} words of \\1-grams: and a "
                "backoff or none"
            ) from None
        logprobs.append(logprob)
        backoffs.append(backoff)
    return words, logprobs, backoffs


def _shown(line: bytes) -> str:
    return repr(line[:80].decode("utf-8", "replace").strip())
