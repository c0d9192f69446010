"""The extract stage: reads the files of all sources and writes their texts in shards."""

import json
import math
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from configs.data import DataConfig
from configs.loader import plain
from configs.sources import SourceConfig
from data_pipeline.canaries.plant import PlantCanaries, as_input
from data_pipeline.core.console import say, warn
from data_pipeline.core.hashing import digest
from data_pipeline.core.ledger import Tally
from data_pipeline.core.run_context import RunContext
from data_pipeline.core.shards import TextWriter, shard_path
from data_pipeline.core.stage import Stage, file_hashes, replace_folder
from data_pipeline.core.tables import mask_samples
from data_pipeline.extraction.blocklist import Blocklist
from data_pipeline.extraction.extract import Extract, SetAside, bad_shares, set_aside, shard_record
from data_pipeline.extraction.unique import MADE_UNIQUE, MakeUnique, NoteIds, shared
from data_pipeline.reading import InputUnit, SourceReader, find_units
from data_pipeline.reading.ids import roots_of
from data_pipeline.reading.input_records import BROKEN, NOT_READ, UNDECODABLE
from data_pipeline.reading.keys import check_keys
from data_pipeline.reading.names import openable, printable
from data_pipeline.reading.source_files import is_remote

_HASHES = "inputs.json"  # hashes of the source files, kept so that unchanged files are not read for them again
FAILED = "extract.failed"  # folder of the ledger and rejected records of an attempt with too many of them


def extract_stage(context: RunContext) -> Stage:
    """Returns the extract stage; it runs again when the content of any source file changes.

    Raises ConfigError for patterns that match no file, keys that no record has, and mistakes in blocklists: before any
    work begins.
    """
    config = context.config
    units = input_units(config)
    check_keys(units, config.extract)
    Blocklist.load(config.extract.blocklist)
    inputs = inputs_hash(config, units, context.run_dir / _HASHES)
    return Stage(
        "extract",
        partial(_extract, context, units, inputs),
        {
            "sources": {name: plain(source) | {"rules": None} for name, source in config.sources.items()},
            "extract": plain(config.extract),
            "shard_bytes": config.run.shard_bytes,
            "canaries": as_input(config.canaries),
        },
        ("reading", "canaries.plant", "extraction.extract", "extraction.unique", "core.shards"),
        inputs=inputs,
        packages=(
            *("datatrove", "fastwarc", "resiliparse", "trafilatura", "ftfy", "orjson", "pyarrow", "zstandard"),
            "brotli",
        ),
    )


def input_units(config: DataConfig) -> list[InputUnit]:
    """Returns the units of work of every source; raises ConfigError for a pattern that matches no file."""
    return [
        unit for name, source in config.sources.items() for unit in find_units(name, source, config.run.shard_bytes)
    ]


def inputs_hash(config: DataConfig, units: Sequence[InputUnit], cache: Path) -> str:
    """Returns a hash of all input: contents of local files and blocklists, versions of remote files.

    `cache` is a file that keeps the hashes of unchanged local files.
    """
    files = [file for unit in units for file in unit.files]
    local = [Path(openable(file.path)) for file in files if not file.reason and not is_remote(file.path)]
    lists = config.extract.blocklist
    local += [Path(path) for path in (*lists.domains, *lists.hosts, *lists.prefixes)]
    others = [
        [file.path, file.reason, file.identity, file.size] for file in files if file.reason or is_remote(file.path)
    ]
    contents = file_hashes(local, cache)
    return digest([contents, others]) if others else contents


def _check_unchanged(context: RunContext, units: Sequence[InputUnit], inputs: str, before: dict[str, Any]) -> None:
    """Raises ValueError if a local file has changed since `inputs` was computed: the texts may be of either content.

    `before` are the kept hashes of that time.
    """
    cache = context.run_dir / _HASHES
    if inputs_hash(context.config, units, cache) != inputs:
        after = json.loads(cache.read_text())
        changed = [name for name, entry in before.items() if after.get(name, {}).get("sha256") != entry["sha256"]]
        others = f" and {len(changed) - 1:,} more" if len(changed) > 1 else ""
        raise ValueError(
            f"{''.join(map(printable, changed[:1]))}{others} changed while the extract stage read its input; run the "
            "same command again when nothing writes there any more, or name a copy as the source's files"
        )


def _extract(context: RunContext, units: list[InputUnit], inputs: str, folder: Path, logs: Path) -> Tally:
    """Runs the stage: writes texts to shards, makes ids unique, and checks the share of broken records."""
    hashes = json.loads((context.run_dir / _HASHES).read_text())
    config = context.config
    tallies = str(logs / "tallies")
    steps = [
        SourceReader(units, config.extract, tallies, str(logs / "progress")),
        PlantCanaries(config.canaries, tallies),
        Extract(config.extract),
        SetAside(str(folder), tallies, config.run.shard_bytes),
        NoteIds(str(logs / "ids" / "0")),
        TextWriter(str(folder), "${source}/${shard}", shard_record),
    ]
    context.pipeline("extract", logs, steps, len(units), sum(unit.size for unit in units))
    _check_unchanged(context, units, inputs, hashes)
    _make_ids_unique(context, units, folder, logs)
    mask_samples(folder)
    tally = Tally.load_all(Path(tallies))
    _check_bad_shares(context, tally, folder)
    for source in config.sources:
        counts = tally.of(source)
        if not counts.kept.documents:
            why = ", ".join(f"{reason} {amount.documents}" for reason, amount in counts.dropped.items()) or "no records"
            warn(
                f"source {source} has no usable record ({why}); check sources.{source}.files and format",
                context.console,
            )
    for source in config.sources:
        if alike := tally.of(source).notes.get(MADE_UNIQUE):
            say(
                f"source {source}: {alike:,} documents had an id that another document has too; each is now called "
                "ID#SOURCE/FILE/POSITION (its id, and where it was found)",
                context.console,
            )
    return tally


def forget_failure(run_dir: Path) -> None:
    """Deletes what an earlier attempt at the extract stage left as `extract.failed`."""
    shutil.rmtree(run_dir / FAILED, ignore_errors=True)


def _check_bad_shares(context: RunContext, tally: Tally, folder: Path) -> None:
    """Raises ValueError if a source has more broken records than extract.max_bad_share allows.

    The stage's folder, without its texts, is then kept as `extract.failed`.
    """
    limit = context.config.extract.max_bad_share
    bad = [(source, broken, records) for source, broken, records in bad_shares(tally) if broken > limit * records]
    if not bad:
        return
    failed = context.run_dir / FAILED
    tally.save(folder / "ledger.json")
    for texts in (path for path in folder.iterdir() if path.is_dir() and path.name not in ("rejected", "drops")):
        shutil.rmtree(texts)  # texts of a failed stage are not used
    replace_folder(folder, failed)
    shares = "; ".join(
        f"source {source}: {broken:,} of {records:,} records ({broken / records:.1%}) are broken "
        f"({', '.join(f'{reason} {number:,}' for reason, number in set_aside(tally.of(source), BROKEN).items())})"
        for source, broken, records in bad
    )
    enough = max(math.ceil(1000 * broken / records) for _, broken, records in bad) / 1000
    ways = ["repair the files"]
    for name, broken, records in bad:
        source = context.config.sources[name]
        ways.append(_encoding_remedy(name, source, tally))
        reasons = set_aside(tally.of(name), BROKEN).keys()
        if NOT_READ in reasons:
            ways.append("unpack those that are archives, and compress files with gzip or Zstandard alone")
        if reasons != {NOT_READ} and broken == records and source.format in ("jsonl", "parquet", "warc"):
            ways.append(f"correct sources.{name}.format, which is {source.format!r}")
    # A share of 1 would take a source of which nothing can be read.
    ways += [f"raise extract.max_bad_share to {enough}"] if enough < 1 else []
    raise ValueError(
        f"{shares}: over extract.max_bad_share = {limit}; see {failed}/rejected/ for each one's file and reason, then "
        + " or ".join(filter(None, ways))
    )


def _encoding_remedy(name: str, source: SourceConfig, tally: Tally) -> str:
    """Says which key to set if records of a source were not in the encoding that it names; "" for other damage."""
    if source.format not in ("text", "code") or not UNDECODABLE & set_aside(tally.of(name), BROKEN).keys():
        return ""
    return f"set sources.{name}.encoding, which is {source.encoding!r}, to the one that they are in"


def _make_ids_unique(context: RunContext, units: Sequence[InputUnit], folder: Path, logs: Path) -> None:
    """Appends the location to the id of every document that shares its id with another, until all ids are unique."""
    paths: dict[str, list[str]] = {}
    for unit in units:
        paths.setdefault(unit.source, []).extend(file.path for file in unit.files)
    roots = {name: roots_of(context.config.sources[name].files, found) for name, found in paths.items()}
    rounds = [logs / "ids" / "0"]
    while found := shared(rounds):
        rounds.append(logs / "ids" / str(len(rounds)))
        notes, progress = str(rounds[-1]), str(rounds[-1] / "logs" / "progress")
        step = MakeUnique(str(folder), found, roots, notes, str(logs / "tallies"), progress, len(rounds) > 2)
        size = sum(shard_path(folder, shard).stat().st_size for shard in found)
        context.pipeline("extract: ids", rounds[-1] / "logs", [step], len(found), size)
    shutil.rmtree(logs / "ids", ignore_errors=True)
