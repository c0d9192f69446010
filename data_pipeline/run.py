"""The stages of a data run, in order: does those that are not done yet, prints their counts, and writes the ledger.

`recipe` lists the stages; each is defined in the package that does its work. The counts of all finished stages go to
`ledger.json` in the run directory. Importing this module takes a second, so the command itself is `command.py`.

Records that cannot be used do not end a run by themselves. They are written to `extract/rejected/`, each with file,
offset and reason. If they are at most `extract.max_bad_share` of a source's records, the exit status is 0 and a line
gives their number and that folder; if they are more, the status is 1 and they are in `extract.failed/rejected/`.
Alarms about the counts are printed last; with `alarms.fail` they make the exit status 1.
"""

import argparse
import contextlib
import json
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from configs.data import DataConfig
from configs.files import write_atomic
from configs.folders import check_writable
from configs.loader import ConfigError, write
from data_pipeline.alarms import alarms
from data_pipeline.canaries.check import check_canaries, missed
from data_pipeline.core.console import say, warn, wide_console
from data_pipeline.core.full_disk import explain_write_error
from data_pipeline.core.run_context import RunContext
from data_pipeline.core.shortfalls import COUNTED, short_plans, short_sources
from data_pipeline.core.stage import LEDGER, PublishedStage, Stage, made_by_other_code, perform, published, sole_user
from data_pipeline.cutting.cut_stages import (
    decontaminate_stage,
    lines_stage,
    pii_stage,
    substrings_stage,
    web_lines_stage,
)
from data_pipeline.dedup.dedup_stages import dedup_stage, signatures_stage
from data_pipeline.documents.documents_stage import documents_stage
from data_pipeline.executors.base import Executor
from data_pipeline.executors.slurm_executor import cancel_leftovers
from data_pipeline.executors.stage_tasks import TaskError, quiet
from data_pipeline.extraction.extract import set_aside
from data_pipeline.extraction.extract_stage import extract_stage, forget_failure
from data_pipeline.language.language_stage import language_stage
from data_pipeline.mixture.earlier import keep_for_plans
from data_pipeline.mixture.plan_stage import plan_stage, show_forecast
from data_pipeline.report.ledger_tables import print_ledger, read_ledger
from data_pipeline.scores.score_stages import filter_stage, score_stage
from data_pipeline.tokens.token_stages import tokenizer_stage, tokens_stage


def recipe(context: RunContext) -> list[Stage]:
    """Returns all stages of a data run in the order in which they run; optional ones only if the config has them."""
    stages = [
        extract := extract_stage(context),
        language := language_stage(context, extract),
        score := score_stage(context, language),
        filtered := filter_stage(context, score),
        signatures := signatures_stage(context, extract, language),
        dedup := dedup_stage(context, filtered, signatures),
        clean := decontaminate_stage(context, extract, dedup),
        web_lines := web_lines_stage(context, extract, language, clean or dedup),
        lines := lines_stage(context, extract, language, clean or dedup),
        substrings := substrings_stage(context, extract, language, clean or dedup),
        pii := pii_stage(context, extract, language, clean or dedup),
        documents := documents_stage(
            context, extract, language, score, dedup, [one for one in (clean, web_lines, lines, substrings, pii) if one]
        ),
        tokenizer := tokenizer_stage(context, documents, keep_for_plans),
        tokens := tokens_stage(context, documents, tokenizer, keep_for_plans),
        plan_stage(context, tokenizer, tokens),
    ]
    return [stage for stage in stages if stage]


def select(names: Sequence[str], only: str, until: str) -> list[str]:
    """Returns those of the stages `names` that the options --stage (`only`) and --until ask for.

    Raises ConfigError if an option names another stage, or if both are given.
    """
    chosen = only.split(",") if only else names[: 1 + names.index(until)] if until in names else list(names)
    for option, given in (("--stage", chosen), ("--until", [until] if until else [])):
        for name in given:
            if name not in names:
                raise ConfigError(f"{option} {name}: this run has no such stage; it has {', '.join(names)}")
    if only and until:
        raise ConfigError(f"--stage {only} and --until {until} exclude each other; give one of them")
    return list(chosen)


def run(
    config: DataConfig, console: Console, executor: Executor, only: str = "", until: str = ""
) -> tuple[list[PublishedStage], list[str]]:
    """Runs the stages that are not done yet; returns all finished stages, and a sentence for each alarm.

    `only` restricts the run to the stages that it names, separated by commas; `until` is the last stage to run. Raises
    ConfigError, ValueError for data that cannot be used, TaskError for a failed task, and LedgerError for counts that
    do not add up.
    """
    run_dir = Path(config.run.dir)
    _check_run_dir(run_dir)
    with sole_user(run_dir):
        quiet(None)
        with undo_if_refused(run_dir):
            stages = recipe(RunContext(config, run_dir, console, executor))
            chosen = _chosen(config, stages, only, until)
            _check_needs(stages, chosen, run_dir)
        cancel_leftovers(run_dir / "logs")
        quiet(run_dir / "logs" / "datatrove.log")
        write(config, run_dir / "config.toml")
        _say_made_by_other_code(stages, chosen, run_dir, console)
        done: dict[str, PublishedStage] = {}
        for number, stage in enumerate(stages, 1):
            counted = done.get(stage.counted_against.name) if stage.counted_against else None
            before = counted.tally if counted else None
            earlier = published(stage, run_dir)
            if earlier:
                earlier.tally.check(stage.name, before)
            elif stage.name not in chosen:
                continue
            if not earlier:  # what later stages left is of an earlier run from now on
                write_ledger(run_dir, stages, done, [], [])
            done[stage.name] = earlier or perform(stage, run_dir, before)
            if stage.name == "extract":
                forget_failure(run_dir)
            _print_counts(done[stage.name], number, len(stages), console)
            _check_some_left(done[stage.name], run_dir)
            if done[stage.name].fresh:
                for warning in warnings([stage.name], done, config):
                    warn(warning, console)
        canaries = check_canaries(run_dir, config.canaries, done)
        found = alarms({name: one.tally for name, one in done.items()}, run_dir, config.alarms) + missed(canaries)
        write_ledger(run_dir, stages, done, found, canaries)
        return list(done.values()), found


def warnings(names: Collection[str], done: Mapping[str, PublishedStage], config: DataConfig) -> list[str]:
    """Returns warnings of too little text, from the counts of the stages `names`.

    Shortfalls of a plan are reported from the last of the COUNTED stages among them, or not at all once the plan stage
    is done.
    """
    counted = [name for name in COUNTED if name in names and "plan" not in names][-1:]
    short = []
    if "documents" in names:
        short = short_sources(done["documents"].tally, done["extract"].tally, config)
    return short + [sentence for name in counted for sentence in short_plans(name, done[name].tally, config)]


def _chosen(config: DataConfig, stages: Sequence[Stage], only: str, until: str) -> list[str]:
    """Returns `select` of the stages; also raises ConfigError if the plan stage is chosen without a [mixture]."""
    chosen = select([stage.name for stage in stages], only, until)
    if "plan" in chosen:
        config.plans()
    return chosen


def _check_some_left(done: PublishedStage, run_dir: Path) -> None:
    """Raises ValueError if a stage kept no document, since every later stage would fail."""
    total = done.tally.total()
    if not total.came_in.documents and done.name == "extract":
        raise ValueError("the files of all sources hold no record; check sources.*.files and their format")
    if total.came_in.documents and not total.kept.documents:
        most = sorted(total.dropped.items(), key=lambda item: -item[1].documents)[:3]
        why = ", ".join(f"{reason} {amount.documents:,}" for reason, amount in most)
        raise ValueError(
            f"stage {done.name} kept none of {total.came_in.documents:,} documents ({why}): nothing is left to go on "
            f"with; look at {run_dir / _where(done)}, change the rule or key behind the first of these, and run again"
        )


@contextlib.contextmanager
def undo_if_refused(run_dir: Path) -> Iterator[None]:
    """Context that, if it ends in an exception, removes what was added to the run directory, such as hash caches."""
    before = set(run_dir.iterdir())
    try:
        yield
    except BaseException:
        for path in set(run_dir.iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _check_needs(stages: Sequence[Stage], chosen: Sequence[str], run_dir: Path) -> None:
    """Raises ConfigError if a chosen stage needs another that is neither done nor chosen."""
    available: set[str] = set()
    lacking: dict[str, list[str]] = {}  # missing stage -> the missing stages that it needs, then itself
    for stage in stages:
        if published(stage, run_dir) is None:
            against = [stage.counted_against] if stage.counted_against else []
            needs = [need.name for need in [*stage.needs, *against] if need.name not in available]
            missing = dict.fromkeys(name for need in needs for name in lacking[need])
            if stage.name not in chosen:
                lacking[stage.name] = [*missing, stage.name]
                continue
            if missing:
                names = ",".join(missing)
                raise ConfigError(
                    f"--stage {stage.name}: it needs {names}, not done yet with this config and code; run that first, "
                    f"by --stage {names}, or all of it by --until {stage.name}"
                )
        available.add(stage.name)


def write_ledger(
    run_dir: Path,
    stages: Sequence[Stage],
    done: Mapping[str, PublishedStage],
    found: Sequence[str],
    canaries: Sequence[Mapping[str, Any]],
) -> None:
    """Writes alarms, canaries and the counts of all finished stages to `ledger.json` in the run directory.

    A stage's `after` is the stage whose output it counts as its input, None for the first stage. Canaries are listed
    among a stage's sources, but its total leaves them out.
    """
    after = {stage.name: stage.counted_against.name if stage.counted_against else None for stage in stages}
    ledger = {
        "alarms": list(found),
        "canaries": list(canaries),
        "set_aside": count_set_aside(list(done.values())),
        "stages": [
            {
                "name": stage.name,
                "after": after[stage.name],
                "seconds": round(stage.seconds, 3),
                "fresh": stage.fresh,
                "where": _where(stage),
                "total": stage.tally.total().plain(),
                "sources": stage.tally.plain(),
            }
            for stage in done.values()
        ],
    }
    write_atomic(run_dir / LEDGER, (json.dumps(ledger, indent=1, ensure_ascii=False) + "\n").encode())


def count_set_aside(done: Sequence[PublishedStage]) -> dict[str, int]:
    """Returns {reason: number of input records that could not be used}; the records are in `extract/rejected/`."""
    return next((set_aside(stage.tally.total()) for stage in done if stage.name == "extract"), {})


def _say_set_aside(done: Sequence[PublishedStage], config: DataConfig, console: Console) -> None:
    """Prints how many input records were set aside; the exit status is 0 nevertheless."""
    if reasons := count_set_aside(done):
        counts = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
        say(
            f"{sum(reasons.values()):,} records set aside ({counts}), within extract.max_bad_share = "
            f"{config.extract.max_bad_share}: {Path(config.run.dir) / 'extract' / 'rejected'}",
            console,
        )


def _say_made_by_other_code(stages: Sequence[Stage], chosen: Sequence[str], run_dir: Path, console: Console) -> None:
    """Prints which stages run again only because the code or a package that made them has changed."""
    if names := made_by_other_code([stage for stage in stages if stage.name in chosen], run_dir):
        say(
            "the code of these stages, or a package that they use, has changed since they were made; they run again, "
            f"with all stages that need them: {', '.join(names)}",
            console,
        )


def _where(stage: PublishedStage) -> str:
    """Path, in the run directory, of a stage's samples of dropped records, or of its folder if it has none."""
    for name in ("rejected", "drops"):
        if (stage.folder / name).is_dir():
            return f"{stage.folder.name}/{name}"
    return stage.folder.name


def _print_counts(done: PublishedStage, number: int, count: int, console: Console) -> None:
    """Prints the counts of a finished stage, and where its earlier result is kept, if anywhere."""
    total = done.tally.total()
    dropped = sum(amount.documents for amount in total.dropped.values())
    how = f"{done.seconds:.1f} s" if done.fresh else "done before, kept"
    say(
        f"[{number}/{count}] {done.name}: {total.came_in.documents:,} in, {total.kept.documents:,} kept, "
        f"{dropped:,} dropped ({how})",
        console,
    )
    if done.kept:
        say(
            f"the earlier {done.name} is kept in {done.kept} for training runs that use it; remove it when none does",
            console,
        )


def _check_run_dir(run_dir: Path) -> None:
    """Raises ConfigError if a data run cannot write to its folder, or if that belongs to a training run."""
    if (run_dir / "metrics.jsonl").is_file():
        raise ConfigError(f"run.dir = {str(run_dir)!r} is the folder of a training run; name one of the data run's own")
    check_writable(run_dir, "run.dir")


def dry_run(config: DataConfig, console: Console, executor: Executor, only: str = "", until: str = "") -> None:
    """Prints for every stage whether it would run or be skipped and, once there are tokens, the mixture's forecast.

    Writes nothing but the cache of input hashes, and that only where a run has been before. Raises ValueError if
    there are too few tokens for the mixture.
    """
    run_dir = Path(config.run.dir)
    if run_dir.exists():
        _check_run_dir(run_dir)
    done = set()
    if (run_dir / "config.toml").is_file():  # a run has been here
        stages = recipe(RunContext(config, run_dir, console, executor))
    else:
        with TemporaryDirectory() as nowhere:
            stages = recipe(RunContext(config, Path(nowhere), console, executor))
    chosen = _chosen(config, stages, only, until)
    _check_needs(stages, chosen, run_dir)
    _say_made_by_other_code(stages, chosen, run_dir, console)
    for stage in stages:
        verdict = "would run" if stage.name in chosen else "not done, not asked for"
        if published(stage, run_dir):
            done.add(stage.name)
            verdict = "done, would be skipped"
        say(f"{stage.name:<13} {verdict:<23} {run_dir / stage.name}", console)
    if {"tokenizer", "tokens"} <= done:
        show_forecast(config, console)


def lead(config: DataConfig, args: argparse.Namespace, executor: Executor) -> int:
    """Does the run, or the dry run; prints its errors, counts and alarms; returns the exit status."""
    console = wide_console()
    try:
        if args.dry_run:
            dry_run(config, console, executor, args.stage, args.until)
            return 0
        done, found = run(config, console, executor, args.stage, args.until)
    except ConfigError:
        raise
    except (ValueError, TaskError) as error:
        logs = Path(config.run.dir) / "logs"
        print(f"error: {error}" + (f"\n(details: {logs})" if logs.is_dir() else ""), file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {explain_write_error(str(error), Path(config.run.dir))}", file=sys.stderr)
        return 1
    run_dir = Path(config.run.dir)
    print_ledger(read_ledger(run_dir), run_dir, console)
    _say_set_aside(done, config, console)
    if canaries := check_canaries(run_dir, config.canaries, [stage.name for stage in done]):
        right = sum(one["caught"] for one in canaries)
        say(f"canaries: {right} of {len(canaries)} caught as they should be", console)
    console.print(
        f"{sum(stage.fresh for stage in done)} of {len(done)} stages ran; drops: trivium data report CONFIG",
        soft_wrap=True,
    )
    stages = {stage.name: stage for stage in done}
    for warning in warnings(stages, stages, config):
        warn(warning, console)
    for alarm in found:
        say(f"alarm: {alarm}", console)
    return 1 if found and config.alarms.fail else 0
