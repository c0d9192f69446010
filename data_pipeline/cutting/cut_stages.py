"""The stages between deduplication and documents, and documents itself. All but the last are off unless configured.

    dedup -> decontaminate -> web_lines  -\\
                           -> lines      -+
                           -> substrings --> documents
                           -> pii        -/

Web_lines, lines, substrings and pii stand beside each other: each reads the texts of the documents that are left after
decontaminate (or dedup, without it), as the extract stage published them, and publishes cuts. Only documents
writes texts anew. The stages before these are in `stages`, those after in `token_stages`.
"""

import glob
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datatrove.pipeline.base import PipelineStep

from configs.cuts import DecontaminateConfig, LinesConfig, PiiConfig, SubstringsConfig
from configs.loader import ConfigError, plain
from configs.rules import RuleSet
from data_pipeline.canaries.naming import is_canary
from data_pipeline.canaries.plant import FATES
from data_pipeline.core.ledger import Tally
from data_pipeline.core.shards import ShardReader, TextWriter
from data_pipeline.core.stage import Stage, file_hashes
from data_pipeline.core.tables import count_verdicts, kept_rows, read_table, shards_of, table_samples, write_samples
from data_pipeline.cutting.copies import RECORD, CountUnits, ShareOut, Units, partitions_for
from data_pipeline.cutting.cuts import note_cuts
from data_pipeline.cutting.decontamination import CONTAMINATED, Decontaminate
from data_pipeline.cutting.decontamination import FOLDER as MATCHES
from data_pipeline.cutting.evaluation_items import read_items
from data_pipeline.cutting.lines import CutLines, Lines
from data_pipeline.cutting.ngram_index import Probes, require_probes
from data_pipeline.cutting.pii import RemovePii
from data_pipeline.cutting.substrings import CutSubstrings, Minimizers, Windows
from data_pipeline.cutting.web_lines import CutWebLines
from data_pipeline.documents.write import Before, Split, Survey, lots, split_record, surveyed
from data_pipeline.stages import Workshop


def cut_stages(shop: Workshop, before: Mapping[str, Stage]) -> list[Stage]:
    """The stages from unique documents to those that are tokenized, in the order in which they run."""
    config = shop.config
    extract, language, dedup = before["extract"], before["language"], before["dedup"]
    kept = dedup
    cutting: list[Stage] = []
    if config.decontaminate and config.decontaminate.enabled:
        files = evaluation_files(config.decontaminate)
        kept = Stage(
            "decontaminate",
            partial(_decontaminate, shop, files, config.decontaminate),
            plain(config.decontaminate),
            ("cutting.decontamination",),
            needs=(extract, dedup),
            counted_against=dedup,
            inputs=file_hashes([Path(file) for file in files], shop.run_dir / "logs" / "evaluation.json"),
        )
        cutting.append(kept)
    dropping = {name: rules for name, rules in config.rules.items() if rules.drop_lines}
    wanted: list[tuple[str, Any, Any, Callable[..., Tally]]] = []  # name, what the work needs, settings, the work
    if dropping:
        settings = {name: [rules.c4, rules.drop_lines] for name, rules in dropping.items()}
        wanted.append(("web_lines", dropping, settings, _web_lines))
    if config.lines and config.lines.enabled:
        wanted.append(("lines", config.lines, plain(config.lines), _lines))
    if config.substrings and config.substrings.enabled:
        wanted.append(("substrings", config.substrings, plain(config.substrings), _substrings))
    if config.pii and config.pii.enabled:
        wanted.append(("pii", config.pii, plain(config.pii), _pii))
    for name, section, settings, work in wanted:
        needs = (extract, language, kept)
        cutting.append(
            Stage(name, partial(work, shop, kept.name, section), settings, (f"cutting.{name}",), needs, kept)
        )
    documents = Stage(
        "documents",
        partial(_documents, shop, kept.name, [stage.name for stage in cutting]),
        {"documents": plain(config.documents), "heldout": plain(config.heldout)},
        ("documents.write", "core.shards"),
        needs=(extract, language, before["score"], dedup, *cutting),
        counted_against=kept,
        packages=("datatrove", "orjson", "zstandard"),
    )
    return [*cutting, documents]


def evaluation_files(settings: DecontaminateConfig) -> list[str]:
    """All files, sorted. Errors: ConfigError for a pattern that matches nothing."""
    found: set[str] = set()
    for pattern in settings.files:
        paths = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)
        matches = [path for path in paths if Path(path).is_file()]
        if not matches:
            raise ConfigError(
                f"decontaminate.files: {pattern!r} matches no file, looked for from {Path.cwd()}; correct the path, or "
                "run from the folder that it is relative to"
            )
        found.update(matches)
    return sorted(found)


def _decontaminate(
    shop: Workshop, files: Sequence[str], settings: DecontaminateConfig, folder: Path, logs: Path
) -> Tally:
    select, probes = shop.run_dir / "dedup", folder / "scratch"
    found = Probes.of(read_items(files, settings), settings)
    require_probes(found.summary())
    found.save(probes)
    (folder / "evaluation.json").write_text(json.dumps(found.summary(), indent=1) + "\n", encoding="utf-8")
    step = Decontaminate(str(folder), str(logs / "tallies"), str(select), settings, str(probes))
    _read_kept(shop, "decontaminate", "dedup", [step], logs, shards_of(select))
    shutil.rmtree(probes)
    samples = []
    for shard in shards_of(folder / MATCHES):
        place = {"source": shard.split("/")[0], "shard": shard, "verdict": CONTAMINATED}
        samples += [place | match for match in read_table(folder / MATCHES, shard).to_pylist()]
    write_samples(folder, samples)
    return _finished(folder, logs / "tallies", samples=False)


def _read_kept(
    shop: Workshop, name: str, kept: str, steps: Sequence[PipelineStep], logs: Path, shards: Sequence[str]
) -> None:
    """Runs `steps` over the text of `shards`."""
    reader = ShardReader(str(shop.run_dir / "extract"), shards, str(logs / "progress"))
    shop.pipeline(name, logs, [reader, *steps], len(shards), shop.text_bytes())


def _finished(folder: Path, tallies: Path, samples: bool = True) -> Tally:
    """The counts of a stage that has written its tables of verdicts and cuts."""
    tally = Tally.load_all(tallies)
    count_verdicts(folder, tally)
    note_cuts(folder, tally)
    if samples:
        table_samples(folder)
    return tally


def _count_copies(
    shop: Workshop, title: str, kept: str, units: Units, max_copies: int, records: int, scratch: Path, logs: Path
) -> Path:
    """Two passes that leave quotas of `units` in a folder under `scratch`; `records` is about how many to expect."""
    select = shop.run_dir / kept
    shards, partitions = shards_of(select), partitions_for(records)
    counts, quotas = scratch / "counts", scratch / "quotas"
    count = CountUnits(str(counts), str(select), shards, units, partitions)
    _read_kept(shop, f"{title}: count", kept, [count], logs / "count", shards)
    share = ShareOut(str(counts), str(quotas), partitions, len(shards), max_copies, str(logs / "share" / "progress"))
    size = sum(path.stat().st_size for path in counts.rglob("*.bin"))
    shop.pipeline(f"{title}: share", logs / "share", [share], partitions, size)
    shutil.rmtree(counts)
    return quotas


def _kept_bytes(select: Path) -> int:
    """Of the texts that a stage kept."""
    return sum(pc.sum(kept_rows(read_table(select, shard))["bytes"]).as_py() or 0 for shard in shards_of(select))


def _web_lines(shop: Workshop, kept: str, rules: Mapping[str, RuleSet], folder: Path, logs: Path) -> Tally:
    select, language = shop.run_dir / kept, str(shop.run_dir / "language")
    step = CutWebLines(str(folder), str(logs / "tallies"), str(select), rules, language)
    _read_kept(shop, "web_lines", kept, [step], logs, shards_of(select))
    return _finished(folder, logs / "tallies")


def _lines(shop: Workshop, kept: str, settings: LinesConfig, folder: Path, logs: Path) -> Tally:
    select, scratch = shop.run_dir / kept, folder / "scratch"
    most = _kept_bytes(select) // (settings.min_chars + 1)
    quotas = _count_copies(shop, "lines", kept, Lines(settings), settings.max_copies, most, scratch, logs)
    shards, tallies = shards_of(select), logs / "cut" / "tallies"
    step = CutLines(str(folder), str(tallies), str(select), settings, str(quotas), shards)
    _read_kept(shop, "lines: cut", kept, [step], logs / "cut", shards)
    shutil.rmtree(scratch)
    return _finished(folder, tallies)


def _substrings(shop: Workshop, kept: str, settings: SubstringsConfig, folder: Path, logs: Path) -> Tally:
    select, scratch = shop.run_dir / kept, folder / "scratch"
    shards, minimizers = shards_of(select), Minimizers(settings)
    often = 2 * _kept_bytes(select) // minimizers.width
    repeated = _count_copies(
        shop, "substrings: minimizers", kept, minimizers, 1, often, scratch / "minimizers", logs / "minimizers"
    )
    again = sum(path.stat().st_size for path in repeated.glob("*.bin")) // RECORD.itemsize
    windows = Windows(settings, str(repeated), shards)
    quotas = _count_copies(
        shop, "substrings: windows", kept, windows, 1, again * minimizers.width, scratch / "windows", logs / "windows"
    )
    tallies = logs / "cut" / "tallies"
    step = CutSubstrings(str(folder), str(tallies), str(select), windows, str(quotas))
    _read_kept(shop, "substrings: cut", kept, [step], logs / "cut", shards)
    shutil.rmtree(scratch)
    return _finished(folder, tallies)


def _pii(shop: Workshop, kept: str, settings: PiiConfig, folder: Path, logs: Path) -> Tally:
    select = shop.run_dir / kept
    step = RemovePii(str(folder), str(logs / "tallies"), str(select), settings)
    _read_kept(shop, "pii", kept, [step], logs, shards_of(select))
    return _finished(folder, logs / "tallies")


def _documents(shop: Workshop, kept: str, cutting: Sequence[str], folder: Path, logs: Path) -> Tally:
    run_dir, config = shop.run_dir, shop.config
    before = Before(
        kept=str(run_dir / kept),
        judges=tuple(str(run_dir / name) for name in cutting if name != kept),
        cutters=tuple(str(run_dir / name) for name in cutting),
        deduped=str(run_dir / "dedup"),
        scores=str(run_dir / "score"),
        languages=str(run_dir / "language"),
        cut_share_max=config.documents.cut_share_max,
        left_bytes_min=config.documents.left_bytes_min,
    )
    shards, settings = shards_of(before.kept), config.heldout
    survey = Survey(before, shards, settings.seed, str(logs / "survey" / "seen"))
    shop.pipeline("documents: survey", logs / "survey", [survey], len(shards), 0)
    found = surveyed(logs / "survey" / "seen")
    chosen = lots(found, config.sources, settings.share, settings.seed)
    order: dict[str, int] = {}  # a source's shards are numbered anew, those that are empty left out
    numbers = Counter[str]()
    for seen in found:
        order[seen.shard] = numbers[seen.shard.split("/")[0]]
        numbers[seen.shard.split("/")[0]] += not is_canary(seen.shard)
    tallies = logs / "tallies"
    steps = [
        Split(before, chosen, str(tallies), order, config.pii if config.pii and config.pii.enabled else None),
        TextWriter(str(folder), "${split}/${source}/${output}", split_record),
    ]
    _read_kept(shop, "documents", kept, steps, logs, list(order))
    write_samples(folder, (row for seen in found for row in seen.mostly_cut))
    if canaries := [fate for seen in found for fate in seen.canaries]:
        (folder / FATES).write_text("".join(json.dumps(one) + "\n" for one in canaries), encoding="utf-8")
    return Tally.load_all(tallies)
