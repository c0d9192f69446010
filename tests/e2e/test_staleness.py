"""Sampling ahead of training (`rl.staleness`): by commands in turns, and by two that wait for each other."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.model import ModelConfig
from posttrain.rl import rollout_file
from posttrain.rl.rollout_rows import rollout_rows
from pretrain.checkpoint import storage
from pretrain.data.batch_source import collate
from pretrain.model import Decoder
from tests.e2e.posttrain_configs import MODEL, write_base
from tests.e2e.started_commands import Command
from tests.parallel.harness import RanksOf
from tests.parallel.runs import metrics

STEPS = 3


AHEAD = ["rl.staleness=1", "rl.correction=truncate", "checkpoint.every=1", "checkpoint.keep=9"]


@pytest.fixture(scope="module")
def base(ranks: RanksOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the config of a GRPO run, and a model that sorts digits at times."""
    base = write_base(ranks, tmp_path_factory.mktemp("staleness"))
    call(ranks, "sft", base, "train.steps=40")
    return base


def call(ranks: RanksOf, command: str, base: Path, *overrides: str) -> None:
    argv = [str(base / f"{command}.toml"), *overrides]
    assert set(ranks(1).run(f"posttrain.{command}:main", process_group=False, timeout=300, argv=argv)) == {0}


@pytest.fixture(scope="module")
def in_turns(ranks: RanksOf, base: Path) -> Path:
    """Folder of the run, after each command went as far as it could without waiting for the other."""
    run, record = f"run.dir={base}/turns", f"{base}/turns_rollouts"
    for rollouts, steps in ((2, 2), (1, STEPS)):
        call(ranks, "grpo", base, run, *AHEAD, f"rl.record={record}", f"--rollouts-only={rollouts}")
        call(ranks, "grpo", base, run, *AHEAD, f"rl.replay={record}", f"train.steps={steps}")
    return base / "turns"


def test_a_rollout_comes_from_the_weights_that_the_staleness_names(base: Path, in_turns: Path) -> None:
    decoder = Decoder(ModelConfig.model_validate(MODEL))
    recorded, errors = rollout_file.read(base / "turns_rollouts", 2, ""), []
    batch = collate(rollout_rows(recorded.rollout, range(len(recorded.rollout)), None, ["rollout_logprobs"]))
    wanted = batch.extra["rollout_logprobs"][batch.loss_mask > 0]
    for step in (1, 2):
        decoder.load_state_dict(storage.read_full(storage.directory(in_turns, step)))
        with torch.no_grad():
            logits = decoder(batch.tokens, batch.positions, batch.segments, wanted=batch.trained)
        logprobs = logits.log_softmax(-1).gather(1, batch.labels[batch.loss_mask > 0][:, None])[:, 0]
        errors.append(float((logprobs - wanted).abs().max()))
    assert recorded.step == 1 and errors[0] < 1e-4 and errors[1] > 1e-3


def refused(ranks: RanksOf, base: Path, *overrides: str) -> str:
    """Returns the message with which GRPO refuses its config."""
    worker, argv = "tests.parallel.workers.posttraining:command", [str(base / "grpo.toml"), *AHEAD, *overrides]
    return str(ranks(1).run(worker, process_group=False, module="posttrain.grpo", argv=argv)[0]["error"])


def test_rollouts_are_sampled_once_settings_are_as_the_messages_say(ranks: RanksOf, base: Path, tmp_path: Path) -> None:
    run, record = tmp_path / "run", tmp_path / "rollouts"
    recorded, trained = [f"run.dir={run}", f"rl.record={record}"], [f"run.dir={run}", f"rl.replay={record}"]
    call(ranks, "grpo", base, *AHEAD, *recorded, "--rollouts-only=2")
    said = refused(ranks, base, *recorded, "--rollouts-only=1", "train.steps=2")
    assert said == f"{record} has all rollouts, 0 to 1, of train.steps = 2; raise it for more"
    call(ranks, "grpo", base, *AHEAD, *trained, "train.steps=2")
    gone, aside = storage.directory(run, 1), tmp_path / "aside"
    gone.rename(aside)
    said = refused(ranks, base, *recorded, "--rollouts-only=1", "train.steps=3")
    assert f"{gone} is gone and the run is at step 2, so a rollout cannot be sampled with its weights; raise" in said
    assert said.endswith("raise checkpoint.keep, and begin both commands anew with other folders")
    anew = [f"run.dir={tmp_path / 'anew'}", f"rl.record={tmp_path / 'anew_rollouts'}", "checkpoint.keep=10"]
    call(ranks, "grpo", base, *AHEAD, *anew, "--rollouts-only=1")
    aside.rename(gone)
    call(ranks, "grpo", base, *AHEAD, *recorded, "--rollouts-only=1", "train.steps=3")
    assert rollout_file.numbers(record) == [0, 1, 2]


@pytest.mark.full
def test_two_commands_at_once_have_the_numbers_of_turns(base: Path, in_turns: Path, tmp_path: Path) -> None:
    """Kills the command that samples as soon as it has written a rollout, and starts it again."""
    run, record = tmp_path / "run", tmp_path / "rollouts"
    grpo = (
        sys.executable,
        "-m",
        "posttrain.grpo",
        str(base / "grpo.toml"),
        f"run.dir={run}",
        *AHEAD,
        f"train.steps={STEPS}",
    )
    folders = [tmp_path / name for name in ("trains", "samples", "samples_again")]
    for folder in folders:
        folder.mkdir()
    trains = Command(folders[0], (*grpo, f"rl.replay={record}"))
    samples = Command(folders[1], (*grpo, f"rl.record={record}", "--rollouts-only=9"))
    while not rollout_file.numbers(record):
        assert samples.process.poll() is None, samples.log.read_text()
        time.sleep(0.05)
    samples.process.kill()
    again = Command(folders[2], (*grpo, f"rl.record={record}", "--rollouts-only=9"))
    for command in (again, trains):
        assert command.process.wait(300) == 0, command.log.read_text()
    kept = ("loss", "grad_norm", "reward", "logprob_difference")
    ours, theirs = ([[line[name] for name in kept] for line in metrics(r) if "loss" in line] for r in (run, in_turns))
    assert ours == theirs and len(ours) == STEPS
    weights = [storage.read_full(storage.directory(each, STEPS)) for each in (run, in_turns)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    for number in range(STEPS):
        one, other = (rollout_file.read(folder, number, "") for folder in (record, base / "turns_rollouts"))
        assert all(np.array_equal(array, other.rollout.arrays[name]) for name, array in one.rollout.arrays.items())
