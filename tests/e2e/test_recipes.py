"""The R1 recipe as a whole, with a tiny model: killed between and within stages, it ends with the same results."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.mixture import PlanConfig
from data_pipeline.mixture.plan_files import build_plan
from data_pipeline.tokens.store import build
from data_pipeline.tokens.tokenizer import Tokenizer
from pretrain.checkpoint import storage
from tests.e2e.posttrain_configs import VOCAB, write_base
from tests.parallel.harness import RanksOf
from tests.shards import write_shard

ROOT = Path(__file__).resolve().parents[2]
TRAINED = ["train.precision=fp32", "log.tensorboard=false", "schedule.warmup_steps=0"]
LONG = "task.max_new_tokens=160"  # the tiny tokenizer spells most letters alone
SMALL = [*TRAINED, LONG, "task.eval_prompts=8"]
BATCH = ["train.global_batch_size=16", "train.micro_batch_size=8", "train.seq_length=256"]
RL = [*SMALL, *BATCH, "train.steps=2", "rl.max_draws=1"]
SAMPLES = [LONG, "sample.problems=24", "sample.completions=2", "sample.precision=fp32", "keep.min_score=0.0"]
MORE = {
    "cold_start": [*SMALL, "train.steps=60", "train.seq_length=512", "checkpoint.every=20"],
    "reasoning_rl": [*RL, "checkpoint.every=1"],
    "chosen": SAMPLES,
    "sft": [*SMALL, "train.steps=30", "train.seq_length=512"],
    "preferences": [*TRAINED, "train.steps=3"],
    "general_rl": RL,
    "answers": SAMPLES,
    "student_base": [*TRAINED, "train.steps=3", f"model.vocab_size={VOCAB}"],
    "student": [*SMALL, "train.steps=3"],
}


@pytest.fixture(scope="module")
def base(ranks: RanksOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with an untrained model, its tokenizer, and a plan of text in rows of 256 tokens."""
    base = write_base(ranks, tmp_path_factory.mktemp("recipe"), context=256)
    prose = [{"text": "I am fine, thank you. " * 40, "id": str(i), "metadata": {}} for i in range(20)]
    write_shard(base / "prose.jsonl.zst", prose)
    for split in ("train", "heldout"):
        store = base / "tokens" / split / "prose" / "00000"
        build(base / "prose.jsonl.zst", store, Tokenizer.load(base / "tokenizer"))
    plan = PlanConfig(seq_length=256, samples=40, seed=1, weights={"prose": 1.0}, max_epochs=9)
    build_plan(base / "tokens", base / "tokenizer", base / "plan", plan)
    return base


def command(base: Path, folder: Path) -> list[str]:
    more = [f"stages.{name}.more={json.dumps(overrides)}" for name, overrides in MORE.items()]
    return [
        *(sys.executable, "-m", "cli", "recipe", "run", "configs/recipes/r1.toml"),
        *(f"dir={folder}", f"inputs.model={base}/init", f"inputs.plan={base}/plan", "ranks=1", "specimens=[]", *more),
        *(f"stages.{name}.gates=[]" for name in ("cold_start", "chosen", "preferences", "answers")),
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def record(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "recipe.json").read_text())["stages"]


def result(stage: Path) -> dict[str, str]:
    """Returns hashes of a stage's weights, or the dialogues that it kept; manifests have paths, and do not count."""
    if (stage / "dialogues.jsonl").exists():
        kept = [json.loads(line) for line in (stage / "dialogues.jsonl").read_text().splitlines()]
        return {str(i): json.dumps({**one, "model": ""}) for i, one in enumerate(kept)}
    found = storage.read_full(storage.latest(stage))
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in found.items()}


@pytest.mark.full
def test_a_recipe_that_was_killed_ends_with_the_same_results(base: Path, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    done = subprocess.run(command(base, straight), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for mark in ("cold_start/checkpoints/step_20", "chosen/sample.json", "general_rl/metrics.jsonl"):
        process = subprocess.Popen(command(base, killed), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while not (killed / mark).exists():
            assert process.poll() is None and time.monotonic() < deadline, mark
            time.sleep(0.05)
        process.kill()
        process.wait()
    done = subprocess.run(command(base, killed), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = [{name: result(folder / name) for name in MORE} for folder in (straight, killed)]
    assert results[0] == results[1]
    assert set(record(killed)) == set(MORE)
    page = (killed / "report.html").read_text()
    assert "What each result was made from" in page and "data data/recipes/sort.jsonl.gz" in page
