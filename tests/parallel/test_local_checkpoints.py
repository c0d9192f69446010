"""Checkpoints on the nodes' own disks, each with a copy on the next node's: a run goes on when a node is lost."""

import hashlib
import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from configs.checkpoints import CheckpointConfig
from configs.loader import ConfigError, validate
from pretrain.checkpoint import storage
from tests.parallel.forks import Forks
from tests.parallel.harness import RanksOf
from tests.parallel.kills import run
from tests.parallel.matrix import MODELS
from tests.parallel.runs import assert_same_state, metrics, train

NODES = ("a", "a", "b", "c")  # of the ranks


@pytest.fixture(scope="module")
def straight(ranks: RanksOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps on four ranks that was never interrupted and has no local checkpoints."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert train(ranks(4), folder, "dense", {}, steps=10, every=4, keep=9) == [{"status": 0}] * 4
    return folder


def options(folder: Path, **more: Any) -> dict[str, Any]:
    """Returns the options of a run on three nodes that fails before its eighth step; makes the folders of the disks."""
    for name in ("local", *NODES):
        (folder / name).mkdir(exist_ok=True)
    return {
        "function": "nodes:train",
        "local_dir": str(folder / "local"),
        "disks": [str(folder / name) for name in NODES],
        "run_dir": str(folder / "run"),
        "model": MODELS["dense"],
        "parallel": {},
        "steps": 10,
        "every": 4,
        "keep": 9,
        "checkpoint": {"local_dir": str(folder / "local"), "local_every": 1},
        **more,
    }


def files_on(disk: Path, step: int) -> dict[str, str]:
    """Returns the SHA-256 of the files of a step's local checkpoint on a node's disk, by name."""
    found = [file for path in disk.rglob(f"step_{step}") for file in path.iterdir()]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


def test_a_run_that_loses_a_node_goes_on_from_the_others_disks(forks: Forks, tmp_path: Path, straight: Path) -> None:
    log, folder = tmp_path / "log", tmp_path / "run"
    assert run(forks, 4, options(tmp_path, fail_at=7), log) == [1] * 4
    assert storage.steps(folder) == [4], log.read_text()
    on = {name: files_on(tmp_path / name, 7) for name in "abc"}
    manifest = json.loads(next((tmp_path / "a").rglob("step_7/manifest.json")).read_bytes())
    whole = {name: facts["sha256"] for name, facts in manifest["files"].items()}
    assert {len(each) - 1 for each in on.values()} == {2, 3}, "each disk has its own files and those of one more node"
    for one, other in combinations("abc", 2):
        assert (on[one] | on[other]).items() >= whole.items(), "two of the three nodes hold everything"
    assert [files_on(tmp_path / "b", step) for step in (5, 6)] == [{}, {}], "only the newest is kept"

    shutil.rmtree(tmp_path / "b")  # the node is replaced
    damaged = next((tmp_path / "c").rglob("step_7/rank_00003.safetensors"))  # a copy of it is on the first node's disk
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    log.unlink()
    assert run(forks, 4, options(tmp_path), log) == [0] * 4, log.read_text()
    said = log.read_text()
    assert (
        f"gathered step 7 from {tmp_path / 'local'} of the nodes into {folder}, since its own newest is step 4" in said
    )
    assert "rank_00003.safetensors does not match its size and SHA-256: it is damaged; another node's copy is" in said
    assert f"going on from {storage.directory(folder, 7)}" in said
    assert metrics(folder) == metrics(straight)
    assert_same_state(storage.directory(straight, 10), storage.directory(folder, 10))
    assert not any(files_on(tmp_path / name, step) for name in NODES for step in range(11)), "they are not needed"


@pytest.mark.full
@pytest.mark.parametrize(
    "why", ["rank_00002.safetensors: no node has it whole", "its manifest is damaged on every node"]
)
def test_a_run_that_loses_two_neighbours_goes_on_from_its_folder(
    forks: Forks, tmp_path: Path, straight: Path, why: str
) -> None:
    log, folder = tmp_path / "log", tmp_path / "run"
    assert run(forks, 4, options(tmp_path, fail_at=7), log) == [1] * 4
    for name in "bc":
        shutil.rmtree(tmp_path / name)
    for manifest in (tmp_path / "a").rglob("step_7/manifest.json") if "manifest" in why else ():
        manifest.write_bytes(manifest.read_bytes()[:-9])
    assert run(forks, 2, options(tmp_path), log) == [0] * 2  # with one node
    said = log.read_text()
    assert f"warning: the local checkpoint of step 7 is passed over: {why}" in said
    assert f"going on from {storage.directory(folder, 4)}" in said


@pytest.mark.full
def test_a_full_disk_of_a_node_costs_its_local_checkpoints_alone(forks: Forks, tmp_path: Path, straight: Path) -> None:
    log, folder = tmp_path / "log", tmp_path / "run"
    full = options(tmp_path)
    full["disks"][2] = "65536"
    assert run(forks, 4, full, log) == [0] * 4, log.read_text()
    assert "warning: no local checkpoint of step 5: rank 2: " in log.read_text()
    assert "rank_00000.safetensors cannot be written: No space left on device" in log.read_text()
    assert metrics(folder) == metrics(straight)


def test_a_node_that_comes_back_with_steps_that_were_taken_again_is_not_believed(
    ranks: RanksOf, tmp_path: Path
) -> None:
    def steps(*begun: tuple[int, list[int]]) -> Any:
        kwargs: dict[str, Any] = {
            "run_dir": str(tmp_path),
            "local_dir": str(tmp_path / "disk"),
            "model": MODELS["dense"],
        }
        shutil.rmtree(tmp_path / "disk_0", ignore_errors=True)
        (tmp_path / "local.json").unlink(missing_ok=True)
        return ranks(1).run("tests.parallel.workers.nodes:starts", process_group=False, begun=begun, **kwargs)[0]

    assert steps((0, [7, 9])) == [7, 9]
    assert steps((0, [7, 9]), (7, [8])) == [7], "step 9 was taken again after step 7"
    assert steps((0, [7, 9]), (9, []), (4, [])) == []
    assert steps((0, [7, 9]), (9, [12]), (12, [])) == [7, 9]


def test_a_run_that_has_lost_its_folder_says_how_to_go_on(ranks: RanksOf, tmp_path: Path) -> None:
    run, local = tmp_path / "the run's (é)", tmp_path / "local disk"
    options: dict[str, Any] = {"run_dir": str(run), "local_dir": str(local), "model": MODELS["dense"]}
    (found,) = ranks(1).run("tests.parallel.workers.nodes:lost", process_group=False, **options)
    assert found["said"].startswith(f"{run} has no checkpoint and no local.json, but {local} of rank 0 (")
    assert "has checkpoints of a run in it, up to step 7; if the folder was lost, go on from them: on" in found["said"]
    assert found["restored"] == [7], "the command that is said brings it back"
    assert found["anew"] == found["left"] == [], "--resume no removes it"


@pytest.mark.full
def test_a_run_that_has_lost_its_folder_goes_on_from_the_nodes(forks: Forks, tmp_path: Path, straight: Path) -> None:
    log, folder = tmp_path / "log", tmp_path / "run"
    assert run(forks, 4, options(tmp_path, fail_at=7), log) == [1] * 4
    shutil.rmtree(folder)
    log.unlink()
    assert run(forks, 4, options(tmp_path), log) == [1] * 4
    assert "has checkpoints of a run in it, up to step 7" in log.read_text()
    (restored,) = (tmp_path / "b").glob("*/local.json")
    folder.mkdir(exist_ok=True)
    shutil.copy(restored, folder)
    assert run(forks, 4, options(tmp_path), log) == [0] * 4, log.read_text()
    assert f"going on from {storage.directory(folder, 7)}" in log.read_text()
    assert_same_state(storage.directory(straight, 10), storage.directory(folder, 10))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"local_dir": "scratch", "local_every": 10}, "is no absolute path"),
        ({"local_dir": "/scratch"}, "checkpoint.local_every is missing"),
        ({"local_every": 10}, "checkpoint.local_dir is missing"),
        ({"local_dir": "/scratch", "local_every": 30}, "set checkpoint.every=90"),
        ({"local_dir": "/scratch", "local_every": 100}, "set checkpoint.every=200"),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        validate(CheckpointConfig, {"every": 100, **keys})
