"""Saving in the background: how long the step loop waits, full disks, signals, and deletion of old checkpoints."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from configs.checkpoints import CheckpointConfig
from pretrain.checkpoint import storage
from pretrain.checkpoint.saving import Saver
from pretrain.proof.recorded_step import packed_rows
from tests.parallel.forks import REPOSITORY, Forks
from tests.parallel.harness import RanksOf
from tests.parallel.matrix import MODELS
from tests.parallel.runs import assert_same_state, metrics, train
from tests.parallel.workers.layouts import GLOBAL_BATCH, SEQ_LENGTH

SLOW = 0.5  # seconds: tens of copies of these models
IN_OWN_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")


def test_a_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {"weight/a": torch.randn(7), "exp_avg/ü": torch.randn(2, 3), "weight/none": torch.empty(0)}
    size, digest = storage._write_tensors(tmp_path / "x.safetensors", tensors)
    again = load_file(tmp_path / "x.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)
    content = (tmp_path / "x.safetensors").read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (size, digest)


def slow(ranks: RanksOf, world: int, run_dir: Path, steps: int, **options: Any) -> list[dict[str, Any]]:
    options = {"seconds": SLOW, "model": MODELS["dense"], "steps": steps, "run_dir": str(run_dir), **options}
    return ranks(world).run("tests.parallel.workers.training:train_on_slow_disk", process_group=False, **options)


@pytest.mark.parametrize("world", [1, 2])
def test_training_goes_on_while_a_checkpoint_of_before_is_written(ranks: RanksOf, tmp_path: Path, world: int) -> None:
    straight, run = tmp_path / "straight", tmp_path / "run"
    train(ranks(world), straight, "dense", {}, steps=4, keep=9)
    answers = slow(ranks, world, run, steps=4)
    for answer in answers:
        assert answer["seen"][2:4] == [{"saved": [], "writing": True}] * 2, "steps 3 and 4 ran beside the save of 2"
    said = answers[0]["said"]
    assert "copied in " in said and f"saved {storage.directory(run, 2)} in " in said
    waited = re.search(r"waited (.*) s for the checkpoint before", said)
    assert waited is not None, "the save of step 4 waited, and said so"
    for step in (2, 4):  # their weights are those of their step, although training went on while they were written
        assert_same_state(storage.directory(straight, step), storage.directory(run, step))
        trained = packed_rows(0, step * GLOBAL_BATCH, MODELS["dense"]["vocab_size"], SEQ_LENGTH)
        used = [sum(int(row.loss_mask.sum()) for row in trained if row.source == source) for source in range(2)]
        assert list(storage.read_manifest(storage.directory(run, step))["ledger"].values()) == used
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    copies = {line["step"]: line["save_copy_s"] for line in logged if "save_copy_s" in line}
    assert list(copies) == [2, 4] and all(0 <= seconds < float(waited[1]) for seconds in copies.values())


def test_a_save_in_flight_is_finished_though_training_failed(ranks: RanksOf, tmp_path: Path) -> None:
    (answer,) = slow(ranks, 1, tmp_path, steps=4, fail_on_rank=0)
    assert answer["error"] == "the node went away"
    assert storage.latest(tmp_path) == storage.directory(tmp_path, 2)


def test_the_last_ones_and_multiples_of_keep_every_are_kept(ranks: RanksOf, tmp_path: Path) -> None:
    train(ranks(1), tmp_path, "dense", {}, steps=8, every=1, keep=2, keep_every=3)
    assert storage.steps(tmp_path) == [3, 6, 7, 8]


def test_a_damaged_checkpoint_ahead_does_not_cost_the_one_just_saved(ranks: RanksOf, tmp_path: Path) -> None:
    train(ranks(1), tmp_path, "dense", {}, steps=6, every=2, keep=9)
    (storage.directory(tmp_path, 6) / "rank_00000.safetensors").write_bytes(b"torn")
    (answer,) = train(ranks(1), tmp_path, "dense", {}, steps=9, every=1, keep=1, fail_at=5)
    assert answer["error"] == "the node went away"
    assert storage.latest(tmp_path) == storage.directory(tmp_path, 5)
    assert train(ranks(1), tmp_path, "dense", {}, steps=7, every=1, keep=2) == [{"status": 0}]
    assert [storage.verify(storage.directory(tmp_path, step))["step"] for step in storage.steps(tmp_path)] == [6, 7]


def test_a_folder_that_is_moved_in_the_middle_of_a_run_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    saver = Saver.__new__(Saver)
    saver.run_dir, saver.say, saver.config = tmp_path, said.append, CheckpointConfig()
    saver._copy_seconds, saver._mirroring = 0.0, None
    saver._report(1, tmp_path, None, 0.0)
    assert "was moved or removed in the middle of the run, and a folder without its other files was made" in said[1]
    (tmp_path / ".lock").touch()
    saver._report(2, tmp_path, None, 0.0)
    assert len(said) == 3


def test_a_rank_that_cannot_write_costs_one_checkpoint(ranks: RanksOf, tmp_path: Path) -> None:
    options = {"process_group": False, "model": MODELS["dense"], "rank": 1, "run_dir": str(tmp_path)}
    small = "tests.parallel.workers.training:train_on_small_disk"
    answers = ranks(2).run(small, limits={"2": 10_000, "3": 10_000_000}, **options)
    assert [answer["status"] for answer in answers] == [0, 0]
    path = storage.temporary_name(storage.directory(tmp_path, 3))
    reason = f"no checkpoint of step 3: rank 1 could not write {path}: File too large; earlier ones are untouched"
    assert reason in answers[0]["said"] and answers[1]["said"] == ""
    assert "saved" in answers[0]["said"] and storage.steps(tmp_path) == [5, 6]
    assert not path.exists()


@pytest.mark.skipif(
    subprocess.run([*IN_OWN_NAMESPACE, "true"], capture_output=True).returncode != 0,
    reason="this system lets no user mount a file system of his own",
)
def test_a_full_disk(forks: Forks, tmp_path: Path) -> None:
    """Trains on a file system of 3 MB that is full, has room again, and is full at the end; then once more."""
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.mkdir()
    options = {"run_dir": str(disk / "run"), "model": MODELS["dense"]}
    again = {**options, "parallel": {}, "steps": 6, "every": 1, "keep": 1}
    runs = [{**options, "function": "train_on_full_disk"}, again]
    alone = "tests.parallel.kills:train_on_own_disk"
    ranks = forks.start(alone, log, disk=str(disk), mebibytes=3, size=2, runs=runs, log=str(log))
    status = ranks.wait(150)
    ranks.kill()
    said = log.read_text()
    assert [line for line in said.splitlines() if line.startswith("{'status': ")] == [
        *["{'status': 1}"] * 2,
        *["{'status': 0}"] * 2,
    ], said
    seen = [json.loads(line.partition("seen: ")[2]) for line in said.splitlines() if line.startswith("seen: ")]
    for step in (3, 4, 6):
        assert f"no checkpoint of step {step}: rank " in said and f"/.step_{step}: No space left on device" in said
    # The last whole checkpoint stays, temporary files are removed, and training went on.
    assert seen[0] == {"checkpoints": ["step_2"], "steps": [1, 2, 3, 4]}
    assert "/step_5 in" in said, "with room again, the next save succeeds"
    assert seen[1] == {"checkpoints": ["step_5"], "steps": [1, 2, 3, 4, 5, 6]}
    assert "error: the checkpoint of step 6 could not be written" in said and "Traceback" not in said
    # The remedy: with room again, the same command saves it.
    assert "free disk space and run the same command again" in said
    assert status == 0 and "/step_6 in" in said.partition("run the same command again")[2]


@pytest.mark.full
def test_signals_through_the_launcher(ranks: RanksOf, tmp_path: Path) -> None:
    """Ends runs by SIGUSR1 with status 75 and by Ctrl-C with 130, each with a checkpoint, and one undisturbed."""
    straight, run = tmp_path / "straight", tmp_path / "run"
    steps = 40
    train(ranks(2), straight, "dense", {}, steps=steps, every=1000)
    options = {"run_dir": str(run), "model": MODELS["dense"], "steps": steps, "every": 1000}
    for number, status in ((signal.SIGUSR1, 75), (signal.SIGINT, 130)):
        before = (storage.steps(run) or [0])[-1]
        process = subprocess.Popen(
            launched(options), cwd=REPOSITORY, env=environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            wait_for_step(run, before + 3)
            process.send_signal(number)
            output, _ = process.communicate(timeout=150)
        finally:
            process.kill()
        assert process.returncode == status, output
        at = storage.steps(run)[-1]
        assert before + 3 <= at < steps and metrics(run)[-1]["step"] == at
        assert f"stopped by {number.name} at step {at}; the same command goes on" in output
    assert train(ranks(2), run, "dense", {}, steps=steps, every=1000) == [{"status": 0}] * 2
    assert metrics(run) == metrics(straight)
    assert_same_state(storage.directory(straight, steps), storage.directory(run, steps))


def launched(options: dict[str, Any]) -> list[str]:
    launcher = [sys.executable, "-m", "launch.ranks", "--nproc-per-node", "2"]
    return [*launcher, "tests.parallel.workers.launched", json.dumps(options)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1", "GLOO_SOCKET_IFNAME": "lo"}


def wait_for_step(run_dir: Path, step: int) -> None:
    log, deadline = run_dir / "metrics.jsonl", time.monotonic() + 150
    while not log.exists() or f'{{"step": {step},' not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
