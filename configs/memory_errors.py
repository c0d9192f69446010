"""Recognition of errors that say that the memory of a machine or a GPU is used up, by their words. Imports no torch."""

import errno
import re

# What torch, CUDA's libraries and C++ say; torch has a class of its own for GPUs alone.
_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "bad_alloc")


def lack_of_memory(error: BaseException) -> str | None:
    """Says that no memory is left, and how much was asked for if the error tells; None for other errors."""
    text = str(error)
    if isinstance(error, OSError):
        lacks = error.errno == errno.ENOMEM
    else:
        lacks = isinstance(error, MemoryError)
        lacks = lacks or (isinstance(error, RuntimeError) and any(words in text for words in _WORDS))
    if not lacks:
        return None
    found = re.search(r"tried to allocate [\d.]+ \w+|unable to allocate [\d.]+ \w+", text, re.IGNORECASE)
    return "no memory is left" + (f" ({found[0][0].lower()}{found[0][1:]})" if found else "")
