"""Inference with a supervised fastText model (Joulin et al. 2016), in compiled code.

Results equal those of fastText's own predict to the last bit of its float32 sums, but no string is built for each
character n-gram: words and n-grams are hashed in place (FNV-1a, as in fastText's Dictionary), looked up in a table of
the buckets that quantisation has kept, and their vectors, which are unpacked once, are added in fastText's order.
Supported are models with hierarchical softmax, quantised input vectors and unquantised output, such as lid.176.ftz.
Other models and training are not supported.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np

LABEL = b"__label__"
_MAGIC, _VERSION = 793712314, 12
_HIERARCHICAL_SOFTMAX, _SUPERVISED = 1, 3
_CENTROIDS = 256  # per part of a vector, in product quantisation
_LABEL_BYTES = np.frombuffer(LABEL, np.uint8)
_END_BYTES = np.frombuffer(b"</s>", np.uint8)  # the word that ends a line
_OFFSET, _PRIME = np.uint32(2166136261), np.uint32(16777619)
_TINY = 1e-5  # fastText adds it to probabilities before it takes the logarithm
_EMPTY = -1


@dataclass(frozen=True)
class Vocabulary:
    """Hash table of words with open addressing.

    `slots` hold word ids, -1 where free; the bytes of a word are `content[ends[id]:ends[id + 1]]`.
    """

    slots: np.ndarray
    content: np.ndarray
    ends: np.ndarray


@dataclass(frozen=True)
class Grams:
    """Character n-grams: each hash bucket's row of the vectors (-1 if it was pruned), and the n-grams' lengths."""

    rows: np.ndarray
    shortest: int
    longest: int


@dataclass(frozen=True)
class HuffmanTree:
    """Huffman tree over labels: the children of each node, -1 for leaves. Label n is node n; inner nodes come after."""

    left: np.ndarray
    right: np.ndarray
    vectors: np.ndarray  # float32 [inner nodes, dim]


class _ModelFile:
    """Reader of the values in a fastText model file, one after another."""

    def __init__(self, content: bytes) -> None:
        self._content, self._offset = content, 0

    def numbers(self, form: str) -> tuple:
        """Reads values in the format `form` of `struct`, little-endian."""
        found = struct.unpack_from("<" + form, self._content, self._offset)
        self._offset += struct.calcsize("<" + form)
        return found

    def array(self, kind: Any, size: int) -> np.ndarray:
        """Reads `size` values of a NumPy type."""
        found = np.frombuffer(self._content, kind, size, self._offset)
        self._offset += found.nbytes
        return found

    def word(self) -> bytes:
        """Reads a string that a zero byte ends."""
        end = self._content.index(b"\0", self._offset)
        found, self._offset = self._content[self._offset : end], end + 1
        return found


class FastTextModel:
    """Function of a text that returns its likeliest label, without prefix, and that label's probability.

    It returns ("", 0.0) for a text of which the model knows no word or n-gram, or if no label is likely enough. The
    constructor raises ValueError for a file that is not a supported model.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._read(_ModelFile(path.read_bytes()))
        except (struct.error, ValueError, IndexError) as error:
            raise ValueError(f"{path} cannot be read as a fastText model: {error}") from None

    def __call__(self, text: str) -> tuple[str, float]:
        line = np.frombuffer(text.encode(), np.uint8)
        label, logprob = _predict(
            line,
            *(self._words.slots, self._words.content, self._words.ends),
            *(self._grams.rows, self._grams.shortest, self._grams.longest),
            self._vectors,
            *(self._tree.left, self._tree.right, self._tree.vectors),
        )
        return (self.labels[label], float(np.float32(np.exp(logprob)))) if label >= 0 else ("", 0.0)

    def _read(self, file: _ModelFile) -> None:
        """Reads vocabulary, n-grams, vectors and tree; raises ValueError for a model of an unsupported kind."""
        if file.numbers("ii") != (_MAGIC, _VERSION):
            raise ValueError("it is not a fastText model of version 12")
        dim, _, _, _, _, ngrams, loss, kind, buckets, shortest, longest, _ = file.numbers("12i")
        file.numbers("d")
        if (loss, kind, ngrams) != (_HIERARCHICAL_SOFTMAX, _SUPERVISED, 1):
            raise ValueError("it is not a supervised model with hierarchical softmax and single words")
        size, words, labels, _, pruned = file.numbers("iiiqq")
        entries = [(file.word(), *file.numbers("qb")) for _ in range(size)]
        self.labels = [name.removeprefix(LABEL).decode() for name, _, _ in entries[words:]]
        self._words = _word_table([name for name, _, _ in entries[:words]])
        rows = np.full(buckets, _EMPTY, np.int32)
        pairs = file.array(np.dtype("<i4"), 2 * pruned).reshape(-1, 2)
        rows[pairs[:, 0]] = words + pairs[:, 1]
        self._grams = Grams(rows, shortest, longest)
        self._vectors = _vectors(file, dim)
        left, right = _huffman([count for _, count, _ in entries[words:]])
        (quantised,) = file.numbers("?")
        height, width = file.numbers("qq")
        if quantised or (height, width) != (labels, dim):
            raise ValueError("its output matrix is quantised, which is not supported")
        self._tree = HuffmanTree(left, right, file.array(np.dtype("<f4"), height * width).reshape(height, width))


def _word_table(words: Sequence[bytes]) -> Vocabulary:
    """Builds the hash table of words; a word's id is its index in `words`."""
    slots = np.full(1 << (4 * len(words)).bit_length(), _EMPTY, np.int32)
    content = np.frombuffer(b"".join(words), np.uint8)
    ends = np.cumsum([0, *map(len, words)])
    for number, word in enumerate(words):
        key = _hash(np.frombuffer(word, np.uint8), 0, len(word))
        slots[_slot(slots, content, ends, np.frombuffer(word, np.uint8), 0, len(word), key)] = number
    return Vocabulary(slots, content, ends)


def _vectors(file: _ModelFile, dim: int) -> np.ndarray:
    """Reads the input vectors, float32 [rows, dim], and unpacks their product quantisation (Jegou et al. 2011)."""
    (quantised,) = file.numbers("?")
    if not quantised:
        raise ValueError("its input vectors are not quantised, which is not supported")
    normed, rows, _, size = file.numbers("?qqi")
    codes = file.array(np.uint8, size)
    centroids, parts, width, last = _centroids(file)
    codes = codes.reshape(rows, parts)
    vectors = np.empty((rows, dim), np.float32)
    for part in range(parts):
        wide = last if part == parts - 1 else width
        start = part * _CENTROIDS * width
        table = centroids[start : start + _CENTROIDS * wide].reshape(_CENTROIDS, wide)
        vectors[:, part * width : part * width + wide] = table[codes[:, part]]
    if normed:
        norms = file.array(np.uint8, rows)
        vectors *= _centroids(file)[0][norms][:, None]
    return vectors


def _centroids(file: _ModelFile) -> tuple[np.ndarray, int, int, int]:
    """Reads (centroids, number of parts of a vector, width of a part, width of the last part)."""
    dim, parts, width, last = file.numbers("4i")
    return file.array(np.dtype("<f4"), dim * _CENTROIDS), parts, width, last


def _huffman(counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the (left, right) children of a Huffman tree's nodes; `counts` descend, as in fastText's dictionary."""
    size = len(counts)
    weights = [*counts, *([10**15] * (size - 1))]
    left, right = np.full(2 * size - 1, _EMPTY, np.int32), np.full(2 * size - 1, _EMPTY, np.int32)
    leaf, node = size - 1, size
    for parent in range(size, 2 * size - 1):
        children = []
        for _ in range(2):
            if leaf >= 0 and weights[leaf] < weights[node]:
                children.append(leaf)
                leaf -= 1
            else:
                children.append(node)
                node += 1
        left[parent], right[parent] = children
        weights[parent] = weights[children[0]] + weights[children[1]]
    return left, right


@numba.njit(cache=True, nogil=True)
def _mix(key: np.uint32, byte: np.uint8) -> np.uint32:
    """Adds a byte to an FNV-1a hash as fastText does, which treats bytes as signed."""
    return np.uint32((key ^ np.uint32(np.int8(byte))) * _PRIME)


@numba.njit(cache=True, nogil=True)
def _hash(content: np.ndarray, start: int, end: int) -> np.uint32:
    key = _OFFSET
    for index in range(start, end):
        key = _mix(key, content[index])
    return key


@numba.njit(cache=True, nogil=True)
def _slot(
    slots: np.ndarray, content: np.ndarray, ends: np.ndarray, line: np.ndarray, start: int, end: int, key: np.uint32
) -> int:
    """Returns the slot of the word line[start:end], or the free slot at which it would be stored."""
    mask = len(slots) - 1
    index = int(key) & mask
    while slots[index] >= 0:
        first, last = ends[slots[index]], ends[slots[index] + 1]
        same = last - first == end - start
        for at in range(end - start if same else 0):
            if content[first + at] != line[start + at]:
                same = False
                break
        if same:
            return index
        index = (index + 1) & mask
    return index


@numba.njit(cache=True, nogil=True)
def _is_space(byte: int) -> bool:
    return byte == 32 or 9 <= byte <= 13 or byte == 0


@numba.njit(cache=True, nogil=True)
def _add_grams(
    word: np.ndarray, size: int, rows: np.ndarray, shortest: int, longest: int, vectors: np.ndarray, hidden: np.ndarray
) -> int:
    """Adds the vectors of a word's character n-grams to `hidden` and returns how many were added.

    `word` includes the marks < and > around it; `size` is its length in bytes.
    """
    found = 0
    for start in range(size):
        if word[start] & 0xC0 == 0x80:  # not the first byte of a character
            continue
        key, at, length = _OFFSET, start, 1
        while at < size and length <= longest:
            key = _mix(key, word[at])
            at += 1
            while at < size and word[at] & 0xC0 == 0x80:
                key = _mix(key, word[at])
                at += 1
            if length >= shortest and not (length == 1 and (start == 0 or at == size)):
                row = rows[key % np.uint32(len(rows))]
                if row >= 0:
                    for index in range(len(hidden)):
                        hidden[index] += vectors[row, index]
                    found += 1
            length += 1
    return found


@numba.njit(cache=True, nogil=True)
def _begins(line: np.ndarray, start: int, size: int, mark: np.ndarray) -> bool:
    """Tells whether the word of `size` bytes at `start` begins with `mark`."""
    return size >= len(mark) and line[start] == mark[0] and bool(np.all(line[start : start + len(mark)] == mark))


@numba.njit(cache=True, nogil=True)
def _likeliest(hidden: np.ndarray, left: np.ndarray, right: np.ndarray, output: np.ndarray) -> tuple[int, float]:
    """Returns (label, log of its probability) of the likeliest label, or (-1, ...) if none is likely enough.

    The search is depth first, left child first, and skips branches less likely than the best leaf so far.
    """
    labels = len(output)
    best, found = np.float32(np.log(_TINY)), -1
    nodes, scores = np.empty(2 * labels, np.int32), np.empty(2 * labels, np.float32)
    nodes[0], scores[0], waiting = 2 * labels - 2, np.float32(0), 1
    while waiting:
        waiting -= 1
        node, score = nodes[waiting], scores[waiting]
        if score < best:
            continue
        if left[node] < 0:
            best, found = score, node
            continue
        dot = np.float32(0)
        for at in range(len(hidden)):
            dot += output[node - labels, at] * hidden[at]
        power = np.float32(np.exp(-np.float64(dot)))  # rounded once, as by C's expf
        share = np.float32(1.0 / np.float64(np.float32(1) + power))
        nodes[waiting], scores[waiting] = right[node], score + np.float32(np.log(np.float64(share) + _TINY))
        rest = np.float64(np.float32(1.0 - np.float64(share)))
        nodes[waiting + 1], scores[waiting + 1] = left[node], score + np.float32(np.log(rest + _TINY))
        waiting += 2
    return int(found), float(best)


@numba.njit(cache=True, nogil=True)
def _predict(
    line: np.ndarray,
    slots: np.ndarray,
    content: np.ndarray,
    ends: np.ndarray,
    rows: np.ndarray,
    shortest: int,
    longest: int,
    vectors: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    output: np.ndarray,
) -> tuple[int, float]:
    """Returns (likeliest label of a line, log of its probability); the label is -1 if there is none."""
    hidden = np.zeros(vectors.shape[1], np.float32)
    word = np.empty(len(line) + 8, np.uint8)
    word[0] = 60  # <
    count, index = 0, 0
    while index < len(line):
        start = index
        while index < len(line) and not _is_space(line[index]):
            index += 1
        size = index - start
        index += 1
        if not size or _begins(line, start, size, _LABEL_BYTES):
            continue
        key = _hash(line, start, start + size)
        number = slots[_slot(slots, content, ends, line, start, start + size, key)]
        if number >= 0:
            for at in range(len(hidden)):
                hidden[at] += vectors[number, at]
            count += 1
        if size == len(_END_BYTES) and _begins(line, start, size, _END_BYTES):
            break
        word[1 : size + 1] = line[start : start + size]
        word[size + 1] = 62  # >
        count += _add_grams(word, size + 2, rows, shortest, longest, vectors, hidden)
    else:  # the end of a line that has no </s> counts as that word
        number = slots[
            _slot(slots, content, ends, _END_BYTES, 0, len(_END_BYTES), _hash(_END_BYTES, 0, len(_END_BYTES)))
        ]
        if number >= 0:
            for at in range(len(hidden)):
                hidden[at] += vectors[number, at]
            count += 1
    if not count:
        return -1, 0.0
    hidden *= np.float32(1.0 / count)
    return _likeliest(hidden, left, right, output)
