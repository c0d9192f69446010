"""A run that is killed with SIGKILL again and again ends bit by bit like an undisturbed one."""

from pathlib import Path

import pytest

from pretrain.checkpoint import storage
from tests.parallel.forks import Forks
from tests.parallel.harness import RanksOf
from tests.parallel.kills import crash, run
from tests.parallel.matrix import MODELS
from tests.parallel.runs import assert_same_state, metrics, train


@pytest.mark.parametrize(
    ("kills", "torn", "steps", "parallel"),
    [
        (3, 1, 24, {}),
        pytest.param(30, 10, 240, {}, marks=pytest.mark.full),
        pytest.param(10, 3, 60, {"tp": 2, "sp": True}, marks=pytest.mark.full),
    ],
)
def test_a_killed_run_ends_as_an_untouched_one(
    forks: Forks, ranks: RanksOf, tmp_path: Path, kills: int, torn: int, steps: int, parallel: dict[str, int]
) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert train(ranks(2), straight, "moe_tied", parallel, steps=steps, timeout=600) == [{"status": 0}] * 2
    kwargs = {"run_dir": str(killed), "model": MODELS["moe_tied"], "parallel": parallel, "steps": steps, "every": 1}
    done = crash(forks, 2, kwargs, seed=steps, kills=kills, torn=torn, log=tmp_path / "log")
    newest = [kill["newest"] for kill in done]
    assert newest == sorted(newest) and newest[-1] > 0, "no kill may cost a checkpoint that was whole"
    assert metrics(killed) == metrics(straight)
    assert_same_state(storage.directory(straight, steps), storage.directory(killed, steps))
    assert not list((killed / "checkpoints").glob(".step_*"))


def test_one_ranks_failure_leaves_the_save_in_flight_whole(forks: Forks, tmp_path: Path) -> None:
    """Fails rank 1 while both ranks save in the background; rank 0 waits for it in a collective of the next step."""
    kwargs = {"function": "train_on_slow_disk", "run_dir": str(tmp_path / "run"), "model": MODELS["dense"]}
    kwargs |= {"steps": 4, "seconds": 0.0, "fail_on_rank": 1}
    assert run(forks, 2, kwargs, tmp_path / "log") == [1, 1]
    assert storage.latest(tmp_path / "run") == storage.directory(tmp_path / "run", 2)
