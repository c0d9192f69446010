"""`trivium replay`: a step of a run that is taken again has the run's numbers, and says what it computed."""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint import storage
from tests.parallel.harness import RanksOf
from tests.parallel.runs import metrics
from tests.small_training import write_config

LAYOUTS = {"one": (1, {}), "tp2": (2, {"parallel.tp": 2, "parallel.sp": "true"}), "pp2": (2, {"parallel.pp": 2})}
FULL = {"dp2": (2, {}), "cp2": (2, {"parallel.cp": 2})}
STEP = 6
TRAIN, REPLAY = (f"tests.parallel.workers.plans:{name}_command" for name in ("train", "replay"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    return write_config(folder, 7, folder / "one", 60, every=4)


@pytest.fixture(scope="module")
def alone(config: Path, ranks: RanksOf) -> dict[str, Any]:
    return _replayed(ranks, config, "one", LAYOUTS["one"])


@pytest.mark.parametrize("layout", ["tp2", "pp2", *(pytest.param(name, marks=pytest.mark.full) for name in FULL)])
def test_a_step_taken_again_has_the_numbers_of_the_run(
    ranks: RanksOf, config: Path, alone: dict[str, Any], layout: str
) -> None:
    found = _replayed(ranks, config, layout, (LAYOUTS | FULL)[layout])
    assert found["metrics"]["loss"] == pytest.approx(alone["metrics"]["loss"], rel=1e-5)
    for kind in ("activation_norm", "largest_activation", "gradient_norm", "weight_norm"):
        assert found[kind].keys() == alone[kind].keys() and found[kind]["layer 1"] > 0
        # Six steps of rounding; a part that were counted once for each rank that holds it would have a norm 1.4 times
        # as large.
        assert found[kind] == pytest.approx(alone[kind], rel=2e-3)
    for one, other in zip(found["samples"], alone["samples"], strict=True):
        assert (one["sample"], one["source"], one["described"]) == (
            other["sample"],
            other["source"],
            other["described"],
        )
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["largest_logit"] == pytest.approx(other["largest_logit"], rel=1e-3)
    if layout == "tp2":
        run = config.parent / layout
        command = f"trivium launch --nproc-per-node 2 replay {run} --step {STEP}"
        assert f"the run had 2 ranks, and here are 1: run `{command}` (" in _replay(ranks, run, STEP)["error"]


def test_parts_of_a_step_sum_to_the_whole(alone: dict[str, Any]) -> None:
    norm = math.sqrt(sum(part**2 for part in alone["gradient_norm"].values()))
    assert norm == pytest.approx(alone["metrics"]["grad_norm"], rel=1e-6)
    total = sum(one["loss"] * one["trained_tokens"] for one in alone["samples"])
    tokens = sum(one["trained_tokens"] for one in alone["samples"])
    # The run adds up the losses of a row in fp32, and the record in fp64.
    assert total / tokens == pytest.approx(alone["metrics"]["loss"], rel=1e-6)
    assert [one["sample"] for one in alone["samples"]] == list(range(4 * (STEP - 1), 4 * STEP))
    assert all(f"(source {one['source']}, {one['source']}" in one["described"] for one in alone["samples"])


def test_what_cannot_be_replayed_is_refused(ranks: RanksOf, config: Path, alone: dict[str, Any]) -> None:
    run = config.parent / "one"
    assert _replay(ranks, run, 8)["error"] == f"--step 8: {run} took steps 1 to 7; give one of them"
    assert "is not the folder of a pretraining run" in _replay(ranks, config.parent, 1)["error"]


def test_a_step_is_replayed_once_it_is_the_one_that_the_message_names(
    ranks: RanksOf, config: Path, alone: dict[str, Any], tmp_path: Path
) -> None:
    """Goes on with another learning rate from step 7, whose checkpoint is removed, to step 10."""
    run = Path(shutil.copytree(config.parent / "one", tmp_path / "run"))
    args = [str(config), f"run.dir={run}", "train.steps=10", "optimizer.lr=0.002", "checkpoint.keep=9"]
    assert ranks(1).run(TRAIN, process_group=False, args=args)[0]["status"] == 0
    shutil.rmtree(storage.directory(run, 7))
    said = _replay(ranks, run, 8)["error"]
    assert "its settings or data and this step, only those of steps 4, 8, 10; give --step 9, and keep more by" in said
    assert _replay(ranks, run, 9)["status"] == 0
    shutil.rmtree(storage.directory(run, 8))
    said = _replay(ranks, run, 8)["error"]
    assert "only those of steps 4, 10; no later step has one either, and keep more by checkpoint.keep_every in" in said


def test_a_step_is_replayed_once_its_plan_is_where_the_message_says(
    ranks: RanksOf, config: Path, alone: dict[str, Any], tmp_path: Path
) -> None:
    run, plan, aside = config.parent / "one", config.parent / "plan", tmp_path / "aside"
    (tmp_path / "other").mkdir()
    write_config(tmp_path / "other", 7, tmp_path / "none", 56)
    plan.rename(aside)
    shutil.copytree(tmp_path / "other/plan", plan)
    said = _replay(ranks, run, STEP)["error"]
    shutil.rmtree(plan)
    aside.rename(plan)
    assert f"{plan} is not the plan that step {STEP} of {run} was trained on; restore that one there: the SHA-2" in said
    begins = said.rpartition(" begins with ")[2]
    assert hashlib.sha256((plan / "plan.json").read_bytes()).hexdigest().startswith(begins)
    assert _replay(ranks, run, STEP)["status"] == 0


def _replay(ranks: RanksOf, run: Path, step: int) -> dict[str, Any]:
    answer: dict[str, Any] = ranks(1).run(REPLAY, process_group=False, args=[str(run), "--step", str(step)])[0]
    return answer


def _replayed(ranks: RanksOf, config: Path, name: str, layout: tuple[int, dict[str, Any]]) -> dict[str, Any]:
    """Trains seven steps in a layout, takes the sixth again, and returns its record."""
    world, keys = layout
    run = config.parent / name
    args = [str(config), f"run.dir={run}", *(f"{key}={value}" for key, value in keys.items())]
    args.append(f"checkpoint.mirror={config.parent / name}_mirror")  # has later checkpoints than that of step 4
    assert ranks(world).run(TRAIN, process_group=False, args=args)[0]["status"] == 0
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    answer = ranks(world).run(REPLAY, process_group=False, args=[str(run), "--step", str(STEP)])[0]
    said = answer["said"]
    assert (
        answer["status"] == 0 and "equal to the run's metrics.jsonl bit for bit: step, tokens, loss, grad_norm" in said
    )
    assert f"step {STEP}, from {run}/checkpoints/step_4, layout" in said
    found = json.loads((run / "replay" / f"step_{STEP}.json").read_text())
    logged = next(line for line in metrics(run) if line["step"] == STEP)
    assert found["metrics"] == {key: value for key, value in logged.items() if key != "mfu"}
    after = sorted(path.relative_to(run) for path in run.rglob("*") if path.parts[-2:-1] != ("replay",))
    assert [path for path in after if path.name != "replay"] == before
    assert [path.name for path in (run / "replay").iterdir()] == [f"step_{STEP}.json"]
    return found
