"""Trivium's GRPO beside TRL's `GRPOTrainer`: the same task, model, settings and cores.

TRL is installed into an environment of its own below the benchmark's folder, which sees the packages of this one (torch
and transformers among them). Where it cannot be installed or does not run with them, the result says so. Each side
takes as many steps as the other from the same weights; rates leave out the first steps.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from posttrain.tasks.sorting import SortTask
from tests.bench.environment import NoPeer, environment_of
from tests.bench.rl.learning import ROOT, Runs

STEPS, WARM = 30, 5
PROMPTS, GROUP, LONGEST = 16, 16, 6
WANTED = 3.0  # times the steps a minute


def contest(runs: Runs) -> Iterator[dict[str, Any]]:
    """Yields the steps a minute and the reward of each side's steps."""
    python = environment_of("TRL", runs.folder / "trl_environment", ["trl"], "from trl import GRPOTrainer")
    exported = _exported(runs)
    ours = runs.train(
        "peer_trivium", "grpo", "demo_grpo.toml", init__run=runs.fine_tuned, train__steps=STEPS, rl__max_draws=1
    )
    seconds = [tokens / rate for tokens, rate in zip(_tokens(ours.run), ours.curve("tokens_per_s"), strict=True)]
    theirs = _trl(python, exported, runs.folder)
    minutes = {"Trivium": sum(seconds[WARM:]) / 60, "TRL": sum(theirs["seconds"][WARM:]) / 60}
    rates = {who: (STEPS - WARM) / spent for who, spent in minutes.items()}
    rewards = {"Trivium": ours.curve("reward"), "TRL": theirs["rewards"]}
    for who in rates:
        ratio = rates["Trivium"] / rates["TRL"] if who == "Trivium" else 1.0
        yield {
            "what": who if who == "Trivium" else f"TRL {theirs['version']}",
            "steps_per_minute": round(rates[who], 1),
            "ratio": round(ratio, 2),
            "rewards": [round(sum(rewards[who][i : i + 5]) / 5, 3) for i in range(0, STEPS, 5)],
            "wanted": f"{WANTED:.0f} times the steps" if who == "Trivium" else "",
            "met": who != "Trivium" or ratio >= WANTED,
        }


def _tokens(run: Path) -> list[float]:
    """Returns the tokens of every step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    totals = [0.0, *(line["tokens"] for line in lines if "tokens_per_s" in line)]
    return [after - before for before, after in pairwise(totals)]


def _exported(runs: Runs) -> Path:
    folder = runs.folder / "peer_model"
    if not folder.exists():
        argv = [sys.executable, "-m", "cli", "export", "configs/export/demo.toml"]
        argv += [f"run={runs.fine_tuned}", f"out={folder}"]
        with open(runs.folder / "peer_export.log", "wb") as log:
            subprocess.run(argv, cwd=ROOT, check=True, stdout=log, stderr=log)
    return folder


def _trl(python: Path, model: Path, folder: Path) -> dict[str, Any]:
    task, out = SortTask(4, LONGEST), folder / "peer_trl.json"
    prompts = [task.problem(1234, "train", i).prompt for i in range(STEPS * PROMPTS)]
    (folder / "peer_prompts.json").write_text(json.dumps(prompts))
    settings = {"model": str(model), "prompts": str(folder / "peer_prompts.json"), "out": str(out)}
    settings |= {"steps": STEPS, "batch": PROMPTS * GROUP, "group": GROUP, "longest": LONGEST}
    worker = Path(__file__).with_name("peer_worker.py")
    with open(folder / "peer_trl.log", "wb") as log:
        done = subprocess.run([str(python), str(worker), json.dumps(settings)], cwd=folder, stdout=log, stderr=log)
    if done.returncode:
        raise NoPeer(f"TRL's trainer ended with status {done.returncode}; see {log.name}")
    found: dict[str, Any] = json.loads(out.read_text())
    return found
