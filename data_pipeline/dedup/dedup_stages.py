"""The two stages of deduplication: signatures, which reads the texts, and dedup, which mostly reads tables.

signatures: SignDocuments
dedup:      FindPairs (one task per kind of key and range of keys) -> FindClusters (one task)
            -> [WriteShingles -> WriteEarlierShingles] -> ChooseSurvivors (one task per part of the clusters)
            -> JudgeDocuments
"""

import json
import shutil
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from configs.data import DataConfig
from configs.loader import ConfigError, plain, read_tree
from data_pipeline.core.hashing import digest
from data_pipeline.core.integrity import DamagedData, check_files
from data_pipeline.core.ledger import Tally
from data_pipeline.core.run_context import COMPILED_ONCE, RunContext, scan_texts
from data_pipeline.core.shards import ShardReader
from data_pipeline.core.stage import Stage, expected_files, read_manifest
from data_pipeline.core.tables import count_verdicts, shards_of
from data_pipeline.dedup.clusters import MEMBERS, FindClusters, Population, write_matched
from data_pipeline.dedup.duplicate_pairs import EarlierRun, FindPairs, Numbering, key_ranges
from data_pipeline.dedup.shingles import WriteEarlierShingles, WriteShingles, mark_candidates, shards_with
from data_pipeline.dedup.signatures import EXACT, URL, MinHasher, SignDocuments, kinds_of_keys
from data_pipeline.dedup.survivors import BYTES_A_MEMBER, ChooseSurvivors, JudgeDocuments, sample_duplicates
from data_pipeline.scan.words import Splitter

_SIGNED = ("bands", "rows", "ngram", "seed")  # the settings that signatures depend on


def signatures_stage(context: RunContext, extract: Stage, language: Stage) -> Stage:
    """Describes the stage signatures, which reads the texts and writes their fingerprints."""
    config = context.config
    splitters = {name: rules.splitter for name, rules in config.rules.items()}
    settings = plain(config.dedup)
    return Stage(
        "signatures",
        partial(_signatures, context),
        {"dedup": {name: settings[name] for name in _SIGNED}, "splitters": splitters},
        ("dedup.signatures",),
        needs=(extract, language),
        counted_against=language,
    )


def dedup_stage(context: RunContext, filtered: Stage, signatures: Stage) -> Stage:
    """Describes the stage dedup, which keeps the best document of each group of duplicates."""
    config = context.config
    settings = plain(config.dedup)
    return Stage(
        "dedup",
        partial(_dedup, context),
        {name: value for name, value in settings.items() if name != "memory_mb"},
        ("dedup.survivors",),
        needs=(filtered, signatures),
        counted_against=filtered,
        inputs=digest([_index_key(config, Path(run)) for run in config.dedup.index]),
    )


def _signatures(context: RunContext, folder: Path, logs: Path) -> Tally:
    language = str(context.run_dir / "language")
    MinHasher(context.config.dedup).keys(COMPILED_ONCE, Splitter.words)
    return scan_texts(
        context,
        "signatures",
        lambda tallies: SignDocuments(str(folder), tallies, context.config, language),
        folder,
        logs,
    )


def _dedup(context: RunContext, folder: Path, logs: Path) -> Tally:
    """Runs the steps of the dedup stage, as listed at the top of this module."""
    settings = context.config.dedup
    signatures = str(context.run_dir / "signatures")
    for run in (context.run_dir, *map(Path, settings.index)):
        _check_keys(run / "signatures")
    documents = Numbering(context.run_dir / "filter")
    work = folder / "work"
    work.mkdir()
    wanted = {EXACT: settings.exact, URL: settings.url}
    kinds = [kind for kind, name in enumerate(kinds_of_keys(settings)) if wanted.get(name, settings.minhash)]
    earlier = _earlier_runs(settings.index)
    counted = documents.documents + sum(run.kept.documents for run in earlier)
    todo = key_ranges(kinds, counted, settings.memory_mb << 20)
    find = FindPairs(str(work), documents, signatures, todo, earlier)
    context.pipeline("pairs", logs / "pairs", [find], len(todo), 0)
    pairs = [str(work / job.file) for job in todo]
    if earlier:
        write_matched(work / "matched.npy", pairs)
    population = Population(documents, earlier, str(work / "matched.npy"))
    cluster = FindClusters(str(work), population, signatures, pairs)
    context.pipeline("clusters", logs / "clusters", [cluster], 1, 0, alone=True)
    compared = ""
    if settings.minhash and settings.verify is not False:
        compared = _write_shingles(context, population, pairs, work, logs)
    least = None if settings.verify is False else settings.verify
    members = int((work / MEMBERS).read_text(encoding="utf-8"))
    # The number of parts does not change the result; parts must fit into memory, and every worker should get some.
    parts = max(
        1 + members * BYTES_A_MEMBER // (settings.memory_mb << 20), min(context.executor.workers, members // 1000)
    )
    choose = ChooseSurvivors(str(work), population, parts, settings.url, least, compared)
    context.pipeline("survivors", logs / "survivors", [choose], parts, 0)
    tallies = logs / "verdicts" / "tallies"
    progress = str(logs / "verdicts" / "progress")
    judge = JudgeDocuments(str(folder), str(work), population, parts, settings.url, str(tallies), progress)
    context.pipeline("verdicts", logs / "verdicts", [judge], len(documents.shards), context.text_bytes())
    shutil.rmtree(work)
    tally = Tally.load_all(tallies)
    count_verdicts(folder, tally)
    sample_duplicates(folder, shards_of(folder))
    return tally


def _check_keys(folder: Path) -> None:
    """Raises DamagedData if a file of sorted keys does not match its checksum; tables have checksums of their own."""
    files = expected_files(folder, read_manifest(folder) or {"files": {}})
    damaged = check_files((one for one in files if one.path.suffix == ".npy"), threading.Event())
    if damaged:
        raise DamagedData(damaged[0])


def _write_shingles(context: RunContext, population: Population, pairs: Sequence[str], work: Path, logs: Path) -> str:
    """Writes the n-grams of documents that share a MinHash key; returns the file that marks these documents."""
    config, names = context.config, kinds_of_keys(context.config.dedup)
    by_kind: dict[str, list[str]] = {}
    for path in pairs:
        by_kind.setdefault(names[int(Path(path).name[:3])], []).append(path)
    near = [path for name, paths in by_kind.items() if name not in (EXACT, URL) for path in paths]
    candidates = work / "candidates.bin"
    mark_candidates(candidates, population, near, by_kind.get(EXACT, []))
    language, ngram = str(context.run_dir / "language"), config.dedup.ngram
    if shards := shards_with(candidates, population):
        splitters = {name: Splitter[rules.splitter] for name, rules in config.rules.items()}
        lay = WriteShingles(str(work), population, str(candidates), splitters, language, ngram)
        reader = ShardReader(str(context.run_dir / "extract"), shards, str(logs / "shingles" / "progress"))
        context.pipeline("shingles", logs / "shingles", [reader, lay], len(shards), context.text_bytes())
    again = WriteEarlierShingles(str(work), population, str(candidates), ngram)
    if count := len(again.shards()):
        context.pipeline("shingles of the index", logs / "index", [again], count, 0)
    return str(candidates)


def _earlier_runs(index: Sequence[str]) -> list[EarlierRun]:
    """Opens the finished runs that `dedup.index` names."""
    found: list[EarlierRun] = []
    first = 0
    for run in index:
        theirs = config_of(Path(run))
        splitters = {name: Splitter[rules.get("splitter", "spaces")] for name, rules in theirs["rules"].items()}
        found.append(EarlierRun(run, Numbering(Path(run) / "dedup"), first, splitters))
        first += found[-1].kept.documents
    return found


def config_of(run: Path) -> dict[str, Any]:
    """Reads the config of an earlier run. Raises ConfigError if it is damaged."""
    tree = read_tree(run / "config.toml")
    missing = [f"dedup.{name}" for name in _SIGNED if name not in tree.get("dedup", {})]
    if missing or "rules" not in tree:
        raise ConfigError(
            f"dedup.index names {run}, whose config.toml is damaged: it has no {(*missing, 'rules')[0]}; restore it, "
            "or leave that run out of dedup.index"
        )
    return tree


def _index_key(config: DataConfig, run: Path) -> str:
    """Keys of an earlier run's signatures and dedup stages, as JSON.

    Raises ConfigError if the run is not finished, or if its signatures or texts cannot be compared with this run's.
    """
    manifests = [read_manifest(run / name) for name in ("signatures", "dedup")]
    if None in manifests or not (run / "config.toml").is_file():
        raise ConfigError(
            f"dedup.index names {run}, which holds no finished signatures and dedup stages; name the run.dir of a "
            "finished data run"
        )
    theirs = config_of(run)
    mine = plain(config)
    other = [name for name in _SIGNED if theirs["dedup"][name] != mine["dedup"][name]]
    if other:
        here, there = (", ".join(f"dedup.{name} = {keys['dedup'][name]}" for name in other) for keys in (mine, theirs))
        raise ConfigError(
            f"{here} here, and {there} in the index {run}: their signatures cannot be compared; set {there} here, or "
            "run that one again"
        )
    if mine["dedup"]["minhash"] and config.dedup.verify is not False:
        for name in ("extract", "language"):
            if read_manifest(run / name) is None:
                raise ConfigError(
                    f"dedup.verify = {config.dedup.verify} compares texts, and the index {run} has no {name} stage any "
                    "more; restore that folder, or set dedup.verify = false to compare signatures alone"
                )
    return json.dumps([manifest["key"] for manifest in manifests if manifest])
