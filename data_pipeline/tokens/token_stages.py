"""The last three stages of a data run: documents to a tokenizer, to token stores, to a mixture plan.

The work itself is in `tokenizer`, `store` and `mixture`; here it is given to datatrove's executor, counted
and published. Tokenizer and plan are one task each, token stores one per file of documents.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from rich.console import Console

from configs.data import DataConfig, TokenizerConfig
from configs.loader import plain
from configs.mixture import MixtureConfig, PlanConfig
from data_pipeline.core.ledger import Tally
from data_pipeline.core.progress import ProgressFile
from data_pipeline.core.shards import shard_path, shards_under
from data_pipeline.core.stage import Stage, read_manifest
from data_pipeline.documents.heldout import HELDOUT, TRAIN
from data_pipeline.mixture.earlier import keep_for_plans, keep_plans
from data_pipeline.mixture.forecast import show
from data_pipeline.mixture.plan_files import build_stages
from data_pipeline.mixture.rows import open_plans
from data_pipeline.stages import Workshop
from data_pipeline.tokens.store import build
from data_pipeline.tokens.tokenizer import FIM_CONTROLS, Tokenizer, train


def token_stages(shop: Workshop, documents: Stage) -> list[Stage]:
    """The stages from documents to a plan, in the order in which they run."""
    config = shop.config
    tokenizer = Stage(
        "tokenizer",
        partial(_tokenizer, shop),
        plain(config.tokenizer) | ({"controls": controls} if (controls := _controls(config.mixture)) else {}),
        ("tokens.tokenizer",),
        needs=(documents,),
        counted_against=documents,
        packages=("sentencepiece",),
        keep=keep_for_plans,
    )
    tokens = Stage(
        "tokens",
        partial(_tokens, shop),
        {},
        ("tokens.store", "tokens.tokenizer"),
        needs=(documents, tokenizer),
        counted_against=documents,
        packages=("sentencepiece",),
        keep=keep_for_plans,
    )
    plan = Stage(
        "plan",
        partial(_plan, shop),
        plain(config.mixture) if config.mixture else {},
        ("mixture.plan_files",),
        needs=(tokenizer, tokens),
        counted_against=tokens,
        keep=keep_plans,
    )
    return [tokenizer, tokens, plan]


class TrainTokenizer(PipelineStep):
    """One task: trains on the training split of all sources."""

    name = "Train tokenizer"
    type = "🔤 - TOKENIZER"

    def __init__(
        self, inputs: Sequence[str], out: str, settings: TokenizerConfig, controls: Sequence[str], progress: str
    ) -> None:
        super().__init__()
        self.inputs = list(inputs)
        self.out = out
        self.settings = settings
        self.controls = list(controls)
        self.progress = progress

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        progress = ProgressFile(self.progress, rank)
        train(
            [Path(path) for path in self.inputs],
            Path(self.out),
            self.settings.vocab_size,
            self.settings.seed,
            train_bytes=self.settings.train_bytes,
            character_coverage=self.settings.character_coverage,
            max_piece_length=self.settings.max_piece_length,
            controls=self.controls,
            progress=progress.advance,
        )
        progress.close()
        yield from ()


class Tokenize(PipelineStep):
    """Each shard of documents, `<split>/<source>/<name>`, to a token store of the same name."""

    name = "Tokenize"
    type = "🔢 - TOKENS"

    def __init__(
        self, documents: str, shards: Sequence[str], tokenizer: str, out: str, tallies: str, progress: str
    ) -> None:
        super().__init__()
        self.documents = documents
        self.shards = list(shards)
        self.tokenizer = tokenizer
        self.out = out
        self.tallies = tallies
        self.progress = progress

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        progress, tally = ProgressFile(self.progress, rank), Tally()
        tokenizer = Tokenizer.load(self.tokenizer)
        for shard in self.shards[rank::world_size]:
            out = Path(self.out) / shard
            out.parent.mkdir(parents=True, exist_ok=True)
            source = out.parent.name
            written = build(shard_path(self.documents, shard), out, tokenizer, progress.advance)
            tally.came_in(source, written.text_bytes, written.documents)
            tally.kept(source, written.text_bytes, documents=written.documents)
            tally.note(source, "tokens", written.tokens)
        tally.save(Path(self.tallies) / f"{rank:05d}.json")
        progress.close()
        yield from ()


def _controls(mixture: MixtureConfig | None) -> list[str]:
    """Control symbols that a tokenizer has only if the mixture needs them: without them it stays the same model."""
    return list(FIM_CONTROLS) if mixture and any(plan.fim for plan in mixture.plans().values()) else []


def _document_shards(shop: Workshop) -> list[str]:
    """Largest first, so that no task is left alone with a big file at the end."""
    folder = shop.run_dir / "documents"
    return sorted(shards_under(folder), key=lambda shard: -shard_path(folder, shard).stat().st_size)


def _tokenizer(shop: Workshop, folder: Path, logs: Path) -> Tally:
    tally = Tally()
    for source, counts in (read_manifest(shop.run_dir / "documents") or {})["sources"].items():
        notes, kept = counts["notes"], counts["passed_on"]
        if not kept["documents"]:  # canaries end before
            continue
        documents, size = notes.get("held out", 0), notes.get("held-out bytes", 0)
        tally.came_in(source, kept["bytes"], kept["documents"])
        tally.dropped(source, "held_out", size, documents)
        tally.kept(source, kept["bytes"] - size, documents=kept["documents"] - documents)
    shards = [shard for shard in _document_shards(shop) if shard.startswith(f"{TRAIN}/")]
    inputs = [str(shard_path(shop.run_dir / "documents", shard)) for shard in shards]
    controls = _controls(shop.config.mixture)
    step = TrainTokenizer(inputs, str(folder), shop.config.tokenizer, controls, str(logs / "progress"))
    shop.pipeline("tokenizer", logs, [step], 1, tally.total().kept.bytes, alone=True)
    return tally


def _tokens(shop: Workshop, folder: Path, logs: Path) -> Tally:
    shards = _document_shards(shop)
    step = Tokenize(
        str(shop.run_dir / "documents"),
        shards,
        str(shop.run_dir / "tokenizer"),
        str(folder),
        str(logs / "tallies"),
        str(logs / "progress"),
    )
    shop.pipeline("tokens", logs, [step], len(shards), shop.text_bytes())
    tally = Tally.load_all(logs / "tallies")
    for source in shop.config.sources:
        tally.of(source)  # one without documents too, so that a plan knows that it is there
    return tally


class Plan(PipelineStep):
    """One task: the mixture plan over all token stores, or one for each stage."""

    name = "Plan"
    type = "🗺 - PLAN"

    def __init__(self, run_dir: str, out: str, plans: Mapping[str, PlanConfig]) -> None:
        super().__init__()
        self.run_dir = run_dir
        self.out = out
        self.plans = dict(plans)

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        run_dir = Path(self.run_dir)
        build_stages(run_dir / "tokens", run_dir / "tokenizer", Path(self.out), self.plans)
        yield from ()


def show_forecast(config: DataConfig, console: Console) -> None:
    """Of the plans that the run's tokens would make; leaves nothing behind. Errors: ValueError as `mixture.lay_out`."""
    run_dir = Path(config.run.dir)
    with TemporaryDirectory(prefix=".forecast.", dir=run_dir) as folder:
        build_stages(run_dir / "tokens", run_dir / "tokenizer", folder, config.plans())
        for name, plan in open_plans(Path(folder)).items():
            show(plan.description, console, name)


def _plan(shop: Workshop, folder: Path, logs: Path) -> Tally:
    shop.pipeline("plan", logs, [Plan(str(shop.run_dir), str(folder), shop.config.plans())], 1, 0, alone=True)
    planned: dict[str, dict[str, Any]] = {}
    rows = Counter[str]()
    for name, plan in open_plans(folder).items():
        show(plan.description, shop.console, name)
        planned |= {source["name"]: source for source in plan.description["sources"]}
        rows.update({source["name"]: source["samples"] for source in plan.description["sources"]})
    manifest = read_manifest(shop.run_dir / "tokens") or {}
    tally = Tally()
    for name, counts in Tally.from_plain(manifest["sources"]).sources.items():
        amount = counts.passed_on
        tally.came_in(name, amount.bytes, amount.documents)
        if name not in planned and not amount.documents:
            tally.of(name)  # so that the report has it, with zeros
            continue
        if name not in planned:
            tally.dropped(name, "not_in_mixture", amount.bytes, amount.documents)
            continue
        stores = [*planned[name]["stores"], *planned[name][HELDOUT]["stores"]]
        documents, size = (sum(store[key] for store in stores) for key in ("documents", "text_bytes"))
        tally.kept(name, size, documents=documents)
        tally.note(name, "rows", rows[name])
    return tally
