"""`trivium drill` without its runs: how it shrinks a config, what it refuses, and what it makes of numbers."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.loader import ConfigError, Failure, load
from configs.train import PretrainConfig
from data_pipeline.mixture.rows import Plan
from launch.processes import ProcessGroup
from pretrain.drill import drill
from pretrain.drill.drilled_run import DrilledRun, DrillError, share_of_node
from pretrain.drill.small_config import VOCABULARIES, SmallConfig, default_ranks, fit_layout, given_keys, make_small
from pretrain.drill.stand_in_rows import make_rows
from pretrain.drill.verdicts import SAME, DrillOutcome, Numbers, as_record, summary

DEMO, LLAMA = "configs/pretrain/demo.toml", "configs/pretrain/llama3_8b.toml"


def small(config: str, ranks: int, *overrides: str, has_plan: bool = False) -> SmallConfig:
    made = SmallConfig(load(PretrainConfig, config, overrides), ranks, given_keys(overrides))
    fit_layout(made)
    make_small(made, has_plan)
    return made


@pytest.mark.parametrize(
    ("overrides", "ranks", "layout"),
    [
        ((), 2, "tp2 sp pp1 dp1 zero1"),
        (("parallel.pp=2", "parallel.vpp=2"), 4, "tp2 sp pp2 vpp2 dp1 zero1"),
        (("model=deepseek-v3", "parallel.ep=2"), 4, "tp2 sp pp1 dp2 ep2 zero1"),
        (("model=gemma-3-1b", "parallel.zero=3"), 4, "tp2 sp pp1 dp2 zero3"),
        (("model=qwen3-next-80b-a3b", "parallel.tp=2"), 4, "tp2 sp pp1 dp2 zero1"),
    ],
)
def test_a_large_model_becomes_small_in_its_own_layout(overrides: tuple[str, ...], ranks: int, layout: str) -> None:
    made = small(LLAMA, ranks, *overrides)
    before, after = load(PretrainConfig, LLAMA, overrides).model, made.config.model
    assert str(made.layout) == layout and after.num_parameters() < 1_000_000
    assert (after.moe is None) == (before.moe is None)
    assert {layer.attention.pattern for layer in after.layers} <= {layer.attention.pattern for layer in before.layers}
    assert after.attention.qk_norm == before.attention.qk_norm and after.position.scaling == before.position.scaling
    assert (made.layout.grad_accum_steps > 1 and made.layout.kv_copies == 1) or before.num_kv_heads == 1


def test_a_plan_keeps_rows_and_vocabulary_and_a_key_that_is_given_its_value() -> None:
    config = small(LLAMA, 2, "model.num_layers=6", has_plan=True).config
    assert (config.train.seq_length, config.model.vocab_size, config.model.num_layers) == (8192, 128256, 6)
    assert small(DEMO, 2).config.model.hidden_size == 128  # which is small enough


def test_a_batch_that_is_small_stays_and_one_that_is_not_legal_grows() -> None:
    assert small(DEMO, 2, "parallel.pp=2").config.train.global_batch_size == 2
    assert small(DEMO, 4).config.train.global_batch_size == 8
    assert small(LLAMA, 4, "parallel.pp=2").config.train.global_batch_size == 4


def test_nodes_that_share_a_machine_have_as_many_cores_each() -> None:
    assert [share_of_node({0, 1, 2, 3, 4}, node, 2) for node in (0, 1)] == [[0, 1], [2, 3]]
    assert share_of_node({7}, 1, 2) == [7]


def test_degrees_are_lowered_until_the_ranks_suffice_and_one_that_is_given_is_not() -> None:
    config = load(PretrainConfig, LLAMA, ("parallel.tp=8", "parallel.pp=4"))
    assert default_ranks(config) == 4 and default_ranks(load(PretrainConfig, DEMO)) == 2
    few = SmallConfig(config, 4, ())
    fit_layout(few)
    assert (few.config.parallel.tp, few.config.parallel.pp) == (2, 2) and few.config.parallel.sp
    alone = SmallConfig(config, 3, ())
    fit_layout(alone)
    assert (alone.config.parallel.tp, alone.config.parallel.pp, alone.config.parallel.sp) == (1, 1, False)
    with pytest.raises(ConfigError, match=r"parallel\.tp=8 and the other degrees need a multiple of 8 ranks"):
        small(LLAMA, 2, "parallel.tp=8")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nproc-per-node", "1"], "one rank alone is missed by no other"),
        (["--nproc-per-node", "17"], "is no number from 2 to 16"),
        (["--only", "kill,stopp"], "'stopp' is none of kill, stop, nan, disk, torn, node"),
        (["--only", "node", "--nproc-per-node", "3"], "3 ranks cannot be divided between two nodes"),
        (["--only", "stop", "watchdog.enabled=false"], "nobody looks for a rank that is stopped"),
    ],
)
def test_what_cannot_be_drilled_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        drill.main([DEMO, "--dry-run", *words])


def test_a_drill_needs_proc_as_its_message_says() -> None:
    """Drills where a file system without files is mounted in place of /proc, and where /proc is."""
    drilled = [sys.executable, "-m", "pretrain.drill.drill", DEMO, "--dry-run"]
    unshare = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("needs unshare of util-linux, and the right to mount")
    done = subprocess.run([*unshare, *drilled], capture_output=True, text=True)
    assert done.returncode == 2
    assert "a drill finds the processes of ranks in /proc, which this system has not; use Linux" in done.stderr
    assert drill.main([DEMO, "--dry-run"]) == 0


@pytest.mark.full
def test_rows_are_made_once_the_vocabulary_is_as_the_message_says(tmp_path: Path) -> None:
    words = r"no rows of 60000 tokens could be made to train on; set model\.vocab_size=(\d+), or name the folder of a"
    with pytest.raises(Failure, match=words) as told:
        make_rows(tmp_path / "data", 64, 144, 60_000)
    named = re.search(words, str(told.value))
    assert named is not None and Plan.open(make_rows(tmp_path / "again", 64, 144, int(named[1]))).num_samples == 144


@pytest.mark.full
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_rows_of_random_words_have_the_vocabulary_of_the_model(tmp_path: Path, vocab_size: int) -> None:
    plan = Plan.open(make_rows(tmp_path / "data", 64, 144, vocab_size))
    assert (plan.vocab_size, plan.seq_length, plan.num_samples) == (vocab_size, 64, 144)


def run_of(folder: Path, *losses: float, state: bytes = b"weights") -> Path:
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": loss, "grad_norm": 1.0, "tokens_per_s": 100.0 * loss, "memory_bytes": id(folder)}
        for step, loss in enumerate(losses, 1)
    ]
    lines.append({"step": len(losses), "eval": {}})
    checkpoint = folder / "checkpoints" / f"step_{len(losses)}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "rank_00000.safetensors").write_bytes(state)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def test_the_last_bit_of_a_step_and_of_a_weight_counts_and_the_clock_does_not(tmp_path: Path) -> None:
    right = Numbers.of_run(run_of(tmp_path / "a", 3.0, 2.0, 1.0), 3)
    assert right.difference(Numbers.of_run(run_of(tmp_path / "b", 3.0, 2.0, 1.0), 3)) == ""
    other = Numbers.of_run(run_of(tmp_path / "c", 3.0, 2.0000000000000004, 1.0), 3)
    assert right.difference(other) == "from step 2 on: loss is 2.0000000000000004, not 2.0"
    assert right.difference(other, until=1) == ""
    short = Numbers.of_run(run_of(tmp_path / "d", 3.0, 2.0), 3)
    assert right.difference(short) == "step 3 is missing" and short.difference(right) == "step 3 is there too many"
    changed = Numbers.of_run(run_of(tmp_path / "e", 3.0, 2.0, 1.0, state=b"weightz"), 3)
    assert right.difference(changed) == "of the weights or the optimizer at the end, in rank_00000.safetensors"
    nothing = Numbers.of_run(tmp_path / "f", 3)
    assert nothing.difference(nothing) == "there is no last checkpoint to compare with"


def test_runs_that_end_too_early_fail_the_drill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = small(DEMO, 2)
    monkeypatch.setattr(drill, "cores", lambda: 1)
    drill._print_setting(DEMO, made, has_plan=False)
    said = capsys.readouterr().out
    assert f"data.plan = {made.config.data.plan!r} is not there, so rows of random words are trained on" in said
    assert "2 ranks share 1 cores, so times are longer than they need be" in said
    monkeypatch.setattr(drill, "cores", lambda: 2)
    drill._print_setting(DEMO, made, has_plan=True)
    assert "is not there" not in (said := capsys.readouterr().out) and "ranks share" not in said
    with ProcessGroup() as group:
        run = DrilledRun(tmp_path / "config.toml", tmp_path, 2, group, print)
        monkeypatch.setattr(DrilledRun, "processes", {0: os.getpid()})
        with pytest.raises(DrillError, match="rank 1 was over before it could be sent SIGKILL"):
            run.kill(1)
        run.kill(0, 0)
    monkeypatch.setattr(DrilledRun, "start", lambda run: None)
    monkeypatch.setattr(DrilledRun, "wait", lambda run: [0, 137])
    monkeypatch.setattr(DrilledRun, "output", "out of memory")
    with pytest.raises(DrillError, match="the run that nothing happens to ended with status 137"):
        next(drill._outcomes(made, tmp_path, {}))
    assert "out of memory" in capsys.readouterr().err


def test_a_difference_fails_the_drill_and_is_told(tmp_path: Path) -> None:
    right, wrong = (Numbers.of_run(run_of(tmp_path / name, loss), 1) for name, loss in (("a", 1.0), ("b", 2.0)))
    good = DrillOutcome("kill", "SIGKILL of rank 1", statuses=[[137], [0]], steps_lost=3, seconds=12.34)
    good.compare(right, right)
    bad = DrillOutcome("node", "SIGKILL of node 1", statuses=[[1, 137], [0, 0]], steps_lost=3, seconds=1.0)
    bad.compare(right, wrong)
    left_out = DrillOutcome("stop", left_out="there is no watchdog")
    assert good.passed and left_out.passed and not bad.passed
    first, fault = good.lines()
    assert first.split() == ["kill", "yes", "137,", "then", "0", "3", "12.3", "s", *SAME.split()]
    assert fault.strip() == "SIGKILL of rank 1"
    assert "1 and 137, then 0 and 0" in bad.lines()[0] and " NO " in bad.lines()[0]
    told = " ".join(line.strip() for line in bad.lines())
    assert "NOT AS EXPECTED: the numbers are not those of the uninterrupted run: different from step 1 on" in told
    assert summary([good, left_out]) == "1 of 1 drills went as expected, 1 left out."
    assert summary([good, bad]) == "1 of 2 drills did not go as expected: node."
    record = json.loads(as_record({"ranks": 2}, [good, bad]))
    assert record["ranks"] == 2 and not record["passed"]
    assert [one["passed"] for one in record["drills"]] == [True, False]
