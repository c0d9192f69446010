"""Keeps the ranks of mpirun from all printing the same error; imports no more than that takes."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from configs.loader import ConfigError
from launch.environment import mpi_rank_and_world


@contextlib.contextmanager
def output_of_rank_0_only() -> Iterator[None]:
    """Silences ranks other than 0 inside the block, so that an error that all ranks find is printed once.

    A ConfigError ends such a rank with exit status 2.
    """
    if mpi_rank_and_world()[0] == 0:
        yield
        return
    with Path(os.devnull).open("w") as nowhere:
        try:
            with contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
                yield
        except ConfigError:
            raise SystemExit(2) from None
