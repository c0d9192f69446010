"""Held-out accuracy on sort before and after GRPO and PPO, which start from the demo's fine-tuned model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
SEEDS = (1, 2, 3)
STEPS = {"sort": 150, "ppo": 150}


def learned(task: str, seed: int, base: Path, folder: Path) -> dict[str, Any]:
    """Trains by GRPO ("sort") or PPO ("ppo") from the run `base`; returns sampled accuracy before and after."""
    command, name = "ppo" if task == "ppo" else "grpo", "sort"
    run = folder / f"{task}_{seed}"
    keys = {
        "run.dir": run,
        "run.seed": seed,
        "init.run": base,
        "train.steps": STEPS[task],
    }
    config = ROOT / "configs" / "posttrain" / ("demo_ppo.toml" if command == "ppo" else "demo_grpo.toml")
    argv = [sys.executable, "-m", "cli", command, str(config), *(f"{key}={value}" for key, value in keys.items())]
    subprocess.run(argv, check=True, cwd=ROOT)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [line["eval"][f"{name} answers"]["sampled"] for line in lines if "eval" in line]
    before = _last_score(base, name)
    seconds = sum(line["tokens"] / line["step"] / line["tokens_per_s"] for line in lines if "tokens_per_s" in line)
    return {"task": task, "seed": seed, "before": before, "after": scores[-1], "seconds": round(seconds, 1)}


def _last_score(run: Path, name: str) -> float | None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [line["eval"].get(f"{name} answers", {}).get("sampled") for line in lines if "eval" in line]
    return scores[-1] if scores else None
