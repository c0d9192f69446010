"""Texts that a tokenizer is trained on or measured on: files, or the documents that a data run left."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from configs.loader import ConfigError
from configs.sources import ANY_LANGUAGE, ExtractConfig, SourceConfig
from configs.tokenizer import TextConfig
from data_pipeline.core.shards import HELDOUT, TRAIN, read_records, shard_path, shards_under
from data_pipeline.reading.formats import Format, format_of
from data_pipeline.reading.input_records import InputUnit
from data_pipeline.reading.keys import check_keys
from data_pipeline.reading.source_reader import find_units, read_file

_SECTION = "text"
_SHOWN = 3  # reasons that a message lists
_MAX_RECORD = 1 << 36  # bytes; a text file is one record, which is read whole


class FileTexts:
    """The texts of files; iterating reads them, and counts in `unusable` the records without text, by reason.

    The constructor finds the files. It raises ConfigError for a pattern that matches no file, or records without the
    text key; iterating raises it for files in which no record has text.
    """

    def __init__(self, config: TextConfig) -> None:
        self.config = config
        self.unusable = Counter[str]()
        self.units = [unit for pattern in config.files for unit in _units(config, pattern)]

    @property
    def size(self) -> int:
        """Stored bytes of all files."""
        return sum(unit.size for unit in self.units)

    @property
    def paths(self) -> list[str]:
        """Paths of all files."""
        return [file.path for unit in self.units for file in unit.files]

    def __iter__(self) -> Iterator[str]:
        self.unusable.clear()
        limits, usable = ExtractConfig(max_record_bytes=_MAX_RECORD), 0
        for unit in self.units:
            for file in unit.files:
                for record in read_file(file, unit.config, limits, lambda size: None):
                    if record.reason or not record.text.strip():
                        self.unusable[record.reason or "empty"] += record.count
                        continue
                    usable += 1
                    yield record.text
        if self.units and not usable:
            keyed = any(unit.config.format in ("jsonl", "parquet") for unit in self.units)
            remedy = f"correct text.text_key = {self.config.text_key!r}, or " if keyed else ""
            raise ConfigError(
                f"text.files: none of {self.unusable.total():,} records in {len(self.paths):,} files has text "
                f"({described(self.unusable)}); {remedy}name other files"
            )


def described(counts: Counter[str]) -> str:
    """Returns the most frequent reasons and their counts, as words."""
    return ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common(_SHOWN)) or "they are empty"


def _units(config: TextConfig, pattern: str) -> list[InputUnit]:
    """Returns the files that one pattern of text.files matches, grouped as a data run groups them."""
    kind = config.format or _format_of(pattern)
    keyed = kind in ("jsonl", "parquet")
    source = SourceConfig(
        files=(pattern,),
        format=kind,
        rules={ANY_LANGUAGE: "any"},
        text_key=config.text_key if keyed else "text",
        encoding=config.encoding if kind in ("text", "code") else "utf-8",
    )
    units = find_units("files", source, 1, _SECTION)
    check_keys(units, ExtractConfig(), lambda _, key: f"{_SECTION}.{key}")
    return units


def _format_of(pattern: str) -> Format:
    """Returns the format that a pattern's extension tells; a folder has the format of most files in it."""
    if not Path(pattern).is_dir():
        return format_of(pattern) or "text"
    kinds = Counter(kind for path in Path(pattern).rglob("*") if path.is_file() and (kind := format_of(path.name)))
    return kinds.most_common(1)[0][0] if kinds else "text"


def run_shards(run_dir: str | Path, split: str, key: str = "text.run") -> list[Path]:
    """Returns the shards of a data run's documents of one split, sorted; `key` is the config key, for the message.

    Raises ConfigError if the folder is no data run, or one that has no such documents yet.
    """
    folder = Path(run_dir) / "documents"
    shards = [shard for shard in shards_under(folder) if shard.startswith(f"{split}/")] if folder.is_dir() else []
    if not shards and split == HELDOUT and (folder / TRAIN).is_dir():
        raise ConfigError(
            f"{key} = {str(run_dir)!r}: this run holds no document out, as its heldout.share is 0 or its sources are "
            "too small; set heldout.share above 0, such as heldout.share=0.02, and run `trivium data run` again"
        )
    if not shards:
        raise ConfigError(
            f"{key} = {str(run_dir)!r}: there is no document under {folder / split}; name the run.dir of a data run, "
            "and run it with `trivium data run CONFIG --until documents` first"
        )
    return [shard_path(folder, shard) for shard in shards]


def shard_texts(shards: Iterable[Path]) -> Iterator[str]:
    """Yields the texts of shards. Raises ValueError for a missing or damaged one."""
    for path in shards:
        for record in read_records(path):
            yield record["text"]


def shard_records(shards: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (source, record) for each document of shards, as a data run has laid them out."""
    for path in shards:
        for record in read_records(path):
            yield path.parent.name, record
