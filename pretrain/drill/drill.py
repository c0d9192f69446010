"""`trivium drill CONFIG`: breaks small runs of a config in one way after another, and says whether each recovers.

trivium drill configs/pretrain/demo.toml --nproc-per-node 2 parallel.tp=2

Each run is started by `trivium launch` with the real `trivium train`, on this machine. Leaves out faults of a network
and of GPUs, and everything but pretraining.
"""

import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from configs.cli import entrypoint, parse_args
from configs.files import write_atomic
from configs.folders import check_writable
from configs.loader import ConfigError, Failure, write
from configs.train import PretrainConfig
from launch.processes import ProcessGroup, cores
from pages import duration
from pretrain.drill.drilled_run import DrilledRun, DrillError
from pretrain.drill.faults import DRILLS, Setting
from pretrain.drill.small_config import (
    MOST_RANKS,
    STEPS,
    SmallConfig,
    default_ranks,
    fit_layout,
    given_keys,
    make_small,
)
from pretrain.drill.stand_in_rows import make_rows
from pretrain.drill.verdicts import HEADER, DrillOutcome, Numbers, as_record, summary
from pretrain.run.pretraining_config import with_initial_model

FAILED = 1
RESULT = "drill.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Does the drills, prints a line and some sentences on each, and returns 0 if all went as expected, else 1."""
    config, args = parse_args(
        PretrainConfig,
        argv,
        prog="trivium drill",
        description="Breaks small runs of a config in one way after another, starts each again, and compares it with "
        "a run that nothing happened to: "
        + "; ".join(f"{drill.what} ({name})" for name, drill in DRILLS.items())
        + ".",
        example="trivium drill configs/pretrain/demo.toml --nproc-per-node 2 parallel.tp=2\n"
        "only two of them, whose runs are kept:\n"
        "  trivium drill configs/pretrain/demo.toml --only kill,torn --keep",
        flags=[("--keep", "keep the folders of the runs, which are removed if all went as expected")],
        options=[
            ("--nproc-per-node", "", "number of ranks (default: the fewest that the degrees need, 2 to 4)"),
            ("--only", "", f"drills to do, with commas between: {','.join(DRILLS)} (default: all)"),
            ("--out", "runs/drill", f"folder of {RESULT} and, while the drill goes on, of the runs"),
        ],
        complete=lambda tree, args: with_initial_model(tree, args.config, "trivium drill"),
    )
    if not Path("/proc/self/environ").exists():
        raise ConfigError("a drill finds the processes of ranks in /proc, which this system has not; use Linux")
    small = SmallConfig(config, _ranks(args.nproc_per_node, config), given_keys(args.overrides))
    fit_layout(small)
    has_plan = Path(config.data.plan, "plan.json").is_file()
    make_small(small, has_plan)
    layout = small.layout
    left_out = _left_out(args.only, small)
    _print_setting(args.config, small, has_plan)
    if args.dry_run:
        return 0
    out = Path(args.out)
    check_writable(out, "--out")
    out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="runs-", dir=out)).absolute()
    outcomes: list[DrillOutcome] = []
    keep = args.keep
    began = time.monotonic()
    try:
        if not has_plan:
            samples = 2 * STEPS * small.config.train.global_batch_size
            length, vocab_size = small.config.train.seq_length, small.config.model.vocab_size
            plan = make_rows(work / "data", length, samples, vocab_size)
            small.take({"data.plan": str(plan)})
        for outcome in _outcomes(small, work, left_out):
            outcomes.append(outcome)
            print("\n".join(outcome.lines()), flush=True)
        keep |= not all(outcome.passed for outcome in outcomes)
    except (DrillError, Failure) as error:
        keep = True
        print(f"error: {error}; its output is in {work}", file=sys.stderr)
        return FAILED
    finally:
        if not keep:
            shutil.rmtree(work, ignore_errors=True)
    facts: dict[str, Any] = {
        "config": args.config,
        "overrides": args.overrides,
        "ranks": small.ranks,
        "layout": str(layout),
        "changes": small.changed(),
        "data": config.data.plan if has_plan else None,
        "steps": STEPS,
        "seconds": round(time.monotonic() - began, 1),
        "runs": str(work) if keep else None,
    }
    write_atomic(out / RESULT, as_record(facts, outcomes))
    print(f"\n{summary(outcomes)} It took {duration(time.monotonic() - began)}; all numbers: {out / RESULT}")
    if keep:
        print(f"The runs are in {work}")
    return 0 if all(outcome.passed for outcome in outcomes) else FAILED


def _ranks(given: str, config: PretrainConfig) -> int:
    if not given:
        return default_ranks(config)
    if not (given.isascii() and given.isdigit() and 2 <= int(given) <= MOST_RANKS):
        raise ConfigError(
            f"--nproc-per-node {given} is no number from 2 to {MOST_RANKS}: one rank alone is missed by no other, and "
            "all ranks run on this machine; give --nproc-per-node 2"
        )
    return int(given)


def _left_out(only: str, small: SmallConfig) -> dict[str, str]:
    """Returns, for each drill in its order, why it is left out, "" if it is not; those not asked for are missing."""
    names = only.split(",") if only else list(DRILLS)
    if unknown := [name for name in names if name not in DRILLS]:
        raise ConfigError(f"--only: {unknown[0]!r} is none of {', '.join(DRILLS)}; write --only kill,stop for two")
    found = {name: DRILLS[name].why_not(small.config, small.layout) for name in DRILLS if name in names}
    if only and (why := next(((name, why) for name, why in found.items() if why), None)):
        raise ConfigError(f"--only {why[0]}: {why[1]}")
    return found


def _print_setting(config: str, small: SmallConfig, has_plan: bool) -> None:
    model, train = small.config.model, small.config.train
    print(
        f"{config} in small: {model.num_parameters():,} parameters, {STEPS} steps of {train.global_batch_size} rows of "
        f"{train.seq_length} tokens, on {small.ranks} ranks as {small.layout}"
    )
    if changes := small.changed():
        print(f"  changed: {', '.join(changes)}")
    if not has_plan:
        print(f"  data.plan = {small.config.data.plan!r} is not there, so rows of random words are trained on")
    if small.ranks > cores():
        print(f"  {small.ranks} ranks share {cores()} cores, so times are longer than they need be")


def _outcomes(small: SmallConfig, work: Path, left_out: dict[str, str]) -> Iterator[DrillOutcome]:
    """Yields what happened in each drill, after a run to which nothing happens."""
    config = work / "config.toml"
    write(small.config, config)
    with ProcessGroup() as group:
        with _progress("undisturbed") as say:
            run = DrilledRun(config, work / "undisturbed", small.ranks, group, say)
            run.start()
            if status := max(run.wait()):
                print(run.output, file=sys.stderr)
                raise DrillError(f"the run that nothing happens to ended with status {status}")
        setting = Setting(small.config, small.layout, Numbers.of_run(run.run_dir, STEPS))
        print(f"\n{HEADER}", flush=True)
        for name, why in left_out.items():
            outcome = DrillOutcome(name, left_out=why)
            if not why:
                with _progress(name) as say:
                    run = DrilledRun(config, work / name, small.ranks, group, say)
                    try:
                        DRILLS[name].do(setting, run, outcome)
                    except DrillError as error:
                        outcome.problems.append(str(error))
                    run.end()
                    outcome.said = outcome.said.replace(f"{run.run_dir}/", "")
            yield outcome


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Callable[[str], None]]:
    """Shows on a terminal how far a drill is, and elsewhere nothing."""
    console = Console()
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status(name) as status:
        yield lambda text: status.update(f"{name}: {text}")


if __name__ == "__main__":
    entrypoint(main)
