"""Reads a data run's Parquet files and verifies their page checksums; errors name the file and what to do about it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.core.integrity import DamagedData, remedy


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads one Parquet file, all columns or the named ones, on the calling thread.

    Does the same as pyarrow's `read_table`, without its slower set-up for datasets of many files. Raises DamagedData
    if the file is missing, truncated, or fails its page checksums.
    """
    with readable(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read(columns=None if columns is None else list(columns), use_threads=False)


def columns_in(path: Path) -> list[str]:
    """Names of the columns of a Parquet file. Raises DamagedData if the file cannot be read."""
    with readable(path):
        return pq.read_schema(path).names


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns read errors inside the block into a DamagedData that names `path` and what to do about it."""
    try:
        yield
    except FileNotFoundError:
        raise DamagedData(f"{path} is missing; {remedy(path)}") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DamagedData(f"{path} cannot be read: {reason}; {remedy(path)}") from None
