"""Tests of the training benchmark's own arithmetic: shares of a step, ratios, targets, and a peer that is not there."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import record_function

from pretrain.model.head_loss import HeadLoss
from pretrain.parallel.engine import OPTIMIZER
from tests.bench import environment
from tests.bench.training import contests, shares, targets
from tests.bench.training.contests import LITGPT, OURS, PRODUCTS


def test_the_shares_of_a_step_are_those_of_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    x, logits = torch.ones(256, 256), torch.ones(1000, 1000)
    monkeypatch.setattr(HeadLoss, "__call__", lambda self: (x @ x, [logits.exp() for _ in range(30)]))

    def step(_: int) -> float:
        for _ in range(20):
            torch.mm(x, x)
        torch.nn.functional.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])
        HeadLoss.__call__(HeadLoss.__new__(HeadLoss))
        with record_function(OPTIMIZER):
            for _ in range(30):
                logits.mul(2)
        time.sleep(0.05)
        return 0.0

    found = shares.shares(step, 1)
    assert list(found) == list(shares.PARTS)
    assert sum(found.values()) == pytest.approx(1, abs=0.01)
    assert all(found[part] > 0 for part in ("products", "attention", "loss", "optimizer", "idle"))
    assert found["communication"] == 0
    assert found["other"] < 0.05


def test_every_moment_of_a_step_counts_once() -> None:
    def event(name: str, start: float, end: float, cat: str = "cpu_op", tid: int = 1) -> dict[str, Any]:
        return {"ph": "X", "name": name, "ts": start, "dur": end - start, "cat": cat, "tid": tid}

    events = [
        event("trivium step", 0, 100, "user_annotation"),
        event("aten::linear", 0, 20),
        event("aten::mm", 2, 20),
        event("trivium::causal_documents", 20, 30),
        event("aten::mm", 22, 28),  # of attention
        event(shares.LOSS, 30, 50, "user_annotation"),
        event("aten::mm", 30, 40),
        event("aten::exp", 40, 48),
        event("gloo:all_reduce", 50, 60, "user_annotation", tid=2),
        event(OPTIMIZER, 60, 80, "user_annotation"),
        event("aten::_fused_adamw_", 60, 80),
        event("aten::mm", 0, 100, tid=3),  # another thread
    ]
    found = shares.shares_of(events)
    wanted = {"products": 0.28, "attention": 0.1, "loss": 0.08, "optimizer": 0.2, "communication": 0.1}
    assert found == pytest.approx(wanted | {"other": 0.02, "idle": 0.22})


def record(who: str, speed: float, **more: Any) -> dict[str, Any]:
    usual = {"contest": "dense 34M bf16", "label": who, "compiled": True, "documents": 1, "ranks": 1}
    usual |= {"precision": "bf16", "autocast": False, "shares": {"products": 0.4, "attention": 0.1}}
    return usual | {"who": who, "tokens_per_second": speed, "gflop_per_second": speed / 10} | more


def test_a_target_that_is_missed_comes_with_its_bounds() -> None:
    records = [record(OURS, 500), record("plain", 400), record(LITGPT, 450), record(PRODUCTS, 1000, shares={})]
    contests.compare(records, "second")
    assert records[0]["best_peer"] == LITGPT
    ratio, share = targets.reached(records, "second")
    assert (ratio["reached"], ratio["met"], ratio["free_rest"]) == (1.111, False, 2.22)
    assert (share["reached"], share["met"], share["free_rest"]) == (0.5, False, 1.0)
    assert share["longer"] == pytest.approx(0.8)  # 40% of a step that is twice as long as the products alone


def test_dense_models_meet_both_forms_of_every_peer() -> None:
    for name in ("dense 34M fp32", "dense 120M fp32", "dense 34M bf16", "dense 120M bf16"):
        found = [one for one in contests.contests(False, ["fp32", "bf16"]) if one.name.startswith(name)]
        forms = {(one.who, one.compiled) for contest in found for one in contest.contenders}
        assert {(who, compiled) for who in ("transformers", "plain", LITGPT) for compiled in (False, True)} <= forms
        for contest in found:
            assert contest.has(OURS)
            assert contest.has(PRODUCTS)
            assert len(contest.contenders) <= 9  # which 24 GiB of memory hold
        assert sum(contest.has(LITGPT) for contest in found) == 1


def test_a_peer_that_cannot_be_installed_is_left_out_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)  # an environment that is there is not made anew
    nothing = ["--no-index", "--no-deps", "nothing-of-this-name"]
    with pytest.raises(environment.NoPeer, match=r"^litgpt cannot be used here: ."):
        environment.environment_of("litgpt", tmp_path, nothing, "import nothing")
