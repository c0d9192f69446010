"""Check that a fastText model file is whole, without loading it.

fastText's own reader does not look for the end of the file: in one that is cut short it reads a word without end, until
memory is full, or takes numbers that are not there. The format is version 12's (fastText's Args, Dictionary, Matrix,
QMatrix and ProductQuantizer).
"""

import mmap
import struct
from pathlib import Path

_HEADER = "<2i12id3i2q"  # magic number and version, settings, then sizes of the vocabulary
_CENTROIDS = 256  # per part of a vector, in product quantisation


def is_whole(path: Path) -> bool:
    """Returns whether a file that begins as a fastText model ends where its own sizes say."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            return _length(content) == len(content)
        except (struct.error, ValueError, OverflowError):
            return False


def _length(content: mmap.mmap) -> int:
    """Returns the length of the model that `content` begins with; raises struct.error or ValueError if it is longer."""
    entries, pruned = (struct.unpack_from(_HEADER, content)[at] for at in (15, 19))
    at = struct.calcsize(_HEADER)
    for _ in range(entries):
        end = content.find(b"\0", at)
        if end < 0:
            raise ValueError("a word does not end")
        at = end + 1 + 9  # the zero byte, then the word's count and kind
    at += 8 * max(pruned, 0)
    (quantised,) = struct.unpack_from("<?", content, at)
    at = _after_matrix(content, at + 1, quantised)
    (output_too,) = struct.unpack_from("<?", content, at)
    return _after_matrix(content, at + 1, quantised and output_too)


def _after_matrix(content: mmap.mmap, at: int, quantised: bool) -> int:
    """Returns the offset of what follows the matrix at offset `at`."""
    if not quantised:
        rows, columns = struct.unpack_from("<2q", content, at)
        return at + 16 + int(4 * rows * columns)
    has_norms, rows, _, codes = struct.unpack_from("<?2qi", content, at)
    at = _after_centroids(content, at + 21 + codes)
    return _after_centroids(content, at + rows) if has_norms else at


def _after_centroids(content: mmap.mmap, at: int) -> int:
    """Returns the offset of what follows the product quantiser at offset `at`."""
    (dim,) = struct.unpack_from("<i", content, at)
    return at + 16 + int(4 * dim * _CENTROIDS)
