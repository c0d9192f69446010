"""Starts training runs and steps of proofs in ranks; reads logs, checkpoints and the documents that runs trained on."""

import json
from pathlib import Path
from typing import Any

import torch

from data_pipeline.mixture.earlier import find
from data_pipeline.provenance import trace
from data_pipeline.provenance.lookup import data_spans, steps
from pretrain.checkpoint import storage
from pretrain.proof.fuzz import Run
from tests.parallel.harness import Ranks, RanksOf
from tests.parallel.matrix import MODELS, parts_of

TRAIN = "tests.parallel.workers.training:train"


def train(
    ranks: Ranks, run_dir: Path, model: str, parallel: dict[str, int], layers: int = 2, **options: Any
) -> list[dict[str, Any]]:
    """Trains six steps and returns each rank's answer; `options` are those of `workers.training.train`.

    The model has `layers` layers, or as many as the pipeline has parts.
    """
    return ranks.run(
        TRAIN,
        process_group=False,
        run_dir=str(run_dir),
        model={**MODELS[model], "num_layers": max(layers, parts_of(parallel))},
        parallel=parallel,
        **{"steps": 6, **options},
    )


def steps_recorded_on(ranks: RanksOf) -> Run:
    """Returns a function that records the steps of a fuzzer's draw on the ranks of the tests."""

    def run(world: int, config: dict[str, Any], precision: str, inject: str | None, reference: Path | None) -> None:
        settings: dict[str, Any] = {"config": config, "precision": precision, "inject": inject, "reference": reference}
        ranks(world).run("tests.parallel.workers.proof:prove", process_group=False, **settings)

    return run


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Reads the log, without values that depend on the clock and the machine."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    varying = ("tokens_per_s", "memory_bytes", "save_copy_s")
    return [{k: v for k, v in line.items() if k not in varying} for line in lines]


def assert_same_state(a: Path, b: Path) -> None:
    """Asserts that two checkpoints have the same weights and optimizer state, bit by bit."""
    for kind in storage.KINDS:
        one, other = storage.read_full(a, kind), storage.read_full(b, kind)
        assert one.keys() == other.keys()
        differing = [name for name in one if not torch.equal(one[name], other[name])]
        assert not differing, f"{kind} of {differing}"
        assert any(tensor.any() for tensor in one.values())


def trained_on(run_dir: Path) -> list[dict[str, Any]]:
    """Returns every segment of every step, as `trivium data trace` finds them."""
    run, found = data_spans(run_dir), []
    for step in range(storage.steps(run_dir)[-1]):
        data_span = next(one for one in reversed(run) if one.first_step <= step)
        plan = find(data_span.plan, data_span.data)
        assert plan is not None
        segments = trace.batch(plan, data_span, step)
        assert all(steps(run, plan, [segment["sample"]]) == [step] for segment in segments)
        found += [{**segment, "step": step} for segment in segments]
    return found
