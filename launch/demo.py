"""`trivium demo`, which `make demo` runs: every stage from raw text to verified Hugging Face models, in order.

`STAGES` lists the commands; each runs as a subprocess and could be started by hand. Each command decides itself whether
it is finished, so an interrupted demo continues when it is run again. At the end it prints a table, lets the trained
models write (`SPECIMENS`), and writes runs/demo/report.html; table and page are made in launch/demo_report.py from the
files that the stages wrote.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from configs.cli import command_parser, entrypoint
from configs.files import write_atomic
from configs.folders import check_writable
from configs.loader import ConfigError
from configs.signals import STOPPED, status_of
from launch import tee
from launch.demo_report import (
    DemoStage,
    Specimen,
    describe_baselines,
    describe_data,
    describe_export,
    describe_training,
    show,
    show_comparison,
    show_specimens,
    write_html,
)
from launch.processes import die_with_parent

DIRECTORY = Path("runs/demo")
RANKS = 2
PROMPT = "It was a quiet morning, and the"


def _training(name: str, module: str, config: str, title: str, begins_with: DemoStage) -> DemoStage:
    command = ("launch.ranks", "--nproc-per-node", str(RANKS), module, config)
    return DemoStage(name, title, command, DIRECTORY / name, "metrics.jsonl", describe_training, (begins_with,))


def _export(name: str, title: str) -> DemoStage:
    run, out = DIRECTORY / name, DIRECTORY / "export" / name
    command = ("export.huggingface", "configs/export/demo.toml", f"run={run}", f"out={out}")
    return DemoStage(f"export_{name}", f"export {title}", command, out, "trivium_export.json", describe_export)


_DATA = DemoStage(
    "data",
    "data",
    ("data_pipeline.run", "configs/data/demo.toml"),
    DIRECTORY / "data",
    "plan/plan.json",
    describe_data,
)
_BASELINES = DemoStage(
    "baselines",
    "xz and 5-gram",
    ("data_pipeline.report.baselines", "configs/data/demo.toml"),
    DIRECTORY / "data",
    "baselines.json",
    describe_baselines,
)
_DENSE = _training("pretrain", "pretrain.train", "configs/pretrain/demo.toml", "pretrain, dense", _DATA)
_MOE = _training("pretrain_moe", "pretrain.train", "configs/pretrain/demo_moe.toml", "pretrain, MoE", _DATA)
_SFT = _training("sft", "posttrain.sft", "configs/posttrain/demo_sft.toml", "SFT", _DENSE)
_GRPO = _training("grpo", "posttrain.grpo", "configs/posttrain/demo_grpo.toml", "GRPO", _SFT)
STAGES = (
    *(_DATA, _BASELINES, _DENSE, _MOE, _SFT, _GRPO),
    _export("pretrain", "dense"),
    _export("pretrain_moe", "MoE"),
    _export("sft", "SFT"),
    _export("grpo", "GRPO"),
)
_SAMPLING = ("--max-new-tokens", "48", "--temperature", "0.7", "--top-p", "0.9")
SPECIMENS = (
    Specimen(("generate", str(_DENSE.output), "--prompt", PROMPT, *_SAMPLING)),
    Specimen(("chat", str(_GRPO.output), "--temperature", "0"), "Sort 5291"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo from the repository's root. Returns the exit status of the stage that failed, else 0."""
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
    if args.dry_run:
        for stage in STAGES:
            print(f"{stage.title:<18}{command_line(stage)}")
        return 0
    if not Path("configs/data/demo.toml").is_file():
        raise ConfigError("there is no configs/data/demo.toml here; run the demo from the root of the repository")
    check_writable(DIRECTORY, "the demo's folder")
    return run_stages(STAGES, SPECIMENS, DIRECTORY, Console())


def run_stages(stages: Sequence[DemoStage], specimens: Sequence[Specimen], directory: Path, console: Console) -> int:
    """Runs `stages` in order, up to the first failure, and writes their times to `directory`/demo.json.

    After the last stage, shows the table and the models' `specimens`, and writes the page.

    Returns the exit status of the stage that failed or was interrupted, else 0.
    """
    began = time.monotonic()
    times = read_times(directory)
    for number, stage in enumerate(stages, 1):
        console.rule(f"{number} of {len(stages)}: {stage.title}", align="left")
        log = directory / "logs" / f"{stage.name}.log"
        mark, made_from, started = stage.fingerprint(), stage.made_from(), time.monotonic()
        # Unbuffered, so that lines show when they are printed; no model hub, so that nothing waits for a network.
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        status, signal = tee.run(
            [sys.executable, "-m", "launch.bootstrap", *stage.command], log, env, signals_blocked=True
        )
        seconds = time.monotonic() - started
        wrote = stage.fingerprint() != mark
        if status == 0 and not wrote and (changed := _changed(times.get(stage.name), made_from)):
            _print_stale(stage, changed, console)
            return 1
        times[stage.name] = updated(times.get(stage.name), seconds, status, wrote)
        if status == 0 and made_from:
            times[stage.name]["made_from"] = made_from
        write_atomic(directory / "demo.json", json.dumps({"stages": times}, indent=1).encode())
        if status:
            _print_failure(stage, status, log, console)
            return status
        if signal and number < len(stages):
            console.print(f"\nInterrupted after stage {stage.title}. Run the same command again to continue.")
            return status_of(signal)
    show(stages, times, console)
    show_comparison(stages, console)
    written = [write_specimen(specimen) for specimen in specimens]
    show_specimens(specimens, written, console)
    page = write_html(stages, times, zip(specimens, written, strict=True), directory)
    console.print(f"{time.monotonic() - began:.0f} s this time. The report, with curves: {page}", highlight=False)
    return 0


def write_specimen(specimen: Specimen) -> str:
    """Runs the specimen's command and returns what it prints. Raises ChildProcessError if the command fails."""
    command = [sys.executable, "-m", "cli", *specimen.command]
    done = subprocess.run(
        command, input=specimen.typed, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        raise ChildProcessError(f"`{specimen}` ended with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout.strip()


def updated(before: dict | None, seconds: float, status: int, wrote: bool) -> dict:
    """Returns a stage's entry in demo.json: whether it is done, and the seconds it took, interrupted attempts included.

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
    """Returns the entries of demo.json, none if there is no file. Raises ValueError if the file is damaged."""
    path = directory / "demo.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["stages"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged (it holds the stages' times); delete it and run the demo again") from None


def command_line(stage: DemoStage) -> str:
    """Shell command that runs the stage alone."""
    python = os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable
    return shlex.join([python, "-m", *stage.command])


def _changed(before: dict | None, made_from: Mapping[str, str | None]) -> list[str]:
    """Names of the inputs of a finished stage that have changed since it ran."""
    known = (before or {}).get("made_from", made_from)
    return [name for name, value in made_from.items() if known.get(name) != value]


def _print_stale(stage: DemoStage, changed: Sequence[str], console: Console) -> None:
    console.print(
        f"\nStage {stage.title} was finished before and did not run again, but {' and '.join(changed)} changed since. "
        f"Remove {stage.output} and run the demo again to repeat the stage, or undo the change.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _print_failure(stage: DemoStage, status: int, log: Path, console: Console) -> None:
    if status in (STOPPED, 129, 130, 143):  # the last three: SIGHUP, SIGINT, SIGTERM
        console.print(
            f"\nInterrupted in stage {stage.title}. Run the same command again: finished stages are skipped, and "
            "this one continues from what it has saved.",
            highlight=False,
        )
        return
    console.print(
        f"\nStage {stage.title} failed with exit status {status}.\n  its output: {log}\n"
        f"  to run it alone: {command_line(stage)}\nAfter fixing it, run the demo again: it continues with this stage.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    entrypoint(main)
