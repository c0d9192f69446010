"""Parquet files of a data run, read with their pages' checksums; one that cannot be read is named, with what to do."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.core.integrity import DamagedData, remedy


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """As pyarrow's read_table of one file, without what that does for folders of them, which takes longer.

    Errors: DamagedData for a file that is missing, cut short or changed, as its pages' checksums tell.
    """
    with readable(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read(columns=None if columns is None else list(columns), use_threads=False)


def columns_in(path: Path) -> list[str]:
    """The names of a table's columns. Errors: DamagedData."""
    with readable(path):
        return pq.read_schema(path).names


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What goes wrong with reading `path` in the block becomes a DamagedData that names it and what to do."""
    try:
        yield
    except FileNotFoundError:
        raise DamagedData(f"{path} is missing; {remedy(path)}") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DamagedData(f"{path} cannot be read: {reason}; {remedy(path)}") from None
