"""Stages that remove or replace parts of documents; each is off unless it is configured.

    dedup -> decontaminate -> web_lines  -\\
                           -> lines      -+
                           -> substrings --> documents
                           -> pii        -/

The stages web_lines, lines, substrings and pii are independent of each other: each reads the documents that are left
after decontaminate (or after dedup, if there is no decontaminate), as the extract stage published them, and publishes
cuts. Only the documents stage writes new texts.
"""

import glob
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pyarrow.compute as pc

from configs.cuts import DecontaminateConfig, LinesConfig, PiiConfig, SubstringsConfig
from configs.loader import ConfigError, plain
from configs.rules import RuleSet
from data_pipeline.core.ledger import Tally
from data_pipeline.core.run_context import RunContext, read_texts
from data_pipeline.core.stage import Stage, file_hashes
from data_pipeline.core.tables import count_verdicts, kept_rows, read_table, shards_of, table_samples, write_samples
from data_pipeline.cutting.copies import RECORD, AllotQuotas, CountUnits, TextUnits, partitions_for
from data_pipeline.cutting.cuts import note_cuts
from data_pipeline.cutting.decontamination import CONTAMINATED, Decontaminate
from data_pipeline.cutting.decontamination import FOLDER as MATCHES
from data_pipeline.cutting.evaluation_items import check_first_items, read_items
from data_pipeline.cutting.lines import CutLines, Lines
from data_pipeline.cutting.ngram_index import NgramIndex, require_ngrams
from data_pipeline.cutting.pii import RemovePii
from data_pipeline.cutting.substrings import CutSubstrings, Minimizers, Windows
from data_pipeline.cutting.web_lines import CutWebLines


def decontaminate_stage(context: RunContext, extract: Stage, dedup: Stage) -> Stage | None:
    """Describes the stage that finds evaluation texts; None if the config does not enable it."""
    settings = context.config.decontaminate
    if not settings or not settings.enabled:
        return None
    files = evaluation_files(settings)
    check_first_items(files, settings)
    return Stage(
        "decontaminate",
        partial(_decontaminate, context, files, settings),
        plain(settings),
        ("cutting.decontamination",),
        needs=(extract, dedup),
        counted_against=dedup,
        inputs=file_hashes([Path(file) for file in files], context.run_dir / "logs" / "evaluation.json"),
    )


def web_lines_stage(context: RunContext, extract: Stage, language: Stage, kept: Stage) -> Stage | None:
    """Describes the stage that cuts single lines by published rules; None if no rule set has `drop_lines`."""
    dropping = {name: rules for name, rules in context.config.rules.items() if rules.drop_lines}
    if not dropping:
        return None
    settings = {name: [rules.c4, rules.drop_lines] for name, rules in dropping.items()}
    work = partial(_web_lines, context, kept.name, dropping)
    return Stage("web_lines", work, settings, ("cutting.web_lines",), (extract, language, kept), kept)


def lines_stage(context: RunContext, extract: Stage, language: Stage, kept: Stage) -> Stage | None:
    """Describes the stage that cuts repeated lines or paragraphs; None if the config does not enable [lines]."""
    settings = context.config.lines
    if not settings or not settings.enabled:
        return None
    work = partial(_lines, context, kept.name, settings)
    return Stage("lines", work, plain(settings), ("cutting.lines",), (extract, language, kept), kept)


def substrings_stage(context: RunContext, extract: Stage, language: Stage, kept: Stage) -> Stage | None:
    """Describes the stage that cuts repeated substrings; None if the config does not enable [substrings]."""
    settings = context.config.substrings
    if not settings or not settings.enabled:
        return None
    work = partial(_substrings, context, kept.name, settings)
    return Stage("substrings", work, plain(settings), ("cutting.substrings",), (extract, language, kept), kept)


def pii_stage(context: RunContext, extract: Stage, language: Stage, kept: Stage) -> Stage | None:
    """Describes the stage that replaces personal data, keys and tokens; None if the config does not enable [pii]."""
    settings = context.config.pii
    if not settings or not settings.enabled:
        return None
    work = partial(_pii, context, kept.name, settings)
    return Stage("pii", work, plain(settings), ("cutting.pii",), (extract, language, kept), kept)


def evaluation_files(settings: DecontaminateConfig) -> list[str]:
    """Lists the files that `decontaminate.files` names, sorted. Raises ConfigError if a pattern matches none."""
    found: set[str] = set()
    for pattern in settings.files:
        paths = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)
        matches = [path for path in paths if Path(path).is_file()]
        if not matches and Path(pattern).is_dir():
            raise ConfigError(
                f"decontaminate.files: {pattern!r} is a folder; name its files, as in {pattern.rstrip('/')}/*"
            )
        if not matches:
            raise ConfigError(
                f"decontaminate.files: {pattern!r} matches no file, looked for from {Path.cwd()}; correct the path, or "
                "run from the folder that it is relative to"
            )
        found.update(matches)
    return sorted(found)


def _decontaminate(
    context: RunContext, files: Sequence[str], settings: DecontaminateConfig, folder: Path, logs: Path
) -> Tally:
    select, ngram_index = context.run_dir / "dedup", folder / "scratch"
    found = NgramIndex.of(read_items(files, settings), settings)
    require_ngrams(found.summary())
    found.save(ngram_index)
    (folder / "evaluation.json").write_text(json.dumps(found.summary(), indent=1) + "\n", encoding="utf-8")
    step = Decontaminate(str(folder), str(logs / "tallies"), str(select), settings, str(ngram_index))
    read_texts(context, "decontaminate", [step], logs, shards_of(select))
    shutil.rmtree(ngram_index)
    samples = []
    for shard in shards_of(folder / MATCHES):
        location = {"source": shard.split("/")[0], "shard": shard, "verdict": CONTAMINATED}
        samples += [location | match for match in read_table(folder / MATCHES, shard).to_pylist()]
    write_samples(folder, samples)
    return _finished(folder, logs / "tallies", samples=False)


def _finished(folder: Path, tallies: Path, samples: bool = True) -> Tally:
    """Returns the counts of a stage that has written its tables of verdicts and cuts; may write samples as well."""
    tally = Tally.load_all(tallies)
    count_verdicts(folder, tally)
    note_cuts(folder, tally)
    if samples:
        table_samples(folder)
    return tally


def _count_copies(
    context: RunContext,
    title: str,
    kept: str,
    units: TextUnits,
    max_copies: int,
    records: int,
    scratch: Path,
    logs: Path,
) -> Path:
    """Runs the two passes that decide how many copies of each text unit every shard may keep, and returns their folder.

    `records` is the approximate number of records to expect, from which the number of partitions follows.
    """
    select = context.run_dir / kept
    shards, partitions = shards_of(select), partitions_for(records)
    counts, quotas = scratch / "counts", scratch / "quotas"
    count = CountUnits(str(counts), str(select), shards, units, partitions)
    read_texts(context, f"{title}: count", [count], logs / "count", shards)
    share = AllotQuotas(str(counts), str(quotas), partitions, len(shards), max_copies, str(logs / "share" / "progress"))
    size = sum(path.stat().st_size for path in counts.rglob("*.bin"))
    context.pipeline(f"{title}: share", logs / "share", [share], partitions, size)
    shutil.rmtree(counts)
    return quotas


def _kept_bytes(select: Path) -> int:
    """Sums the bytes of the texts that a stage kept."""
    return sum(pc.sum(kept_rows(read_table(select, shard))["bytes"]).as_py() or 0 for shard in shards_of(select))


def _web_lines(context: RunContext, kept: str, rules: Mapping[str, RuleSet], folder: Path, logs: Path) -> Tally:
    select, language = context.run_dir / kept, str(context.run_dir / "language")
    step = CutWebLines(str(folder), str(logs / "tallies"), str(select), rules, language)
    read_texts(context, "web_lines", [step], logs, shards_of(select))
    return _finished(folder, logs / "tallies")


def _lines(context: RunContext, kept: str, settings: LinesConfig, folder: Path, logs: Path) -> Tally:
    select, scratch = context.run_dir / kept, folder / "scratch"
    most = _kept_bytes(select) // (settings.min_chars + 1)
    quotas = _count_copies(context, "lines", kept, Lines(settings), settings.max_copies, most, scratch, logs)
    shards, tallies = shards_of(select), logs / "cut" / "tallies"
    step = CutLines(str(folder), str(tallies), str(select), settings, str(quotas), shards)
    read_texts(context, "lines: cut", [step], logs / "cut", shards)
    shutil.rmtree(scratch)
    return _finished(folder, tallies)


def _substrings(context: RunContext, kept: str, settings: SubstringsConfig, folder: Path, logs: Path) -> Tally:
    """Runs the three passes that cut repeated substrings: counts minimizers, counts windows, and cuts."""
    select, scratch = context.run_dir / kept, folder / "scratch"
    shards, minimizers = shards_of(select), Minimizers(settings)
    often = 2 * _kept_bytes(select) // minimizers.width
    repeated = _count_copies(
        context, "substrings: minimizers", kept, minimizers, 1, often, scratch / "minimizers", logs / "minimizers"
    )
    again = sum(path.stat().st_size for path in repeated.glob("*.bin")) // RECORD.itemsize
    windows = Windows(settings, str(repeated), shards)
    quotas = _count_copies(
        context,
        "substrings: windows",
        kept,
        windows,
        1,
        again * minimizers.width,
        scratch / "windows",
        logs / "windows",
    )
    tallies = logs / "cut" / "tallies"
    step = CutSubstrings(str(folder), str(tallies), str(select), windows, str(quotas))
    read_texts(context, "substrings: cut", [step], logs / "cut", shards)
    shutil.rmtree(scratch)
    return _finished(folder, tallies)


def _pii(context: RunContext, kept: str, settings: PiiConfig, folder: Path, logs: Path) -> Tally:
    select = context.run_dir / kept
    step = RemovePii(str(folder), str(logs / "tallies"), str(select), settings)
    read_texts(context, "pii", [step], logs, shards_of(select))
    return _finished(folder, logs / "tallies")
