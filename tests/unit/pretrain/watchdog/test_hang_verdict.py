"""The sentence that names the rank which holds up the others, for reports of four ranks written by hand."""

from dataclasses import replace

from pretrain.watchdog.hang_verdict import verdict
from pretrain.watchdog.rank_report import Collective, RankReport

GROUPS = {
    0: {"1": ("tensor model parallel group", [0, 1]), "3": ("data parallel group", [0, 2])},
    1: {"1": ("tensor model parallel group", [0, 1]), "4": ("data parallel group", [1, 3])},
    2: {"2": ("tensor model parallel group", [2, 3]), "3": ("data parallel group", [0, 2])},
    3: {"2": ("tensor model parallel group", [2, 3]), "4": ("data parallel group", [1, 3])},
}


def _reduce(group: str, number: int, pending: bool = False, size: int = 8) -> Collective:
    return Collective(group, number, "all_reduce", [[size]], pending)


def _report(rank: int, *collectives: Collective) -> RankReport:
    return RankReport(
        rank,
        7,
        "training",
        2,
        0,
        True,
        "forward pass",
        f"pretrain/model/layers.py:{rank} in forward",
        "",
        list(collectives),
    )


def _world(*collectives: tuple[Collective, ...]) -> dict[int, RankReport]:
    return {rank: replace(_report(rank, *found), groups=GROUPS[rank]) for rank, found in enumerate(collectives)}


def test_a_chain_of_waits_ends_at_the_rank_that_waits_for_nobody() -> None:
    """Reports that rank 2 waits for 0 in a data-parallel sum, 0 for 1 in a tensor-parallel one, and 3 for 1 too."""
    said = verdict(
        _world(
            (_reduce("1", 5, pending=True), _reduce("3", 2)),
            (_reduce("1", 4), _reduce("4", 2)),
            (_reduce("2", 5), _reduce("3", 3, pending=True)),
            (_reduce("2", 5), _reduce("4", 3, pending=True)),
        ),
        {},
    )
    assert said == (
        "rank 1 is late: it is in step 7, the forward pass of pipeline stage 0 (forward passes begun: 2), at "
        "pretrain/model/layers.py:1 in forward; rank 0 waits for it in all_reduce no. 5 of the tensor model parallel "
        "group of ranks 0, 1"
    )


def test_the_first_difference_counts() -> None:
    """Reports that ranks 2 and 3 differ in size at number 5, and in operation at 6, which follows from it."""
    said = verdict(
        _world(
            (_reduce("1", 9),),
            (_reduce("1", 9),),
            (_reduce("2", 5, size=8), _reduce("2", 6, pending=True)),
            (_reduce("2", 5, pending=True, size=9), Collective("2", 6, "barrier", [], True)),
        ),
        {},
    )
    assert said.startswith(
        "ranks 2 and 3 entered different collectives as no. 5 of the tensor model parallel group of ranks 2, 3: "
        "rank 2 all_reduce of 8, rank 3 all_reduce of 9"
    )


def test_ranks_that_wait_for_each_other_are_all_named() -> None:
    said = verdict(
        _world(
            (_reduce("1", 5, pending=True), _reduce("3", 2)),
            (_reduce("1", 4), _reduce("4", 3, pending=True)),
            (_reduce("2", 5, pending=True), _reduce("3", 2)),
            (_reduce("2", 4), _reduce("4", 2)),
        )
        | {3: replace(_report(3, _reduce("2", 4), _reduce("4", 2)), groups=GROUPS[3])},
        {},
    )
    assert said.startswith("rank 3 is late")
    circle = {
        rank: replace(
            _report(rank), groups=GROUPS[rank], waiting={"kind": "recv", "peer": 1 - rank, "number": 4}, messages={}
        )
        for rank in (0, 1)
    }
    assert verdict(circle, {}).startswith(
        "ranks wait for each other, since they entered collectives in different orders: rank 0 in recv no. 4 from rank "
        "1, in step 7, the forward pass of pipeline stage 0"
    )


def test_a_message_that_was_sent_is_not_waited_for() -> None:
    """Reports that rank 0 waits for its send to 1, which has begun to receive it; rank 1 computes."""
    reports = {
        0: replace(_report(0), waiting={"kind": "send", "peer": 1, "number": 4}),
        1: replace(_report(1), messages={"recv 0": 4}),
    }
    assert verdict(reports, {}).startswith("no rank waits for another: rank 0 is in step 7")
    reports[1] = replace(_report(1), messages={"recv 0": 3})
    assert verdict(reports, {}).startswith("rank 1 is late")


def test_absent_ranks_come_first() -> None:
    reports = _world((_reduce("1", 5, pending=True),), (), (), ())
    del reports[1]
    assert verdict(reports, {1: "process 9 on host a has ended"}) == (
        "rank 1 gives no sign of life: process 9 on host a has ended; rank 0 waits for it in all_reduce no. 5 of the "
        "tensor model parallel group of ranks 0, 1"
    )


def test_reports_survive_json() -> None:
    report = replace(_report(1, _reduce("4", 3, pending=True)), groups=GROUPS[1], messages={"send 0": 2})
    assert RankReport.from_json(report.as_json()) == report
