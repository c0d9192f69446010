"""Runs `trivium train` on a small plan to its end, and again in two parts, which must repeat the same numbers."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.gpu import common
from tests.small_training import write_config

STEPS, FIRST = 6, 3
# The reductions of some GPU kernels add in any order; a resumed run that repeats the numbers to this is right.
CLOSE = 1e-3


def part(args: argparse.Namespace) -> dict[str, Any]:
    folder = args.result.parent / "train"
    folder.mkdir(parents=True)
    whole, parts = folder / "whole", folder / "parts"
    config = write_config(folder, STEPS, whole, rows=64)
    _train(config)
    _train(config, f"run.dir={parts}", f"train.steps={FIRST}", f"schedule.steps={STEPS}")
    _train(config, f"run.dir={parts}", f"schedule.steps={STEPS}")
    expected, found = (_losses(run) for run in (whole, parts))
    if len(expected) != STEPS or len(found) != STEPS:
        raise RuntimeError(f"{STEPS} steps were asked for, and the runs logged {len(expected)} and {len(found)}")
    apart = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
    if not apart <= CLOSE:
        raise RuntimeError(f"after resuming, losses are {found[FIRST:]}, and without a stop {expected[FIRST:]}")
    return {"losses": expected, "largest_difference": apart}


def _train(config: Path, *overrides: str) -> None:
    command = [sys.executable, "-m", "cli", "train", str(config), "train.precision=auto", *overrides]
    if subprocess.run(command).returncode:
        raise RuntimeError(f"{' '.join(command[2:])} failed; its output is in train.log")


def _losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


if __name__ == "__main__":
    sys.exit(common.run(part))
