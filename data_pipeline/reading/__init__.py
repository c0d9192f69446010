"""From files to documents: finding them, reading each format, and what is set aside on the way.

`source` is the way in: it finds a run's files (`files`, `formats`) and reads them (`jsonl`, `warc`, `parquet`, `trees`)
as records (`records`), through `decompression`, which bounds memory. Main text of pages is left to `extraction`.
"""

from data_pipeline.reading.records import BROKEN, HARMLESS, InputUnit
from data_pipeline.reading.source_reader import SourceReader, find_units

__all__ = ["BROKEN", "HARMLESS", "InputUnit", "SourceReader", "find_units"]
