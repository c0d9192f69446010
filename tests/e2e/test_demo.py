"""The whole demo, from the committed corpus to four verified models: killed once, then run to its end.

It takes as long as `make demo`. Exact numbers are tested by the tests of each part; this one asserts that numbers
exist, that stages come in order and that training improves the models.
"""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest

from configs.loader import load
from configs.recipe import RecipeConfig
from data_pipeline.mixture.rows import Plan
from data_pipeline.tokens.store import SourceStores
from data_pipeline.tokens.tokenizer import Tokenizer
from launch.recipe import DEMO
from launch.recipe_stages import stages_of

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 45 * 60
pytestmark = pytest.mark.full


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A directory with the repository's configs and data, for the demo's runs."""
    for name in ("configs", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def start(workplace: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cli", "demo"],
        cwd=workplace,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def trivium(workplace: Path, *arguments: str) -> str:
    """Returns the output of a trivium command, which must succeed."""
    command, environment = [sys.executable, "-m", "cli", *arguments], {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, check=True).stdout


def lines(path: Path) -> list[dict]:
    whole = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in whole if line.endswith("\n")]


def sampled_accuracy(run: Path) -> float:
    """Returns the accuracy on held-out prompts, by sampling, at the end of a run."""
    evaluations = [record["eval"] for record in lines(run / "metrics.jsonl") if "eval" in record]
    return evaluations[-1]["sort answers"]["sampled"]


def entropy_of_frequencies(data: Path) -> float:
    """Returns the loss, in nats per token, of a model that predicts each token by its frequency in the mixture."""
    plan = json.loads((data / "plan/plan.json").read_text())
    share = np.zeros(Tokenizer.load(data / "tokenizer").vocab_size)
    for source, weight in plan["weights"].items():
        stores = SourceStores.in_folder(data / "tokens/train" / source).stores
        ids = np.concatenate([store.tokens(document) for store in stores for document in range(len(store))])
        share += weight * np.bincount(ids, minlength=len(share)) / len(ids)
    share = share[share > 0] / sum(plan["weights"].values())
    return float(-(share * np.log(share)).sum())


def check_held_out_text(runs: Path) -> None:
    """Asserts that the dense model was measured on all held-out text, and needs fewer bits than xz but for code."""
    config = tomllib.loads((ROOT / "configs/pretrain/demo.toml").read_text())
    plan = Plan.open(runs / "data/plan")
    assert max(plan.heldout_rows(source) for source in plan.sources) <= config["eval"]["rows"]
    baselines = json.loads((runs / "data/baselines.json").read_text())["sources"]
    evaluations = [record["eval"] for record in lines(runs / "pretrain/metrics.jsonl") if "eval" in record]
    for source in ("english", "web", "chinese"):
        assert evaluations[-1][source]["bits_per_byte"] < baselines[source]["xz"], source


def test_the_demo_survives_a_kill_and_ends_with_verified_models(workplace: Path) -> None:
    runs = workplace / "runs" / "demo"
    process = start(workplace)
    deadline = time.monotonic() + LIMIT_SECONDS
    while len(lines(runs / "pretrain" / "metrics.jsonl")) < 20:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)

    process = start(workplace)
    output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, output[-4000:]
    assert f"{load(RecipeConfig, ROOT / DEMO).specimens[0].command[3]} " in output and (runs / "report.html").is_file()
    assert "Bits per byte of the held-out text" in output
    frequencies = entropy_of_frequencies(runs / "data")
    for name in ("pretrain", "pretrain_moe", "sft", "grpo"):
        steps = [record for record in lines(runs / name / "metrics.jsonl") if "loss" in record]
        assert [record["step"] for record in steps] == list(range(1, len(steps) + 1)), name
        assert (runs / name / "report.html").is_file()
        assert "checks" in json.loads((runs / "export" / name / "trivium_export.json").read_text())
        if name.startswith("pretrain"):
            assert steps[-1]["loss"] < frequencies < steps[0]["loss"], name
    check_held_out_text(runs)
    before, after = (sampled_accuracy(runs / name) for name in ("sft", "grpo"))
    assert before >= 0.6
    assert after >= before + 0.10, "the same held-out prompts and draws, so the noise of 256 answers is partly shared"

    marks = {
        stage.name: (workplace / stage.output / stage.mark).read_bytes()
        for stage in stages_of(load(RecipeConfig, ROOT / DEMO))
    }
    for kind, command in (("data", "data run"), *((name, name) for name in ("train", "sft", "grpo", "export"))):
        printed = trivium(workplace, "config", "--new", "pretrain" if kind == "train" else kind)
        (workplace / "mine.toml").write_text(printed)
        assert "runs/mine" in trivium(workplace, *command.split(), "mine.toml", "--dry-run")

    times = (runs / "recipe.json").read_bytes()
    process = start(workplace)
    output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, output[-4000:]
    assert marks == {
        stage.name: (workplace / stage.output / stage.mark).read_bytes()
        for stage in stages_of(load(RecipeConfig, ROOT / DEMO))
    }
    assert (runs / "recipe.json").read_bytes() == times
