"""`trivium recipe run`: runs every stage of a recipe in order, from raw text to an aligned model, and checks its gates.

A recipe is a TOML file that lists the stages; `trivium demo`, which `make demo` runs, is configs/recipes/demo.toml.
Each stage runs as a subprocess and could be started by hand. Each command decides itself whether it is finished, so an
interrupted recipe continues when it is run again. At the end it prints a table, lets the trained models write, and
writes report.html; table and page are made in launch/recipe_report.py from the files that the stages wrote.
"""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from rich.console import Console

from configs.cli import command_parser, entrypoint, parse_args
from configs.files import write_atomic
from configs.folders import check_writable
from configs.loader import ConfigError, Failure, load
from configs.recipe import RecipeConfig
from configs.run_lock import locked
from configs.signals import STOPPED, status_of
from launch import tee
from launch.processes import die_with_parent
from launch.recipe_report import show, show_comparison, show_specimens, write_html
from launch.recipe_stages import RecipeStage, Specimen, check_configs, specimens_of, stages_of
from launch.recipe_stop import command_line, fails, misses

DEMO = Path("configs/recipes/demo.toml")
RECORD = "recipe.json"  # what is known of each stage: its time, what it was made from, and its result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the recipe that the command line names and returns the exit status."""
    config, args = parse_args(
        RecipeConfig,
        argv,
        prog="trivium recipe run",
        description="Runs the stages of a recipe in order; the same command again continues with what is left.",
        example="trivium recipe run configs/recipes/demo.toml --dry-run",
        options=(
            ("--until", "", "the last stage to run"),
            ("--only", "", "the one stage to run, after those before it; a job of `trivium launch --on slurm` does"),
        ),
    )
    for option, name in (("--until", args.until), ("--only", args.only)):
        if name and name not in config.stages:
            raise ConfigError(f"{option} {name} names no stage; the stages are {', '.join(config.stages)}")
    return run_recipe(config, args.dry_run, args.until, args.only)


def demo(argv: Sequence[str] | None = None) -> int:
    """Runs the demo's recipe from the repository's root and returns the exit status."""
    parser = command_parser(
        prog="trivium demo",
        description="Runs every stage from raw text to verified Hugging Face models; run again, it continues.",
        example="trivium demo --dry-run",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the stages' commands and stop")
    parser.add_argument(
        "--with-parent", action="store_true", help="end when the process that started this one is killed (Linux)"
    )
    args = parser.parse_args(argv)
    if args.with_parent:
        die_with_parent()
    if not DEMO.is_file():
        raise ConfigError(f"there is no {DEMO} here; run the demo from the root of the repository")
    return run_recipe(load(RecipeConfig, DEMO), args.dry_run)


def run_recipe(config: RecipeConfig, dry_run: bool = False, until: str = "", only: str = "") -> int:
    """Runs a recipe's stages, up to `until` or the one stage `only` if given, and returns the exit status."""
    stages = stages_of(config)
    check_configs(config, stages)
    if dry_run:
        for number, stage in enumerate(stages, 1):
            print("\n  ".join((f"{number}. {stage.title}", *planned(stage))))
        return 0
    for name, folder in config.inputs.items():
        if not Path(folder).exists():
            raise ConfigError(f"inputs.{name} = {folder!r} does not exist; make it first, or set inputs.{name}=FOLDER")
    directory = Path(config.dir)
    check_writable(directory, "dir")
    with locked(directory, take) as lock:
        if lock is None:
            raise ConfigError(
                f"another recipe is running in dir = {config.dir!r}; wait for it, stop it, or set another dir"
            )
        if until:
            return run_stages(stages[: list(config.stages).index(until) + 1], [], directory, Console(), config.title)
        return run_stages(stages, specimens_of(config, stages), directory, Console(), config.title, only)


def planned(stage: RecipeStage) -> list[str]:
    """Returns lines on what a stage will do: what it starts from, where its result goes, its gates, and its command."""
    lines = [stage.about] if stage.about else []
    begins = [f"{need.title} ({need.output})" for need in stage.needs]
    begins += [f"{name} ({folder})" for name, folder in stage.reads]
    lines += [f"from: {', '.join(begins)}"] if begins else []
    lines += [f"data: {', '.join(data)}"] if (data := stage.data()) else []
    lines += [f"gates: {'; '.join(f'{gate.metric} {gate}' for gate in stage.gates)}"] if stage.gates else []
    return [*lines, f"to: {stage.output}", f"$ {command_line(stage)}"]


def take(lock: IO[str]) -> bool:
    """Locks the file of a recipe's folder; returns whether it succeeded."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def run_stages(
    stages: Sequence[RecipeStage],
    specimens: Sequence[Specimen],
    directory: Path,
    console: Console,
    title: str = "Trivium recipe",
    only: str = "",
) -> int:
    """Runs `stages` in order, up to the first failure or missed gate, and writes their record to recipe.json.

    With `only`, it runs the stage of that name alone, for which those before it must be finished. After the last stage,
    shows the table and the models' `specimens`, and writes the page; where the recipe stops, that of the stages so far.

    Returns the exit status of the stage that failed or was interrupted, 1 after a missed gate, else 0.
    """
    began = time.monotonic()
    times = read_times(directory)
    for number, stage in enumerate(stages, 1):
        if only and stage.name != only:
            if not times.get(stage.name, {}).get("done"):
                raise ConfigError(f"--only {only}: stage {stage.name} before it is not finished; run that one first")
            continue
        console.rule(f"{number} of {len(stages)}: {stage.title}", align="left")
        log = directory / "logs" / f"{stage.name}.log"
        begin = log.stat().st_size if log.is_file() else 0
        mark, made_from, started = stage.fingerprint(), stage.made_from(), time.monotonic()
        # Unbuffered, so that lines show when they are printed; no model hub, so that nothing waits for a network.
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        status, signal = tee.run(
            [sys.executable, "-m", "launch.bootstrap", *stage.command], log, env, signals_blocked=True
        )
        seconds = time.monotonic() - started
        wrote = stage.fingerprint() != mark
        if status == 0 and not wrote and (changed := stage.changed_since(times.get(stage.name))):
            _print_stale(stage, changed, console)
            return 1
        times[stage.name] = updated(times.get(stage.name), seconds, status, wrote)
        if status == 0:
            times[stage.name] |= {"result": stage.result()} | ({"made_from": made_from} if made_from else {})
        write_atomic(directory / RECORD, json.dumps({"stages": times}, indent=1).encode())
        missed = [] if status else stage.missed_gates()
        if status or missed:
            stop = fails(stage, status, log, begin) if status else misses(stage, missed)
            console.print(f"\n{stop.what} {stop.remedy}", highlight=False, markup=False, soft_wrap=True)
            finished = stages[: number - bool(status)]
            page = write_html(title, finished, times, [], directory, stop, stages[number:])
            console.print(f"The report so far: {page}", highlight=False, markup=False, soft_wrap=True)
            return status or 1
        if only and number < len(stages):
            return 0
        if signal and number < len(stages):
            console.print(f"\nInterrupted after stage {stage.title}. Run the same command again to continue.")
            return status_of(signal)
    show(title, stages, times, console)
    show_comparison(stages, console)
    written = [write_specimen(specimen) for specimen in specimens]
    show_specimens(specimens, written, console)
    page = write_html(title, stages, times, zip(specimens, written, strict=True), directory)
    console.print(f"{time.monotonic() - began:.0f} s this time. The report, with curves: {page}", highlight=False)
    return 0


def write_specimen(specimen: Specimen) -> str:
    """Runs the specimen's command and returns what it prints. Raises Failure if the command fails."""
    command = [sys.executable, "-m", "cli", *specimen.command]
    done = subprocess.run(
        command,
        input=specimen.typed,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        preexec_fn=die_with_parent,  # a signal that ends this process leaves no command behind
    )
    if done.returncode:
        raise Failure(
            f"all stages are finished, but the specimen `{specimen}` ended with status {done.returncode}: "
            f"{done.stderr.strip()}; correct it in the recipe and run the same command again for table and page"
        )
    return done.stdout.strip()


def updated(before: dict | None, seconds: float, status: int, wrote: bool) -> dict:
    """Returns a stage's entry in recipe.json: whether it is done, and its seconds, interrupted attempts included.

    `before` is its earlier entry, `wrote` whether it wrote anything this time. A failed attempt adds no time, since its
    work is repeated. A stage that was finished already and wrote nothing keeps its entry.
    """
    seconds = seconds if status in (0, STOPPED) or status > 128 else 0.0
    if before is None:
        return {"seconds": round(seconds, 1), "done": status == 0}
    if not before["done"]:
        return {"seconds": round(before["seconds"] + seconds, 1), "done": status == 0}
    if status == 0 and not wrote:
        return before
    return {"seconds": round(seconds, 1), "done": status == 0}


def read_times(directory: Path) -> dict[str, dict]:
    """Returns the entries of recipe.json, none if there is no file. Raises Failure if the file is damaged."""
    path = directory / RECORD
    if not path.is_file():
        return {}
    try:
        stages = dict(json.loads(path.read_text(encoding="utf-8"))["stages"])
        if not all(isinstance(one["done"], bool) and one["seconds"] >= 0 for one in stages.values()):
            raise ValueError
        if not all(isinstance(one.get("made_from", {}), dict) for one in stages.values()):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise Failure(
            f"{path} is damaged (it holds the stages' times, and what each was made from); restore it, or delete it "
            "and run the recipe again, which then takes finished stages as they are"
        ) from None
    return stages


def _print_stale(stage: RecipeStage, changed: Sequence[str], console: Console) -> None:
    console.print(
        f"\nStage {stage.title} was finished before and did not run again, but {' and '.join(changed)} changed since. "
        f"Remove {stage.output} and run the same command again to repeat the stage, or undo the change.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    entrypoint(main)
