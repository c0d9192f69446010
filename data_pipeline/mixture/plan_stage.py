"""The plan stage: makes a mixture plan over the token stores, or one plan for each stage of the mixture."""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from rich.console import Console

from configs.data import DataConfig
from configs.loader import plain
from configs.mixture import PlanConfig
from data_pipeline.core.ledger import Tally
from data_pipeline.core.run_context import RunContext
from data_pipeline.core.shards import HELDOUT
from data_pipeline.core.stage import Stage, read_manifest
from data_pipeline.mixture.earlier import keep_plans
from data_pipeline.mixture.forecast import show
from data_pipeline.mixture.plan_files import build_stages
from data_pipeline.mixture.rows import open_plans


def plan_stage(context: RunContext, tokenizer: Stage, tokens: Stage) -> Stage:
    """Returns the plan stage, which assigns documents to training rows."""
    config = context.config
    return Stage(
        "plan",
        partial(_plan, context),
        plain(config.mixture) if config.mixture else {},
        ("mixture.plan_files",),
        needs=(tokenizer, tokens),
        counted_against=tokens,
        keep=keep_plans,
    )


class BuildPlans(PipelineStep):
    """datatrove step of a single task that writes the plans of all stages of the mixture."""

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
    """Prints the forecast of the plans that the run's tokens would give, made in a temporary folder.

    Raises ValueError as `draft_plan` does.
    """
    run_dir = Path(config.run.dir)
    with TemporaryDirectory(prefix=".forecast.", dir=run_dir) as folder:
        build_stages(run_dir / "tokens", run_dir / "tokenizer", folder, config.plans())
        for name, plan in open_plans(Path(folder)).items():
            show(plan.description, console, name)


def _plan(context: RunContext, folder: Path, logs: Path) -> Tally:
    """Runs the stage: writes the plans, prints their forecast, and counts rows and the documents left out."""
    context.pipeline(
        "plan", logs, [BuildPlans(str(context.run_dir), str(folder), context.config.plans())], 1, 0, alone=True
    )
    planned: dict[str, dict[str, Any]] = {}
    rows = Counter[str]()
    for name, plan in open_plans(folder).items():
        show(plan.description, context.console, name)
        planned |= {source["name"]: source for source in plan.description["sources"]}
        rows.update({source["name"]: source["samples"] for source in plan.description["sources"]})
    manifest = read_manifest(context.run_dir / "tokens") or {}
    tally = Tally()
    for name, counts in Tally.from_plain(manifest["sources"]).sources.items():
        amount = counts.passed_on
        tally.came_in(name, amount.bytes, amount.documents)
        if name not in planned and not amount.documents:
            tally.of(name)  # so that the report lists it, with zeros
            continue
        if name not in planned:
            tally.dropped(name, "not_in_mixture", amount.bytes, amount.documents)
            continue
        stores = [*planned[name]["stores"], *planned[name][HELDOUT]["stores"]]
        documents, size = (sum(store[key] for store in stores) for key in ("documents", "text_bytes"))
        tally.kept(name, size, documents=documents)
        tally.note(name, "rows", rows[name])
    return tally
