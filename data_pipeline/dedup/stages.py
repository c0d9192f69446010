"""The two stages of deduplication: signatures, which reads the text, and dedup, which reads tables.

signatures: Sign
dedup:      FindPairs (a task a key and range) -> [LayOutShingles -> Verify] -> Cluster (one task) -> Judge
"""

import json
import shutil
import tomllib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from configs.data import DataConfig
from configs.loader import ConfigError, plain
from data_pipeline.dedup.clusters import Cluster, Judge, sample_duplicates
from data_pipeline.dedup.pairs import FindPairs, Numbering, jobs
from data_pipeline.dedup.signatures import EXACT, URL, MinHasher, Sign, kinds_of_keys
from data_pipeline.dedup.verify import LayOutShingles, Verify, mark_candidates
from data_pipeline.ledger import Tally
from data_pipeline.scan.words import Splitter
from data_pipeline.stage import Stage, digest, read_manifest
from data_pipeline.stages import Workshop, scan_text, text_reader
from data_pipeline.tables import count_verdicts, shards_of

_SIGNED = ("bands", "rows", "ngram", "seed")  # the settings that signatures depend on


def dedup_stages(shop: Workshop, before: Mapping[str, Stage]) -> list[Stage]:
    """Signatures and dedup, in this order; `before` are the stages up to the filter, by name."""
    config = shop.config
    splitters = {name: rules.splitter for name, rules in config.rules.items()}
    settings = plain(config.dedup)
    signatures = Stage(
        "signatures",
        partial(_signatures, shop),
        {"dedup": {name: settings[name] for name in _SIGNED}, "splitters": splitters},
        ("dedup.signatures",),
        needs=(before["extract"], before["language"]),
        counted_against=before["language"],
    )
    dedup = Stage(
        "dedup",
        partial(_dedup, shop),
        {name: value for name, value in settings.items() if name != "memory_mb"},
        ("dedup.clusters", "dedup.verify"),
        needs=(before["filter"], signatures),
        counted_against=before["filter"],
        inputs=digest([_index_key(config, Path(run)) for run in config.dedup.index]),
    )
    return [signatures, dedup]


def _signatures(shop: Workshop, folder: Path, logs: Path) -> Tally:
    language = str(shop.run_dir / "language")
    MinHasher(shop.config.dedup).keys("Compiled here once, then found in its cache by every worker.", Splitter.words)
    return scan_text(
        shop, "signatures", lambda tallies: Sign(str(folder), tallies, shop.config, language), folder, logs
    )


def _dedup(shop: Workshop, folder: Path, logs: Path) -> Tally:
    settings = shop.config.dedup
    signatures = str(shop.run_dir / "signatures")
    documents = Numbering(shop.run_dir / "filter")
    if not documents.documents:
        raise ValueError("no document is left to deduplicate; see the drops of the filter stage before it")
    work = folder / "work"
    work.mkdir()
    wanted = {EXACT: settings.exact, URL: settings.url}
    kinds = [kind for kind, name in enumerate(kinds_of_keys(settings)) if wanted.get(name, settings.minhash)]
    todo = jobs(kinds, documents.documents, settings.memory_mb << 20)
    earlier = [(str(Path(run) / "signatures"), Numbering(Path(run) / "dedup")) for run in settings.index]
    find = FindPairs(str(work), documents, signatures, todo, earlier)
    shop.pipeline("pairs", logs / "pairs", [find], len(todo), 0)
    pairs = [str(work / job.file) for job in todo]
    if settings.verify is not None:
        pairs = _verified(shop, pairs, kinds_of_keys(settings), documents, work, logs)
    shop.pipeline("clusters", logs / "clusters", [Cluster(str(work), documents, signatures, pairs)], 1, 0, alone=True)
    tallies = logs / "verdicts" / "tallies"
    judge = Judge(str(folder), str(work), documents, str(tallies), str(logs / "verdicts" / "progress"))
    shop.pipeline("verdicts", logs / "verdicts", [judge], len(documents.shards), shop.text_bytes())
    shutil.rmtree(work)
    tally = Tally.load_all(tallies)
    count_verdicts(folder, tally)
    sample_duplicates(folder, shards_of(folder))
    return tally


def _verified(
    shop: Workshop, pairs: list[str], kinds: list[str], documents: Numbering, work: Path, logs: Path
) -> list[str]:
    """The files of pairs that are left when those of the bands have been compared, n-gram by n-gram."""
    near = [path for path in pairs if kinds[int(Path(path).name[:3])] not in (EXACT, URL)]
    language, candidates = str(shop.run_dir / "language"), work / "candidates.bin"
    mark_candidates(candidates, documents.documents, near)
    splitters = {name: Splitter[rules.splitter] for name, rules in shop.config.rules.items()}
    lay = LayOutShingles(str(work), documents, str(candidates), splitters, language, shop.config.dedup.ngram)
    reader, shards = text_reader(shop, logs / "shingles")
    shop.pipeline("shingles", logs / "shingles", [reader, lay], shards, shop.text_bytes())
    assert shop.config.dedup.verify is not None
    verify = Verify(str(work), documents, near, shop.config.dedup.verify)
    shop.pipeline("verify", logs / "verify", [verify], len(near), 0)
    return [str(Path(path).with_name(f"verified-{Path(path).name}")) if path in near else path for path in pairs]


def _index_key(config: DataConfig, run: Path) -> str:
    """What an earlier run's signatures and verdicts are. Errors: ConfigError when they cannot be used here."""
    manifests = [read_manifest(run / name) for name in ("signatures", "dedup")]
    if None in manifests or not (run / "config.toml").is_file():
        raise ConfigError(
            f"dedup.index names {run}, which holds no finished signatures and dedup stages; name the run.dir of a "
            "finished data run"
        )
    theirs = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    mine = plain(config)
    for name in _SIGNED:
        if theirs["dedup"][name] != mine["dedup"][name]:
            raise ConfigError(
                f"dedup.{name} = {mine['dedup'][name]} here and {theirs['dedup'][name]} in the index {run}: their "
                "signatures cannot be compared; set it to the index's, or run that again"
            )
    return json.dumps([manifest["key"] for manifest in manifests if manifest])
