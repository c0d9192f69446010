"""Progress of an evaluation, counted on the terminal."""

import sys


class ProgressCount:
    """A line on the terminal that counts what is done; nothing is written if stderr is no terminal."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0

    def __enter__(self) -> "ProgressCount":
        return self

    def __call__(self, count: int) -> None:
        self._done += count
        if sys.stderr.isatty():
            print(f"\r{self._done:,} of {self._total:,} {self._what}", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if sys.stderr.isatty() and self._total:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
