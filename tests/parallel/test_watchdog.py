"""A run in which one rank makes no progress is ended by its watchdog, in a sentence that names the rank and why."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from configs.signals import HUNG
from pretrain.doctor.after_run import after_run
from pretrain.doctor.findings import Severity
from pretrain.logs import goodput
from tests.parallel.forks import Forks
from tests.parallel.kills import World
from tests.parallel.matrix import MODELS

LAYOUTS: dict[str, tuple[str, dict[str, int]]] = {
    "dp2": ("dense", {}),
    "tp2": ("dense", {"tp": 2}),
    "pp2": ("dense", {"pp": 2}),
    "ep2": ("moe", {"ep": 2}),
}
FIRST = [("is stopped", "tp2"), ("sleeps", "pp2"), ("enters another", "dp2")]
REST = [
    (fault, layout)
    for fault in ("sleeps", "dies", "is stopped", "enters another")
    for layout in LAYOUTS
    if (fault, layout) not in FIRST
]
SECONDS = {"least_seconds": 1.0, "first_seconds": 20.0}  # of the watchdog; a step takes some 20 ms
PATIENT = {"least_seconds": 100.0, "first_seconds": 100.0}  # of a run in which no rank has a fault


@pytest.mark.parametrize(("fault", "layout"), [*FIRST, *(pytest.param(*pair, marks=pytest.mark.full) for pair in REST)])
def test_the_rank_that_holds_up_the_others_is_named(forks: Forks, tmp_path: Path, fault: str, layout: str) -> None:
    model, parallel = LAYOUTS[layout]
    number = 0 if fault == "is stopped" else 1
    world = _world(forks, tmp_path, fault, model, parallel, at=4, victim=number)
    victim, other = world.ranks[number], world.ranks[1 - number]
    if fault == "dies":
        assert other.wait(150) is not None, "gloo tells the other rank at once that its peer is gone"
        assert victim.poll() == -signal.SIGKILL
        return
    assert other.wait(150) == HUNG
    if fault == "is stopped":
        os.kill(victim.pid, signal.SIGCONT)  # as its launcher does, so that it can end
    assert victim.wait(150) == HUNG
    world.end("after the hang")
    said = next(line for line in world.log.read_text().splitlines() if line.startswith("error: no progress"))
    folder = max((tmp_path / "run" / "hang").iterdir(), key=lambda path: int(path.name))
    if fault == "sleeps":
        assert "rank 1 is late: it is in step 5, the forward pass of pipeline stage" in said
        assert "in _fail" in said and "rank 0 waits for it in " in said
        assert "time.sleep" in (folder / "rank_1.txt").read_text()
    elif fault == "is stopped":
        assert f"rank 0 gives no sign of life: process {victim.pid} on " in said and "is stopped by a signal" in said
        assert not (folder / "rank_0.json").exists(), "what the others have found stands when it goes on"
        assert "Traceback" not in world.log.read_text()
    else:
        assert "rank 1" in said and "all_gather" in said and "in _fail" in said
    told = json.loads((folder / "verdict.json").read_text())
    assert told["text"] in said and told["step"] == 5
    end = list(after_run(tmp_path / "run"))[-1]
    assert end.level is Severity.FAILURE and end.found.startswith("it hung in step 5: no progress for ")
    # What is left is a run that goes on.
    again = _world(forks, tmp_path, "none", model, parallel, at=4)
    assert again.wait(150) is False and again.statuses == [0, 0]
    assert list(after_run(tmp_path / "run"))[-1].found == "it is finished, at step 8"
    # Every second of both starts is accounted for, that of the hang too.
    starts = goodput.read(tmp_path / "run")
    spent = goodput.goodput(starts)
    assert [(start.first_step, start.last_step) for start in starts] in ([(0, 4), (2, 8)], [(0, 4), (4, 8)])
    assert sum(spent.values()) == pytest.approx(starts[1].updated - starts[0].began, abs=0.05)
    assert spent["training"] > 0 and spent["restart"] > 0
    assert (spent["lost"] > 0) == (starts[1].first_step == 2), "the save after step 4 may be cut short by the hang"
    assert spent["hang"] >= SECONDS["least_seconds"] and spent["idle"] < spent["hang"] + 20


def test_a_rank_that_may_take_longer_is_waited_for(forks: Forks, tmp_path: Path) -> None:
    """Lets the main rank evaluate for longer than a step may take, while the other waits for it in a step."""
    world = _world(forks, tmp_path, "evaluates longer", "dense", {}, at=4, victim=0, steps=4)
    assert world.wait(150) is False and world.statuses == [0, 0], world.log.read_text()[-2000:]
    told = [json.loads(path.read_text()) for path in (tmp_path / "run" / "hang").glob("*/verdict.json")]
    assert told and not any(decision["hangs"] for decision in told)


def _world(
    forks: Forks,
    tmp_path: Path,
    fault: str,
    model: str,
    parallel: dict[str, int],
    at: int,
    victim: int = 1,
    steps: int = 8,
) -> World:
    options: dict[str, Any] = {
        "fault": fault,
        "at": at,
        "victim": victim,
        "run_dir": str(tmp_path / "run"),
        "steps": steps,
    }
    settings = PATIENT if fault == "none" else SECONDS
    options |= {"model": MODELS[model], "parallel": parallel, "watchdog": settings}
    return World(forks, 2, {"function": "hanging:hang", **options}, tmp_path / "log")
