"""Checkpoints that are copied to a mirror in the background, and runs that go on from it when their folder is lost."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint import storage
from tests.object_store import KEY_ID, SECRET, serve
from tests.parallel.forks import Forks
from tests.parallel.harness import RanksOf
from tests.parallel.kills import World
from tests.parallel.matrix import MODELS
from tests.parallel.runs import assert_same_state, metrics, train

WORKER = "tests.parallel.workers.mirrors:train"
MIRROR = "s3://models/runs/one"
SCHEDULE: dict[str, Any] = {"schedule": {"steps": 6}}  # longer than the runs, which are resumed later
NO_STORE = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1", "AWS_DEFAULT_REGION": "us-east-1"}


def mirrored(
    ranks: RanksOf, world: int, run_dir: Path, steps: int, mirror: str, environment: dict[str, str], **options: Any
) -> tuple[dict[str, Any], str]:
    """Trains up to `steps` with a mirror; returns the main rank's answer, and what was printed in all."""
    options = {"model": MODELS["dense"], "parallel": {}, "checkpoint": {"mirror": mirror}, **SCHEDULE, **options}
    answers = ranks(world).run(
        WORKER, process_group=False, run_dir=str(run_dir), steps=steps, environment=environment, **options
    )
    return answers[0], "\n".join(answer.get("said", "") for answer in answers)


def steps_of(run: Path) -> list[dict[str, Any]]:
    """Returns the lines of all steps of a log; a run that ended before has evaluated once more than the others."""
    return [line for line in metrics(run) if "loss" in line]


@pytest.fixture(scope="module")
def straight(ranks: RanksOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps on one rank that was never interrupted and has no mirror."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert train(ranks(1), run, "dense", {}, keep=9) == [{"status": 0}]
    return run


def test_a_lost_run_goes_on_from_s3_with_the_same_numbers(ranks: RanksOf, tmp_path: Path) -> None:
    run, straight = tmp_path / "run", tmp_path / "straight"
    train(ranks(2), straight, "dense", {}, keep=9)
    with serve("models") as (client, environment):
        answer, said = mirrored(ranks, 2, run, 4, MIRROR, environment)
        assert answer["status"] == 0 and f"copied step 4 to {MIRROR} in" in said
        shutil.rmtree(run)  # the node is lost, and its disk with it
        answer, said = mirrored(ranks, 2, run, 6, MIRROR, environment)
        assert answer["status"] == 0
        assert f"fetched step 4 from {MIRROR} into {run}, since it has no checkpoint itself" in said
        assert steps_of(run) == steps_of(straight)
        assert_same_state(storage.directory(straight, 6), storage.directory(run, 6))
        listed = client.list_objects_v2(Bucket="models")["Contents"]
        there = {entry["Key"]: client.get_object(Bucket="models", Key=entry["Key"])["Body"].read() for entry in listed}
        again, said = mirrored(ranks, 2, run, 6, MIRROR, environment)
        assert again["status"] == 0 and "nothing to do" in said and "copied" not in said
        other, _ = mirrored(ranks, 2, tmp_path / "other", 6, MIRROR, environment, seed=4)
        assert other["kind"] == "ConfigError" and "run.seed" in other["error"], "nothing of another run is fetched"
        assert not (tmp_path / "other/checkpoints").exists()
        refused, _ = mirrored(ranks, 2, tmp_path / "new", 6, MIRROR, environment, resume="no")
        assert "holds checkpoints, the newest of step 6, which --resume no would overwrite" in refused["error"]
        refused, _ = mirrored(ranks, 2, straight, 8, MIRROR, environment, schedule={})
        assert "holds the checkpoints of another run" in refused["error"]
    folder = tmp_path / "from_the_mirror"  # a mirror is laid out as a run
    for key, content in there.items():
        (file := folder / key.removeprefix("runs/one/")).parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    assert storage.steps(folder) == [4, 6], "checkpoint.keep is the mirror's, too"
    for step in (4, 6):
        storage.verify(storage.directory(folder, step))
    written = [file.read_bytes() for file in run.rglob("*") if file.is_file()] + list(there.values())
    assert not any(secret.encode() in content for content in written for secret in (KEY_ID, SECRET))


def damage(newest: Path, how: str) -> None:
    file = newest / storage.rank_file(0)
    match how:
        case "wrong content":
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
        case "missing file":
            file.unlink()
        case "torn manifest":
            manifest = newest / storage.MANIFEST
            manifest.write_bytes(manifest.read_bytes()[:-100])
        case "no manifest":
            (newest / storage.MANIFEST).unlink()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("wrong content", "does not match its size and SHA-256"),
        ("missing file", "is missing"),
        ("torn manifest", "is damaged"),
        ("no manifest", "fetched step 2"),
    ],
)
def test_a_damaged_copy_is_passed_over(ranks: RanksOf, tmp_path: Path, straight: Path, how: str, says: str) -> None:
    run, mirror = tmp_path / "run", tmp_path / "mirror"
    mirrored(ranks, 1, run, 4, str(mirror), {})
    shutil.rmtree(run)
    damage(storage.directory(mirror, 4), how)
    answer, said = mirrored(ranks, 1, run, 6, str(mirror), {})
    assert answer["status"] == 0 and says in said and f"fetched step 2 from {mirror}" in said
    assert steps_of(run) == steps_of(straight)
    assert storage.steps(mirror) == [4, 6]
    for step in (4, 6):  # written again
        storage.verify(storage.directory(mirror, step))


def test_a_mirror_of_damaged_checkpoints_alone_is_left_as_the_message_says(
    ranks: RanksOf, tmp_path: Path, straight: Path
) -> None:
    run, mirror, other = tmp_path / "run", tmp_path / "mirror", tmp_path / "other"
    mirrored(ranks, 1, run, 4, str(mirror), {})
    shutil.rmtree(run)
    for step in storage.steps(mirror):
        damage(storage.directory(mirror, step), "torn manifest")
    answer, said = mirrored(ranks, 1, run, 4, str(mirror), {})
    assert answer["kind"] == "CheckpointError" and "an earlier checkpoint is looked for" in said
    remedy = "is whole; remove them there to start from the beginning, or name another checkpoint.mirror"
    assert answer["error"] == f"no checkpoint in {mirror} {remedy}"
    assert mirrored(ranks, 1, run, 2, str(other), {})[0]["status"] == 0
    shutil.rmtree(run)
    shutil.rmtree(mirror / "checkpoints")
    assert mirrored(ranks, 1, run, 6, str(mirror), {})[0]["status"] == 0
    assert steps_of(run) == steps_of(straight)


def test_an_older_or_damaged_checkpoint_of_its_own_is_not_gone_on_from(
    ranks: RanksOf, tmp_path: Path, straight: Path
) -> None:
    run, mirror = tmp_path / "run", tmp_path / "mirror"
    mirrored(ranks, 1, run, 4, str(mirror), {})
    damage(storage.directory(run, 4), "wrong content")
    answer, said = mirrored(ranks, 1, run, 6, str(mirror), {})
    assert answer["status"] == 0 and "fetched step 4" in said and "since its own newest is step 2" in said
    assert steps_of(run) == steps_of(straight)


def test_a_kill_during_a_copy_leaves_no_checkpoint_that_counts(forks: Forks, tmp_path: Path, straight: Path) -> None:
    run, mirror, log = tmp_path / "run", tmp_path / "mirror", tmp_path / "log"
    options: dict[str, Any] = {
        "function": "mirrors:train_with_slow_copies",
        "run_dir": str(run),
        "model": MODELS["dense"],
        "parallel": {},
        "steps": 4,
        "checkpoint": {"mirror": str(mirror)},
        **SCHEDULE,
    }
    world = World(forks, 1, {**options, "slow_from": 4}, log)
    copied, copying = storage.directory(mirror, 2), storage.directory(mirror, 4) / storage.rank_file(0)
    assert world.wait(150, until=copying.is_file) and copying.is_file(), log.read_text()  # before the manifest
    world.send([0], signal.SIGKILL)
    world.wait(150)
    storage.verify(copied)
    assert not (copying.parent / storage.MANIFEST).exists()
    shutil.rmtree(run)
    world = World(forks, 1, {**options, "slow_from": 99, "steps": 6}, log)
    world.wait(150)
    assert world.statuses == [0] and "fetched step 2" in log.read_text()
    assert steps_of(run) == steps_of(straight)
    assert storage.steps(mirror) == [4, 6] and storage.verify(copying.parent)


def test_training_goes_on_without_the_mirror_and_says_so(ranks: RanksOf, tmp_path: Path, straight: Path) -> None:
    run, remedy = tmp_path / "run", "check the address, and endpoint and credentials in the environment"
    refused, _ = mirrored(ranks, 1, run, 6, MIRROR, NO_STORE)
    assert "EndpointConnectionError" in refused["error"] or "NoCredentialsError" in refused["error"]
    assert remedy in refused["error"] and "may have checkpoints of this run" in refused["error"]
    train(ranks(1), run, "dense", {}, steps=2, **SCHEDULE)
    keys = {"AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET}
    answer, said = mirrored(ranks, 1, run, 6, MIRROR, NO_STORE | keys, checkpoint={"mirror": MIRROR, "every": 1})
    assert answer["status"] == 0, "an own checkpoint is enough to go on"
    warnings = [line for line in said.splitlines() if "warning:" in line]
    assert f"checkpoint.mirror = '{MIRROR}' cannot be used (" in warnings[0]
    assert all(MIRROR in line for line in warnings) and remedy in warnings[1]
    assert any("times since step" in line for line in warnings) and "the same command run again" in warnings[-1]
    assert len(warnings) < 6, "repeated failures are counted, not all printed"
    assert not any(secret in said for secret in keys.values())
    assert steps_of(run) == steps_of(straight)
    with serve("models") as (client, environment):  # what is missing is made up for, although the run is finished
        answer, said = mirrored(ranks, 1, run, 6, MIRROR, environment, checkpoint={"mirror": MIRROR, "every": 1})
        assert answer["status"] == 0 and f"copied step 6 to {MIRROR}" in said
        manifest = client.get_object(Bucket="models", Key="runs/one/checkpoints/step_6/manifest.json")["Body"].read()
    assert json.loads(manifest)["step"] == 6
