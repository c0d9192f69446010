"""Interrupted and resumed runs compared with uninterrupted ones, bit by bit."""

import json
import shutil
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint import storage
from pretrain.checkpoint.storage import CheckpointError, read_full, read_manifest
from pretrain.profiling import KINDS
from pretrain.run.agreement import MAX_STEPS, steps_between
from tests.parallel.harness import RanksOf
from tests.parallel.matrix import MODELS
from tests.parallel.runs import assert_same_state, metrics, train
from tests.parallel.workers.layouts import GLOBAL_BATCH, SEQ_LENGTH


@pytest.mark.parametrize(
    ("model", "world", "parallel", "precision"),
    [
        pytest.param("moe_tied", 1, {}, "fp32", marks=pytest.mark.full),
        ("moe_tied", 2, {}, "fp32"),
        ("dense", 2, {"tp": 2}, "fp32"),
        pytest.param("moe_tied", 2, {"pp": 2}, "fp32", marks=pytest.mark.full),
        pytest.param("moe_tied", 2, {}, "bf16", marks=pytest.mark.full),
        ("dense_tied", 2, {"pp": 2}, "bf16"),
        pytest.param("moe_tied", 2, {"pp": 2, "vpp": 2}, "fp32", marks=pytest.mark.full),
        pytest.param("moe_tied", 2, {"tp": 2, "sp": True}, "bf16", marks=pytest.mark.full),
        pytest.param("moe_tied", 2, {"zero": 2}, "bf16", marks=pytest.mark.full),
        ("dense_tied", 2, {"zero": 3}, "fp32"),
        pytest.param("moe_tied", 2, {"zero": 3}, "fp32", marks=pytest.mark.full),
        pytest.param("dense_tied", 2, {"offload_optimizer": True}, "bf16", marks=pytest.mark.full),
        pytest.param("dense_tied", 2, {"zero": 3, "offload_optimizer": True}, "bf16", marks=pytest.mark.full),
    ],
)
def test_resumed_run_is_bit_identical(
    ranks: RanksOf, tmp_path: Path, model: str, world: int, parallel: dict[str, int], precision: str
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert train(ranks(world), straight, model, parallel, precision=precision) == [{"status": 0}] * world
    answers = train(
        ranks(world), broken, model, parallel, fail_at=5, precision=precision
    )  # the last checkpoint is that of step 4
    assert [answer["error"] for answer in answers] == ["the node went away"] * world
    assert len(metrics(broken)) > 5
    (broken / "metrics.jsonl").open("a").write('{"step": 6, "lo')  # a line cut short by a kill
    assert train(ranks(world), broken, model, parallel, precision=precision) == [{"status": 0}] * world
    assert metrics(broken) == metrics(straight)
    for kind in storage.KINDS:
        a, b = (storage.read_full(storage.directory(run, 6), kind) for run in (straight, broken))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert storage.steps(broken) == [4, 6]
    ledgers = [storage.read_manifest(storage.directory(run, 6))["ledger"] for run in (straight, broken)]
    assert ledgers[0] == ledgers[1] and min(ledgers[0].values()) > 100  # tokens per source


@pytest.mark.parametrize(("every", "begun"), [(100, 5), (2, 4)])
def test_an_infinite_gradient_ends_the_run_before_it_is_saved(
    ranks: RanksOf, tmp_path: Path, every: int, begun: int
) -> None:
    """Trains on an infinite loss: ranks find it when the next step is under way, or at once where a save is due."""
    options = {"run_dir": str(tmp_path), "model": MODELS["moe"], "infinite": 4, "every": every}
    worker = "tests.parallel.workers.training:train_with_an_infinite_step"
    answers = ranks(2).run(worker, process_group=False, **options)
    assert [answer["begun"] for answer in answers] == [begun] * 2
    (error,) = {answer["error"] for answer in answers}
    assert error.startswith("step 4: the gradient norm is not finite; no weight was changed by this step; ")
    # The loss function is another one by the time that the step is computed again.
    assert ("all of the step's tensors are finite" if every == 100 else "is the loss on rank 0 (dp 0)") in error
    assert storage.steps(tmp_path) == [step for step in (2,) if every == 2]
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]


def test_a_step_with_an_infinite_gradient_can_be_skipped(ranks: RanksOf, tmp_path: Path) -> None:
    """Skips a step, which changes no weight, moment or balance; later steps go on, also in a resumed run."""
    worker = "tests.parallel.workers.training:train_with_an_infinite_step"
    options = {"model": MODELS["moe"], "infinite": 4, "every": 1, "keep": 9, "spikes": {"action": "skip"}}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    answers = ranks(2).run(worker, process_group=False, run_dir=str(straight), **options)
    assert [answer["status"] for answer in answers] == [0, 0]
    before, skipped, after = (read_full(storage.directory(straight, step)) for step in (3, 4, 5))
    assert all(torch.equal(tensor, skipped[name]) for name, tensor in before.items())
    assert not all(torch.equal(tensor, after[name]) for name, tensor in skipped.items())
    lines = metrics(straight)
    assert [line["step"] for line in lines if "skipped" in line] == [4] and lines[3]["loss"] is None
    ledgers = [sum(read_manifest(storage.directory(straight, step))["ledger"].values()) for step in range(1, 10)]
    assert ledgers[3] == ledgers[2] and ledgers[8] > ledgers[3] > 0
    shutil.copytree(straight, resumed)
    for step in range(5, 10):
        shutil.rmtree(storage.directory(resumed, step))
    assert ranks(2).run(worker, process_group=False, run_dir=str(resumed), **options)[0]["status"] == 0
    assert metrics(resumed) == lines
    assert_same_state(storage.directory(straight, 9), storage.directory(resumed, 9))


def test_a_signal_to_one_rank_stops_all_after_a_checkpoint(ranks: RanksOf, tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(ranks(2), straight, "dense", {})
    tracked: dict[str, Any] = {"tracking": {"prometheus": {}} if find_spec("prometheus_client") else {}}
    assert train(ranks(2), stopped, "dense", {}, signal_at=2, every=100, **tracked) == [{"status": 75}] * 2
    assert storage.steps(stopped) == [3]
    assert train(ranks(2), stopped, "dense", {}, every=100, **tracked) == [{"status": 0}] * 2
    assert metrics(stopped) == metrics(straight)
    if tracked["tracking"]:
        assert 'trivium_step{part="",run="stopped"} 6.0' in (stopped / "metrics.prom").read_text()


def test_ranks_ask_each_other_for_signals_every_few_steps(ranks: RanksOf, tmp_path: Path) -> None:
    worker, options = "tests.parallel.workers.training:votes", {"model": MODELS["dense"], "steps": 90}
    options |= {"run_dir": str(tmp_path), "slow_from": 40, "signal_at": 52}
    one, other = ranks(2).run(worker, process_group=False, **options)
    assert one == other and one["status"] == 75
    asked = one["asked"]
    assert asked[:5] == [0, 1, 2, 3, 4] and len([step for step in asked if step <= 40]) < 30
    assert max(after - before for before, after in pairwise(asked)) <= MAX_STEPS
    slow = [step for step in asked if step >= 40 + MAX_STEPS]  # by now all ranks know that steps take long
    assert all(after - before <= 2 for before, after in pairwise(slow))
    assert storage.steps(tmp_path) == [asked[-1]] and 53 <= asked[-1] <= 54


@pytest.mark.parametrize(
    ("seconds", "done", "steps"),
    [(0.001, 0, 1), (0.001, 9, 3), (0.001, 1000, MAX_STEPS), (0.3, 1000, 3), (7.0, 1000, 1), (0.0, 1000, MAX_STEPS)],
)
def test_signals_are_exchanged_within_a_step_or_about_a_second(seconds: float, done: int, steps: int) -> None:
    assert steps_between(seconds, done) == steps


def test_resume_in_another_layout_goes_on_the_same(ranks: RanksOf, tmp_path: Path) -> None:
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    train(ranks(1), straight, "dense_tied", {})
    train(ranks(2), moved, "dense_tied", {}, fail_at=4)
    train(ranks(2), moved, "dense_tied", {"tp": 2})
    losses = [[line["loss"] for line in metrics(run) if "loss" in line] for run in (straight, moved)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-6)


def test_profiled_and_deterministic_steps_have_the_same_numbers(ranks: RanksOf, tmp_path: Path) -> None:
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    options: dict[str, Any] = {"model": "moe_tied", "parallel": {"tp": 2}, "steps": 3}
    train(ranks(2), plain, **options)
    options |= {"profiled": [2, 3], "train": {"deterministic": True}, "log": {"measure_peak": True}}
    assert train(ranks(2), profiled, **options) == [{"status": 0}] * 2
    expected, found = metrics(plain), metrics(profiled)
    for without, measured in zip(expected, found, strict=True):
        assert "loss" not in without or (without.pop("mfu"), measured.pop("mfu") >= 0) == (None, True)
    assert found == expected
    folder = profiled / "profile" / "steps_2_to_3"
    assert sorted(path.name for path in folder.glob("rank_*")) == ["rank_0.json.gz", "rank_1.json.gz"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2 and len(summary["ranks"]) == 2
    logged = {line["step"]: line for line in map(json.loads, (profiled / "metrics.jsonl").read_text().splitlines())}
    seconds = sum(GLOBAL_BATCH * SEQ_LENGTH / logged[step]["tokens_per_s"] for step in (2, 3) if "loss" in logged[step])
    for found in summary["ranks"]:
        assert found.keys() == set(KINDS) and min(found[kind] for kind in KINDS) > 0
    assert 0.9 * seconds < sum(summary["ranks"][0].values()) / 1e6, "the log's seconds are those of the main rank"
    lines = (folder / "summary.txt").read_text().splitlines()
    assert lines[0].split()[-5:] == list(KINDS) and [line.split()[0] for line in lines[1:3]] == ["0", "1"]


@pytest.mark.parametrize("compiles", [True, False])
def test_compiled_code_is_kept_in_the_run_s_folder(ranks: RanksOf, tmp_path: Path, compiles: bool) -> None:
    options = {"run_dir": str(tmp_path), "model": MODELS["dense"], "compiles": compiles}
    (found,) = ranks(1).run("tests.parallel.workers.training:compiled_code", process_group=False, **options)
    assert (found is None) == (not compiles)
    if found:  # a folder for this version of the model's code
        assert Path(found).parent == tmp_path / "compiled"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 4}, "run.seed 3 -> 4"),
        ({"fingerprint": "other"}, "its data differ"),
        ({"model": "moe"}, "model.moe.num_experts unset -> 4"),
        ({"model": "moe", "seed": 4}, "unset -> 4"),
    ],
)
def test_another_runs_checkpoint_is_refused(ranks: RanksOf, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    train(ranks(1), tmp_path, "dense", {}, steps=2)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    options = {"model": "dense", **change}
    (answer,) = train(ranks(1), tmp_path, options.pop("model"), {}, steps=4, **options)
    assert answer["kind"] == "ConfigError" and words in answer["error"] and "another run.dir" in answer["error"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == before and storage.steps(tmp_path) == [2]


def test_damaged_checkpoints_are_named_and_passed_over(ranks: RanksOf, tmp_path: Path) -> None:
    train(ranks(1), tmp_path, "dense", {}, steps=4)
    file = next(storage.directory(tmp_path, 4).glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{file.name} does not match its SHA-256"):
        storage.verify(storage.directory(tmp_path, 4))
    assert storage.latest(tmp_path) == storage.directory(tmp_path, 2)
    file.write_bytes(content[:100])
    with pytest.raises(CheckpointError, match="100 bytes, its manifest says"):
        storage.verify(storage.directory(tmp_path, 4))
    (storage.directory(tmp_path, 2) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* is whole"):
        storage.latest(tmp_path)
    (answer,) = train(ranks(1), tmp_path, "dense", {}, steps=6)
    assert answer["kind"] == "CheckpointError" and "is whole" in answer["error"]
