"""A run that goes back before a bad step computes what one does whose config passes over the step's samples."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs import run_history
from data_pipeline.provenance.lookup import DataSpan, steps
from pretrain.checkpoint import storage
from pretrain.health import rewind_history
from pretrain.logs import goodput
from tests.parallel.harness import RanksOf
from tests.parallel.matrix import MODELS
from tests.parallel.runs import assert_same_state, metrics
from tests.parallel.workers.layouts import GLOBAL_BATCH

WORKER = "tests.parallel.workers.bad_steps:train_with_bad_samples"
LAYOUTS: list[Any] = [
    ("moe_tied", 2, {}, "fp32"),
    pytest.param("dense", 1, {}, "fp32", marks=pytest.mark.full),
    pytest.param("dense", 2, {"tp": 2, "sp": True}, "bf16", marks=pytest.mark.full),
    pytest.param("dense_tied", 2, {"pp": 2}, "fp32", marks=pytest.mark.full),
    pytest.param("moe", 2, {"ep": 2}, "bf16", marks=pytest.mark.full),
    pytest.param("dense", 2, {"cp": 2}, "fp32", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("model", "world", "parallel", "precision"), LAYOUTS)
def test_a_run_after_a_rewind_is_one_that_passes_over_the_samples(
    ranks: RanksOf, tmp_path: Path, model: str, world: int, parallel: dict[str, Any], precision: str
) -> None:
    """Makes step 6 bad, and the step that takes its place; the checkpoints before it are of steps 0, 2 and 4."""
    bad = [first(5), first(6)]
    options: dict[str, Any] = {
        "model": MODELS[model],
        "parallel": parallel,
        "steps": 9,
        "every": 2,
        "keep": 9,
        "precision": precision,
    }
    rewound, other = tmp_path / "rewound", tmp_path / "other"
    spikes: dict[str, Any] = {"action": "rewind"}
    answers = ranks(world).run(WORKER, process_group=False, run_dir=str(rewound), bad=bad, spikes=spikes, **options)
    assert [answer["status"] for answer in answers] == [0] * world
    said = answers[0]["said"]
    assert (
        said.count("going back to ") == 2 and f"passing over the step's samples, {first(5)} to {first(6) - 1}" in said
    )
    found = json.loads((rewound / rewind_history.FILE).read_text())
    assert [(one["step"], one["to_step"], one["samples"]) for one in found] == [
        (6, 4, [first(5), first(6)]),
        (6, 4, [first(6), first(7)]),
    ]
    # The other run begins from the same checkpoint, and is told what to pass over.
    spikes = {"pass_over": [[first(5), first(7)]]}
    (answer, *_) = ranks(world).run(
        WORKER,
        process_group=False,
        run_dir=str(other),
        bad=[],
        spikes=spikes,
        resume=str(storage.directory(rewound, 4)),
        **options,
    )
    assert answer["status"] == 0, answer
    after = [line for line in metrics(rewound) if line["step"] > 4]
    assert after == metrics(other) and len(after) >= 5
    assert_same_state(storage.directory(rewound, 9), storage.directory(other, 9))
    # What the history says of steps and samples is what the ranks asked their source for.
    spans = [_span(one) for one in run_history.read(rewound)]
    assert [(one.first_step, one.first_sample) for one in spans] == [(0, 0), (5, first(7))]
    last = answers[0]["asked"]
    assert last[-1] <= first(11) and not set(range(first(5), first(7))) & set(answer["asked"])
    plan: Any = type("Plan", (), {"first_sample": 0, "fingerprint": spans[0].data})
    assert steps(spans, plan, range(first(5), first(7))) == []
    assert steps(spans, plan, range(first(4), first(8))) == [4, 5]
    assert storage.read_manifest(storage.directory(rewound, 9))["samples"] == first(11)
    spent = goodput.goodput(goodput.read(rewound))
    assert spent["lost"] > 0 and spent["rewinding"] > 0


def test_a_killed_run_still_passes_over_the_samples(ranks: RanksOf, tmp_path: Path) -> None:
    """Kills a run that went back before step 6 before it gets there again."""
    options: dict[str, Any] = {
        "model": MODELS["dense"],
        "steps": 8,
        "every": 4,
        "keep": 9,
        "spikes": {"action": "rewind"},
    }
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for run in (straight, killed):
        for fail in (4, None) if run is killed else (None,):
            (answer,) = ranks(1).run(
                WORKER, process_group=False, run_dir=str(run), bad=[first(5)], fail_after_rewind=fail, **options
            )
            assert answer["status"] == 0 if fail is None else answer["error"] == "the node went away"
    assert metrics(killed) == metrics(straight)
    assert_same_state(storage.directory(straight, 8), storage.directory(killed, 8))
    assert len(json.loads((killed / rewind_history.FILE).read_text())) == 1


def test_too_many_rewinds_end_the_run(ranks: RanksOf, tmp_path: Path) -> None:
    spikes = {"action": "rewind", "most_rewinds": 1}
    options: dict[str, Any] = {"run_dir": str(tmp_path), "model": MODELS["dense"], "steps": 8, "spikes": spikes}
    (answer,) = ranks(1).run(WORKER, process_group=False, bad=[first(5), first(6)], **options)
    assert answer["error"].startswith(
        "step 6: loss not finite; gradient norm not finite; the first tensor that is not "
    )
    assert "finite is the loss on rank 0, micro-batch 1 of 4: 1 of 1 values of []" in answer["error"]
    assert f", of sample {first(6)}; sample {first(6) + 1}; the run went back 1 times in" in answer["error"]
    assert "now step 6 is bad; spikes.most_rewinds = 1 allows no more" in answer["error"]
    assert storage.steps(tmp_path)[-1] == 4


def first(step: int) -> int:
    """Returns the first sample of a step, counted from 0."""
    return step * GLOBAL_BATCH


def _span(one: dict[str, Any]) -> DataSpan:
    return DataSpan(one["first_step"], one["first_sample"], one["global_batch_size"], one["data"], "")
