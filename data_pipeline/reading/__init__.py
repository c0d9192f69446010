"""Readers of the input: they find a source's files, read each format, and give a reason for each unusable record.

Begin with `source_reader`: it finds a run's files (`source_files`, `formats`) and reads them as records
(`input_records`), with one reader per format (`jsonl`, `warc`, `parquet`, `trees`). All of them read through
`decompression`, which bounds memory. The main text of web pages is extracted later, in `extraction`.
"""

from data_pipeline.reading.input_records import BROKEN, HARMLESS, InputUnit
from data_pipeline.reading.source_reader import SourceReader, find_units

__all__ = ["BROKEN", "HARMLESS", "InputUnit", "SourceReader", "find_units"]
