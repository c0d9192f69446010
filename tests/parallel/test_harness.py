"""Pool of ranks: worlds of several sizes on the same processes, and reports of failures, hangs and deaths."""

import socket
import time
from pathlib import Path

import pytest

from launch.ranks import free_port
from tests.parallel import harness
from tests.parallel.forks import Forks
from tests.parallel.harness import RankError, RankPool, RanksOf

WORKERS = "tests.parallel.workers.harness"


def test_worlds_of_several_sizes_reuse_the_same_processes(ranks: RanksOf) -> None:
    values = [1.0, 20.0, 300.0, 4000.0]
    two = ranks(2).run(f"{WORKERS}:total", values=values)
    four = ranks(4).run(f"{WORKERS}:total", values=values)
    one = ranks(1).run(f"{WORKERS}:total", values=values)
    assert [r["total"] for r in two] == [21.0] * 2
    assert [r["total"] for r in four] == [4321.0] * 4
    assert [r["total"] for r in one] == [1.0]
    assert [r["world_size"] for r in four] == [4] * 4
    assert [r["pid"] for r in two] == [r["pid"] for r in four[:2]]
    assert len({r["pid"] for r in four}) == 4


def test_a_training_command_collects_no_garbage_until_its_ranks_are_joined(forks: Forks, tmp_path: Path) -> None:
    assert forks.start(f"{WORKERS}:garbage_collected", tmp_path / "log").wait() == 0, (tmp_path / "log").read_text()


def test_ranks_of_one_machine_listen_on_loopback_alone(ranks: RanksOf) -> None:
    found = ranks(2).run(f"{WORKERS}:listening", process_group=False)
    assert len(found[0]) > len(found[1]) > 0, "both listen by gloo, and the first has the store, too"
    assert {address for each in found for address in each} <= {"0100007F", f"{'0' * 16}FFFF00000100007F"}


def test_an_exception_in_one_rank_reaches_the_test_and_spoils_nothing(ranks: RanksOf, rank_pool: RankPool) -> None:
    rank_pool.close()  # so that no process is replaced in between for its many threads
    before = ranks(2).run(f"{WORKERS}:total", values=[1.0, 2.0])
    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 failed first.*ValueError: planted in rank 1"):
        ranks(2).run(f"{WORKERS}:fail_in", rank=1)
    assert time.monotonic() - start < 10, "rank 0 should fail at once when rank 1 leaves, not run into a timeout"
    after = ranks(2).run(f"{WORKERS}:total", values=[1.0, 2.0])
    assert [r["pid"] for r in after] == [r["pid"] for r in before]
    assert after[0]["total"] == 3.0


def test_a_hang_is_ended_and_named_with_its_stack(rank_pool: RankPool) -> None:
    rank_pool.ranks(2).run(f"{WORKERS}:total", values=[1.0, 2.0])  # so that the three seconds are not those of a start
    with pytest.raises(RankError, match=r"(?s)no answer from rank\(s\) 1 of 2 in 3 s.*hang_in"):
        rank_pool.ranks(2).run(f"{WORKERS}:hang_in", rank=1, timeout=3)
    assert rank_pool.ranks(2).run(f"{WORKERS}:total", values=[1.0, 2.0])[1]["total"] == 3.0


def test_a_death_is_named_with_the_end_of_its_log(ranks: RanksOf) -> None:
    with pytest.raises(RankError, match=r"(?s)rank 0 of 2.*status 7.*last words"):
        ranks(2).run(f"{WORKERS}:die_in", rank=0)
    assert ranks(2).run(f"{WORKERS}:total", values=[1.0, 2.0])[0]["total"] == 3.0


def test_a_port_that_another_process_takes_is_exchanged(rank_pool: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", free_port()))
        other.listen()
        ports = [other.getsockname()[1], free_port()]
        monkeypatch.setattr(harness, "free_port", lambda: ports.pop(0))
        assert rank_pool.ranks(1).run(f"{WORKERS}:total", values=[1.0])[0]["total"] == 1.0
        ports = [other.getsockname()[1], free_port()]
        with pytest.raises(RankError, match="EADDRINUSE"):  # a function that meets by itself may have begun
            rank_pool.ranks(1).run(f"{WORKERS}:bring_up_own_group", process_group=False)
    assert rank_pool.ranks(2).run(f"{WORKERS}:total", timeout=20, values=[1.0, 2.0])[1]["total"] == 3.0


def test_groups_and_random_state_do_not_leak_from_call_to_call(ranks: RanksOf) -> None:
    assert ranks(2).run(f"{WORKERS}:megatron_sizes", tp=2) == [[2, 1]] * 2
    assert ranks(2).run(f"{WORKERS}:megatron_sizes", tp=1) == [[1, 2]] * 2
    assert ranks(2).run(f"{WORKERS}:groups_left", process_group=False) == [False] * 2
    assert ranks(2).run(f"{WORKERS}:bring_up_own_group", process_group=False) == [2, 2]
    assert ranks(1).run(f"{WORKERS}:draw") == ranks(1).run(f"{WORKERS}:draw")
