"""Rehearsals: which ranks are run, how their calls are compared, and the command. Real steps are in tests/parallel."""

import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from configs.layout import Layout
from configs.loader import ConfigError, load, validate
from configs.model import ModelConfig
from configs.train import ParallelConfig, PretrainConfig, TrainSection
from posttrain import rehearse
from pretrain.rehearsal.collective_calls import Group, GroupCall
from pretrain.rehearsal.comparison import mismatch
from pretrain.rehearsal.distinct_ranks import coordinates_of, distinct_micro_batches, distinct_ranks, smallest_world
from pretrain.rehearsal.rehearsal_rank import RehearsedRank
from pretrain.rehearsal.rehearsed_training import _report
from tests.parallel.forks import Forks

DEMO = "configs/pretrain/demo.toml"
DEMO_MOE = "configs/pretrain/demo_moe.toml"
SMALL = ("train.seq_length=64", "train.micro_batch_size=1", "model.num_layers=2")
TP = Group("tp", (0, 1))
SUM = GroupCall(TP, "all_reduce", "float32", 8, 32, on_host=False, phase="backward pass", location="pretrain/x.py:1")


def _layout(world: int, **parallel: int) -> Layout:
    model = {
        "vocab_size": 64,
        "num_layers": 8,
        "hidden_size": 64,
        "ffn_hidden_size": 64,
        "num_heads": 8,
        "num_kv_heads": 8,
    }
    moe = {"moe": {"num_experts": 8, "top_k": 2}} if "ep" in parallel else {}
    section = TrainSection(steps=1, global_batch_size=64, micro_batch_size=1, seq_length=64)
    return Layout.of(world, validate(ParallelConfig, parallel), validate(ModelConfig, model | moe), section)


@pytest.mark.parametrize(
    "layout",
    [
        _layout(1),
        _layout(64, tp=4, pp=2),
        _layout(64, tp=2, cp=2, ep=4, pp=2),
        _layout(64, ep=8),
        _layout(16, cp=4, tp=2),
        _layout(32, cp=2, ep=8),
    ],
    ids=str,
)
def test_every_kind_of_group_has_two_ranks_that_are_run(layout: Layout) -> None:
    run = distinct_ranks(layout)
    assert run == sorted(set(run))
    assert {coordinates_of(rank, layout).stage for rank in run} == set(range(layout.pp))
    assert all(coordinates_of(rank, layout).rank(layout) == rank for rank in range(layout.world_size))
    groups: dict[str, dict[tuple[int, ...], list[int]]] = {}
    for rank in run:
        stage, data, tensor = (getattr(coordinates_of(rank, layout), name) for name in ("stage", "data", "tensor"))
        for kind, size, key in (
            ("tp", layout.tp, (stage, data)),
            ("cp", layout.cp, (stage, data // layout.cp, tensor)),
            ("ep", layout.ep, (stage, data // layout.ep, tensor)),
            ("dp", layout.dp, (stage, data % layout.cp, tensor)),
            ("expert-dp", layout.dp * layout.cp // layout.ep, (stage, data % layout.ep, tensor)),
            ("pp", layout.pp, (data, tensor)),
        ):
            if size > 1:
                groups.setdefault(kind, {}).setdefault(key, []).append(rank)
    for kind, found in groups.items():
        assert max(len(members) for members in found.values()) >= 2, kind


def test_512_ranks_take_four_on_each_stage() -> None:
    assert len(distinct_ranks(_layout(512, tp=8, pp=8))) == 4 * 8
    assert distinct_ranks(_layout(512, tp=8, pp=8))[:4] == [0, 7, 56, 63]


def test_the_smallest_world_has_room_for_all_degrees() -> None:
    assert smallest_world(ParallelConfig(tp=2, pp=4, cp=2, ep=8)) == 64
    assert smallest_world(ParallelConfig(cp=4, ep=2)) == 4


def test_micro_batches_that_show_the_schedule() -> None:
    assert distinct_micro_batches(_layout(16, tp=4)) == 2
    assert distinct_micro_batches(_layout(16, pp=4)) == 5
    assert distinct_micro_batches(_layout(16, pp=4, vpp=2)) == 8
    assert distinct_micro_batches(_layout(64)) == 1


def test_equal_calls_fit_together() -> None:
    assert mismatch({0: [SUM, SUM], 1: [SUM, replace(SUM, location="pretrain/y.py:2")]}) == ""


def test_the_first_difference_in_the_step_is_told() -> None:
    world = Group("world", (0, 1, 2))
    late = replace(SUM, group=world)
    other = replace(SUM, operation="all_gather", numel=4)
    found = mismatch({0: [SUM, SUM, late], 1: [SUM, other, replace(late, dtype="bfloat16")], 2: [late]})
    assert found == (
        "ranks 0 and 1 differ in collective no. 2 of the tp group of ranks 0, 1: rank 0 enters all_reduce of 8 float32 "
        "in the backward pass (pretrain/x.py:1) and rank 1 enters all_gather of 4 float32 in the backward pass "
        "(pretrain/x.py:1)"
    )


@pytest.mark.parametrize(
    "change", [{"dtype": "bfloat16"}, {"numel": 9}, {"on_host": True}, {"peer": 1}, {"operation": "broadcast"}]
)
def test_what_a_collective_must_share(change: dict[str, object]) -> None:
    assert mismatch({0: [SUM], 1: [replace(SUM, **change)]})  # type: ignore[arg-type]


def test_a_rank_that_enters_nothing_is_named() -> None:
    assert mismatch({0: [SUM], 1: []}).endswith("and rank 1 enters none")


def test_the_parts_of_an_exchange_must_meet() -> None:
    def exchange(own: int, sent: tuple[int, int], received: tuple[int, int]) -> GroupCall:
        return replace(SUM, operation="all_to_all", numel=sum(sent), peer=own, sent=sent, received=received)

    assert mismatch({0: [exchange(0, (1, 2), (1, 3))], 1: [exchange(1, (3, 4), (2, 4))]}) == ""
    assert "all_to_all" in mismatch({0: [exchange(0, (1, 2), (1, 4))], 1: [exchange(1, (3, 4), (2, 4))]})


def test_a_message_needs_an_equal_other_end() -> None:
    pp = Group("pp", (0, 1))
    send = replace(SUM, group=pp, operation="send", peer=1)
    recv = replace(SUM, group=pp, operation="recv", peer=0)
    assert mismatch({0: [send, send], 1: [recv, recv]}) == ""
    assert mismatch({0: [send]}) == ""  # the peer is not run
    assert mismatch({0: [send, send], 1: [recv, replace(recv, numel=4)]}).startswith(
        "ranks 0 and 1 differ in message no. 2 of rank 0 to rank 1 in the pp group of ranks 0, 1: rank 0 enters send"
    )
    assert mismatch({0: [], 1: [recv]}).startswith("ranks 0 and 1 differ in message no. 1 of rank 0 ")


def test_bytes_are_those_of_rings_and_direct_messages() -> None:
    four = replace(SUM, group=Group("dp", (0, 1, 2, 3)))  # of 32 bytes
    assert four.bytes_sent == 48
    assert replace(four, operation="all_gather").bytes_sent == 96
    assert replace(four, operation="reduce_scatter").bytes_sent == 24
    assert replace(four, operation="all_to_all", peer=1, sent=(2, 2, 2, 2)).bytes_sent == 24
    assert replace(four, operation="recv", peer=1).bytes_sent == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("parallel.tp=3", "--world", "8"), "does not divide the 8 ranks started"),
        (("parallel.tp=8", "--world", "8"), "model.num_heads = 4 is not a multiple of"),
        (
            ("parallel.zero=3", "train.global_batch_size=32", "--micro-batches", "2"),
            "--micro-batches 2 is too few at parallel.zero = 3",
        ),
        (("--world", "many"), "--world many is no number"),
        (("--micro-batches", "9"), "--micro-batches 9 is more than the 2 of a step"),
        (("--device", "tpu"), "--device tpu is neither gpu nor cpu"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused(options: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rehearse.main([DEMO, *options, "--dry-run"])


@pytest.mark.parametrize("name", ["sft", "rm", "dpo", "ppo", "grpo", "distill"])
def test_a_config_tells_its_command(name: str) -> None:
    assert rehearse.command_of([f"configs/posttrain/demo_{name}.toml", "--world", "4"]) == name
    assert rehearse.command_of(["--world", "4", DEMO]) == "train"


def test_a_config_of_sampling_is_refused() -> None:
    with pytest.raises(ConfigError, match="those of a sample config, which trains nothing"):
        rehearse.main(["configs/posttrain/demo_sample.toml"])


def test_the_message_on_an_illegal_layout_is_that_of_training() -> None:
    overrides = ["parallel.ep=3"]
    config = load(PretrainConfig, DEMO_MOE, overrides)
    with pytest.raises(ConfigError) as of_training:
        Layout.of(6, config.parallel, config.model, config.train)
    with pytest.raises(ConfigError) as of_rehearsal:
        rehearse.main([DEMO_MOE, *overrides, "--world", "6"])
    assert str(of_rehearsal.value) == str(of_training.value)


def test_the_command_tells_which_ranks_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert Path(DEMO).exists()
    options = ["--world", "128", "parallel.tp=4", "parallel.pp=2", "train.global_batch_size=64", "--dry-run"]
    assert rehearse.main([DEMO, *options]) == 0
    out = capsys.readouterr().out
    assert "Runs 10 of 128 ranks, 0, 1, 3, 60, 63 and their like in each of the 2 stages" in out
    assert rehearse.main([DEMO, *options, "--all"]) == 0
    assert "Runs every rank: 0 to 127." in capsys.readouterr().out


def test_a_difference_and_a_failure_end_with_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    layout, once = _layout(2, tp=2), Fraction(1)
    other = replace(SUM, numel=9, bytes=36)
    assert _report([RehearsedRank(0, 0, [SUM]), RehearsedRank(1, 0, [other])], layout, once, 1.0) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: ranks 0 and 1 differ in collective no. 1 of the tp group of ranks 0, 1")
    assert "fit together" not in said.out
    failed = RehearsedRank(1, 0, [SUM], failure="RuntimeError: no shape at pretrain/x.py:1 in forward")
    assert _report([RehearsedRank(0, 0, [SUM]), failed], layout, once, 1.0) == 1
    assert capsys.readouterr().err == (
        "error: rank 1 (stage 0, tensor-parallel rank 1) fails: RuntimeError: no shape at pretrain/x.py:1 in forward\n"
    )
    assert _report([RehearsedRank(0, 0, [SUM]), RehearsedRank(1, 0, [SUM])], layout, once, 1.0) == 0
    assert "All 2 calls of 2 ranks fit together" in capsys.readouterr().out


def test_a_part_of_the_micro_batches_tells_the_bytes_of_all(forks: Forks, tmp_path: Path) -> None:
    """Rehearses in a process that has computed nothing each time: after a backward pass, forks cannot take one."""

    def printed(*options: str) -> list[str]:
        log = tmp_path / str(len(options))
        parallel = ("parallel.tp=2", "parallel.sp=true", "parallel.pp=2")
        argv = [DEMO, *parallel, "train.global_batch_size=5", *SMALL, *options]
        assert forks.start("posttrain.rehearse:main", log, argv=argv).wait() == 0, log.read_text()
        return log.read_text().splitlines()

    whole, part = printed("--micro-batches", "5"), printed()
    assert "Runs 3 of 5 micro-batches" in "\n".join(part) and "Runs 3 of 5" not in "\n".join(whole)
    tables = [[line for line in lines if line.startswith(" ")] for lines in (whole, part)]
    assert tables[0] == tables[1] and len(tables[0]) > 10
    assert whole[-1].startswith("All ") and "fit together" in whole[-1]


def test_micro_batches_of_stage_3_that_are_not_run_are_those_of_the_middle(forks: Forks, tmp_path: Path) -> None:
    def printed(*options: str) -> list[str]:
        log = tmp_path / str(len(options))
        argv = [DEMO, "parallel.zero=3", "--world", "2", "train.global_batch_size=12", *SMALL, *options]
        assert forks.start("posttrain.rehearse:main", log, argv=argv).wait() == 0, log.read_text()
        return log.read_text().splitlines()

    whole, part = printed("--micro-batches", "6"), printed()
    assert "Runs 4 of 6 micro-batches" in "\n".join(part)
    tables = [[line for line in lines if line.startswith(" ")] for lines in (whole, part)]
    assert tables[0] == tables[1] and len(tables[0]) > 6


@pytest.mark.full
def test_a_rehearsal_whose_process_dies_is_done_by_one_as_the_message_says(forks: Forks, tmp_path: Path) -> None:
    argv, log = [DEMO, "parallel.tp=2", *SMALL, "--processes"], tmp_path / "log"
    rehearsal = forks.start("posttrain.rehearse:main", log, argv=[*argv, "2"])
    children = Path(f"/proc/{rehearsal.pid}/task/{rehearsal.pid}/children")
    while not (pids := children.read_text().split()):
        time.sleep(0.01)
    os.kill(int(pids[0]), signal.SIGKILL)
    assert rehearsal.wait() != 0
    assert "a process has died, most likely for lack of memory; give --processes 1" in log.read_text()
    assert forks.start("posttrain.rehearse:main", log, argv=[*argv, "1"]).wait() == 0, log.read_text()


@pytest.mark.full
def test_512_ranks_of_a_model_of_70_billion_take_less_than_two_minutes_of_two_cores() -> None:
    argv = [sys.executable, "-m", "posttrain.rehearse", "configs/pretrain/llama3_8b.toml", "model=llama-3-70b"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*argv, "--world", "512", "parallel.tp=8", "parallel.pp=8"], capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "Runs 32 of 512 ranks, 0, 7, 56, 63 and their like in each of the 8 stages" in done.stdout
    assert "calls of 32 ranks fit together" in done.stdout
    # Of processors and not by the clock, since other programs may use the cores.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2 * 120
