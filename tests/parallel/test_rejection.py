"""trivium sample: the same texts at any number of ranks and after an interruption, and other filters without sampling.

The model is untrained: one token in 150 ends an answer, so that some completions of random text are kept.
"""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs import signals
from configs.loader import toml
from data_pipeline.tokens.tokenizer import Tokenizer
from posttrain.chat.chat_format import ChatFormat
from posttrain.chat.dialogues import read_dialogues
from tests.parallel.harness import RanksOf
from tests.small_data import VOCAB, make_tokens

MODEL = {"vocab_size": VOCAB, "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_heads": 4,
         "num_kv_heads": 2}  # fmt: skip


@pytest.fixture(scope="module")
def base(ranks: RanksOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with an untrained model and a config."""
    base = tmp_path_factory.mktemp("rejection")
    _, tokenizer = make_tokens(base)
    config = {
        "run": {"dir": f"{base}/run"},
        "init": {"run": f"{base}/init"},
        "task": {"digits": 4, "max_new_tokens": 24},
        "sample": {"problems": 24, "completions": 4, "part": 8, "precision": "fp32"},
    }
    (base / "sample.toml").write_bytes(toml(config))
    ranks(1).run(
        "tests.parallel.workers.posttraining:save_untrained",
        process_group=False,
        run_dir=str(base / "init"),
        model=MODEL,
        tokenizer=str(tokenizer / "tokenizer.model"),
    )
    return base


def sample(ranks: RanksOf, base: Path, world: int, *overrides: str) -> dict[str, Any]:
    """Runs the command; returns its exit status and what it said, of the first rank."""
    argv = [str(base / "sample.toml"), *overrides]
    worker = "tests.parallel.workers.posttraining:command"
    return ranks(world).run(worker, process_group=False, module="posttrain.sample", argv=argv)[0]


def written(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.rglob("*.json*")}


@pytest.fixture(scope="module")
def expected(ranks: RanksOf, base: Path) -> dict[str, bytes]:
    """Files of a run on one rank."""
    done = sample(ranks, base, 1)
    assert done["status"] == 0 and "24 of 24 prompts, mean score" in done["said"]
    return written(base / "run")


def test_an_interrupted_run_goes_on_to_the_same_bytes_on_other_ranks(
    ranks: RanksOf, base: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """Makes the state after a kill -9: the parts that were written, and in place of the next one a temporary file."""
    run = f"run.dir={tmp_path}/run"
    assert sample(ranks, base, 1, run, "sample.batch_size=5")["status"] == 0
    assert written(tmp_path / "run") == expected
    for name in ("samples/part_000001.jsonl", "samples/part_000002.jsonl", "sample.json", "dialogues.jsonl"):
        (tmp_path / "run" / name).unlink()
    (tmp_path / "run/samples/.part_000001.jsonl.x").write_bytes(b"half")
    said = sample(ranks, base, 2, run)["said"]
    assert "8 of 24" not in said and "16 of 24" in said
    assert written(tmp_path / "run") == expected | {".part_000001.jsonl.x": b"half"}


@pytest.mark.full
def test_tensor_parallel_ranks_write_the_same(
    ranks: RanksOf, base: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    assert sample(ranks, base, 2, f"run.dir={tmp_path}", "parallel.tp=2")["status"] == 0
    assert written(tmp_path) == expected


@pytest.mark.full
def test_signals_and_kills_lose_at_most_a_part(ranks: RanksOf, base: Path, tmp_path: Path) -> None:
    """Kills the first process and sends the second SIGTERM, each after the first part that it has written."""
    options = ["sample.problems=150", "sample.part=2"]
    assert sample(ranks, base, 1, f"run.dir={tmp_path}/straight", *options)["status"] == 0
    command = [sys.executable, "-m", "cli", "sample", str(base / "sample.toml"), f"run.dir={tmp_path}/run", *options]
    statuses = []
    for number in (signal.SIGKILL, signal.SIGTERM):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            next(line for line in process.stdout if re.search(r": \d+ of 150 prompts", line))
            process.send_signal(number)
            said = process.stdout.read()
        statuses.append(process.returncode)
    assert statuses == [-signal.SIGKILL, signals.STOPPED] and "stopped by SIGTERM; the same command goes on" in said
    assert 2 <= len(list((tmp_path / "run/samples").glob("part_*"))) < 75
    assert sample(ranks, base, 1, f"run.dir={tmp_path}/run", *options)["status"] == 0
    assert written(tmp_path / "run") == written(tmp_path / "straight")


def test_the_dialogues_are_what_fine_tuning_reads(base: Path, expected: dict[str, bytes]) -> None:
    chat = ChatFormat(Tokenizer.load(base / "tokenizer"))
    lines = [json.loads(line) for line in expected["dialogues.jsonl"].splitlines()]
    found = read_dialogues([str(base / "run/dialogues.jsonl")], chat, 64, heldout_share=0.0, max_bad_share=0.0)
    assert len(found.train) == len(lines) > 3 and [one.id for one in found.train] == [line["id"] for line in lines]
    record = json.loads(expected["sample.json"])
    assert sum(reason["number"] for reason in record["set_aside"].values()) + len(lines) == 24 * 4
    assert {line["model"] for line in lines} == {record["drawn"]["model"]["sha256"]}


def test_other_filters_choose_from_the_same_samples(ranks: RanksOf, base: Path, expected: dict[str, bytes]) -> None:
    parts = sorted((base / "run/samples").iterdir())
    times = [path.stat().st_mtime_ns for path in parts]
    done = sample(ranks, base, 1, "keep.min_score=1.0")
    assert done["status"] == 1 and "none of 96 samples is kept" in done["said"]
    done = sample(ranks, base, 1, "keep.per_prompt=1", "keep.max_tokens=12")
    assert done["status"] == 0 and [path.stat().st_mtime_ns for path in parts] == times
    shorter = [json.loads(line) for line in (base / "run/dialogues.jsonl").read_bytes().splitlines()]
    assert 0 < len(shorter) == len({line["prompt_id"] for line in shorter})
    assert sample(ranks, base, 1)["status"] == 0 and written(base / "run") == expected
    refused = sample(ranks, base, 1, "run.seed=5")
    assert refused["status"] == 2 and "seed 1234 -> 5" in refused["error"]


def test_a_folder_of_a_training_run_and_wrong_ranks_are_refused(ranks: RanksOf, base: Path) -> None:
    refused = sample(ranks, base, 1, f"run.dir={base}/init")
    assert refused["status"] == 2 and "holds the checkpoints of a training run" in refused["error"]
    refused = sample(ranks, base, 1, "parallel.tp=2", f"run.dir={base}/none")
    assert refused["status"] == 2 and "does not divide the 1 ranks" in refused["error"]
    refused = sample(ranks, base, 1, "keep.min_rewards.form=1.0", f"run.dir={base}/none")
    assert refused["status"] == 2 and "has no rewards by name" in refused["error"]
