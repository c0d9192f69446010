"""Parts of the benchmark in which a model learns: what it could before and after, on problems that it has not seen.

Every part runs `trivium`'s own commands on two ranks, with a config of `configs/posttrain` and the keys below. Before
and after are measured on the same held-out problems; `seconds` is the wall time of the whole command that is judged.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs" / "posttrain"
SEEDS = (1, 2, 3)
RANKS = 2

RARELY = {"eval.rows": 4, "eval.every": 1000, "checkpoint.every": 1000}
ON_TASK = {"data.dialogues": "[]", **RARELY}  # fine-tuning on the task alone
COUNTDOWN = {"task.kind": "countdown", "task.digits": 3, "task.max_new_tokens": 8}


@dataclass(frozen=True)
class Runs:
    """A folder to write runs to, the demo's runs that they start from, and the seeds of parts that have several."""

    folder: Path
    pretrained: Path
    fine_tuned: Path
    seeds: tuple[int, ...] = SEEDS

    def train(self, name: str, command: str, config: str, **keys: Any) -> "Trained":
        """Runs a command anew, with config keys spelt with two underscores for a dot."""
        run = self.folder / name
        shutil.rmtree(run, ignore_errors=True)
        settings = {"run.dir": run, **{key.replace("__", "."): value for key, value in keys.items()}}
        argv = [sys.executable, "-m", "launch.ranks", "--nproc-per-node", str(RANKS), command, str(CONFIGS / config)]
        started = time.perf_counter()
        with open(self.folder / f"{name}.log", "wb") as log:
            pairs = [f"{key}={str(value).lower() if value is True else value}" for key, value in settings.items()]
            done = subprocess.run([*argv, *pairs], cwd=ROOT, stdout=log, stderr=log)
        if done.returncode:
            raise RuntimeError(f"trivium {command} ended with status {done.returncode}; see {log.name}")
        return Trained(run, time.perf_counter() - started)


@dataclass(frozen=True)
class Trained:
    """A finished run with its wall time."""

    run: Path
    seconds: float

    def evaluated(self, part: str, metric: str, number: int = -1) -> float:
        """Returns a metric of an evaluation, the last one if no other number is given."""
        found = [line["eval"] for line in self._lines() if "eval" in line]
        return float(found[number][part][metric])

    def curve(self, metric: str) -> list[float]:
        """Returns a metric of every step."""
        return [float(line[metric]) for line in self._lines() if metric in line]

    def _lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]


def _record(what: str, before: float, after: float, wanted: str, met: bool, seconds: float) -> dict[str, Any]:
    numbers = {"before": round(before, 3), "after": round(after, 3)}
    return {"what": what, **numbers, "wanted": wanted, "met": met, "seconds": round(seconds, 1)}


def _answers(trained: Trained, task: str, number: int = -1, how: str = "sampled") -> float:
    """Returns the share of held-out problems that are answered right, "sampled" or "greedy", at evaluation `number`."""
    return trained.evaluated(f"{task} answers", how, number)


def sort(runs: Runs) -> Iterator[dict[str, Any]]:
    """Trains GRPO on sorting four digits, with each seed."""
    for seed in runs.seeds:
        keys = {"init__run": runs.fine_tuned, "run__seed": seed}
        run = runs.train(f"sort_{seed}", "grpo", "demo_grpo.toml", **keys)
        before, after = _answers(run, "sort", 0), _answers(run, "sort")
        met = after >= before + 0.1 and run.seconds <= 180
        yield _record(f"seed {seed}", before, after, "sampled +.10 in 3 minutes", met, run.seconds)


def countdown(runs: Runs) -> Iterator[dict[str, Any]]:
    """Trains GRPO on countdown after fine-tuning on the form alone, with dynamic sampling and each seed."""
    task = {key.replace(".", "__"): value for key, value in COUNTDOWN.items()}
    for seed in runs.seeds:
        keys = {"init__run": runs.pretrained, "run__seed": seed, **task, **_plain(COUNTDOWN_SFT)}
        form = runs.train(f"countdown_{seed}_sft", "sft", "demo_sft.toml", **keys)
        keys = {"init__run": form.run, "run__seed": seed, **task, **_plain(COUNTDOWN_GRPO)}
        run = runs.train(f"countdown_{seed}", "grpo", "demo_grpo.toml", **keys)
        before, after = _answers(run, "countdown", 0), _answers(run, "countdown")
        yield _record(f"seed {seed}", before, after, "twice, two seeds of three", after >= 2 * before, run.seconds)


# So many steps that completions have the right form and mostly the right digits; results are left to chance.
COUNTDOWN_SFT = {"train.steps": 500, "task.demonstrations": 40000, **ON_TASK}
COUNTDOWN_GRPO = {
    "train.steps": 250,
    "train.seq_length": 32,
    "rl.max_draws": 4,
    "optimizer.lr": 2e-3,  # few of the drawn answers are right, so gradients are small
    "eval.every": 1000,
    "checkpoint.every": 1000,
}


def ppo(runs: Runs) -> Iterator[dict[str, Any]]:
    """Trains PPO with a critic on sorting."""
    run = runs.train("ppo", "ppo", "demo_ppo.toml", init__run=runs.fine_tuned, run__seed=1)
    before, after = _answers(run, "sort", 0), _answers(run, "sort")
    yield _record("seed 1", before, after, "sampled +.05", after >= before + 0.05, run.seconds)


def dpo(runs: Runs) -> Iterator[dict[str, Any]]:
    """Trains DPO on pairs of a right and a wrong answer to sorting."""
    after = runs.train("dpo", "dpo", "demo_dpo.toml", init__run=runs.fine_tuned)
    score = after.evaluated("preferences", "accuracy")
    yield _record("held-out pairs", 0.5, score, "over .9", score > 0.9, after.seconds)


def rm(runs: Runs) -> Iterator[dict[str, Any]]:
    """Trains a reward model on pairs of a right and a wrong answer to sorting."""
    after = runs.train("rm", "rm", "demo_rm.toml", init__run=runs.fine_tuned)
    score = after.evaluated("pairs", "accuracy")
    yield _record("held-out pairs", 0.5, score, "over .9", score > 0.9, after.seconds)


def lora(runs: Runs) -> Iterator[dict[str, Any]]:
    """Fine-tunes on sorting, all weights and by LoRA, a model that knows how dialogues are written.

    Gains are compared in the likeliest answers. Sampled ones also depend on how sure the model is, and the norm and the
    head that limit this are frozen under LoRA.
    """
    talks = {"train__steps": 100, "task__demonstrations": 0, **_plain(RARELY)}
    base = runs.train("lora_base", "sft", "demo_sft.toml", init__run=runs.pretrained, **talks).run
    gains: dict[str, float] = {}
    ways: dict[str, dict[str, Any]] = {"all weights": {}, "LoRA": LORA}
    for name, more in ways.items():
        keys = {"init__run": base, "eval__at_start": True, **_plain(ON_TASK), **_plain(more)}
        run = runs.train(f"lora_{name.split()[0].lower()}", "sft", "demo_sft.toml", **keys)
        for how in ("greedy", "sampled"):
            before, after = _answers(run, "sort", 0, how), _answers(run, "sort", -1, how)
            is_judged = bool(more) and how == "greedy"
            if how == "greedy":
                gains[name] = after - before
            met = not is_judged or gains[name] >= 0.9 * gains["all weights"]
            wanted = ".9 of the gain of all weights" if is_judged else ""
            yield _record(f"{name}, {how}", before, after, wanted, met, run.seconds)


LORA = {"adapter.kind": "lora", "adapter.rank": 32, "adapter.alpha": 64.0}


def _plain(keys: dict[str, Any]) -> dict[str, Any]:
    return {key.replace(".", "__"): value for key, value in keys.items()}


PARTS = {"sort": sort, "countdown": countdown, "ppo": ppo, "dpo": dpo, "rm": rm, "lora": lora}
