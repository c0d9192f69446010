"""The sentence that says which rank holds up the others, from the reports of all ranks: a pure function.

Ranks that wait for others are followed to those that wait for nobody: these are late. Where every rank waits, they wait
for each other, most often because they entered different collectives.
"""

from collections.abc import Mapping

from pretrain.logs.activities import TRAINING
from pretrain.watchdog.rank_report import Collective, RankReport

_SAME_SIZES = ("all_reduce", "allreduce", "broadcast", "reduce_scatter", "reduce")  # operations of equal tensors


def verdict(reports: Mapping[int, RankReport], absent: Mapping[int, str]) -> str:
    """Returns one sentence on why a run stands still.

    `reports` are those of the ranks that answered, by rank; `absent` says of every other rank what is known of it.
    """
    if absent:
        told = "; ".join(f"rank {rank} gives no sign of life: {state}" for rank, state in sorted(absent.items()))
        waiting = _first_wait(reports, absent)
        return told + (f"; {waiting}" if waiting else "")
    return _mismatch(reports) or _late(reports)


def _first_wait(reports: Mapping[int, RankReport], absent: Mapping[int, str]) -> str:
    for rank, report in sorted(reports.items()):
        for ranks, what in _waits(report, reports):
            if set(ranks) & set(absent):
                return f"rank {rank} waits for it in {what}"
    return ""


def _mismatch(reports: Mapping[int, RankReport]) -> str:
    """Returns a clause on the first collective of a group that two ranks entered differently; "" if there is none."""
    entered: dict[tuple[str, int], list[tuple[int, Collective]]] = {}
    for rank, report in sorted(reports.items()):
        for found in report.collectives:
            entered.setdefault((found.group, found.number), []).append((rank, found))
    # In the order of the numbers, since all collectives that follow a wrong one differ too.
    for (group, number), found_by in sorted(entered.items(), key=lambda item: item[0][1]):
        first_rank, first = found_by[0]
        for rank, other in found_by[1:]:
            sized = first.operation in _SAME_SIZES and first.sizes != other.sizes
            if (first.operation != other.operation or sized) and (first.pending or other.pending):
                return (
                    f"ranks {first_rank} and {rank} entered different collectives as no. {number} of "
                    f"{_group(group, reports[rank])}: rank {first_rank} {_described(first)}, rank {rank} "
                    f"{_described(other)}; rank {first_rank} is in {_position(reports[first_rank])}; rank {rank} is in "
                    f"{_position(reports[rank])}"
                )
    return ""


def _late(reports: Mapping[int, RankReport]) -> str:
    waits = {rank: _waits(report, reports) for rank, report in reports.items()}
    late = sorted({peer for found in waits.values() for ranks, _ in found for peer in ranks if not waits[peer]})
    if late:
        told = "; ".join(f"rank {rank} is late: it is in {_position(reports[rank])}" for rank in late)
        waiter, what = next(
            (rank, what) for rank, found in sorted(waits.items()) for ranks, what in found if set(ranks) & set(late)
        )
        return f"{told}; rank {waiter} waits for it in {what}"
    if any(waits.values()):
        told = "; ".join(
            f"rank {rank} in {found[0][1]}, in {_position(reports[rank])}"
            for rank, found in sorted(waits.items())
            if found
        )
        return f"ranks wait for each other, since they entered collectives in different orders: {told}"
    told = "; ".join(f"rank {rank} is in {_position(report)}" for rank, report in sorted(reports.items()))
    return f"no rank waits for another: {told}"


def _waits(report: RankReport, reports: Mapping[int, RankReport]) -> list[tuple[list[int], str]]:
    """Returns for each pending collective or message of a rank (the ranks that it waits for, its description)."""
    found = []
    for pending in report.collectives:
        if not pending.pending or pending.group not in report.groups:
            continue
        _, members = report.groups[pending.group]
        behind = [
            rank
            for rank in members
            if rank != report.rank and _last_number(reports.get(rank), pending.group) < pending.number
        ]
        if behind:
            found.append((behind, f"{pending.operation} no. {pending.number} of {_group(pending.group, report)}"))
    if report.waiting:
        kind, peer, number = (report.waiting[name] for name in ("kind", "peer", "number"))
        other, verb = ("recv", "to") if kind == "send" else ("send", "from")
        answer = reports.get(peer)
        if answer is None or answer.messages.get(f"{other} {report.rank}", 0) < number:
            found.append(([peer], f"{kind} no. {number} {verb} rank {peer}"))
    return found


def _last_number(report: RankReport | None, group: str) -> int:
    return max((found.number for found in report.collectives if found.group == group), default=0) if report else 0


def _group(name: str, report: RankReport) -> str:
    purpose, ranks = report.groups.get(name, ("", []))
    if purpose in ("default pg", ""):
        return "the world" if ranks else f"group {name}"
    if purpose == "undefined":
        purpose = "group"
    return f"the {purpose} of ranks {', '.join(map(str, ranks))}"


def _described(collective: Collective) -> str:
    sizes = " and ".join("x".join(map(str, size)) or "scalar" for size in collective.sizes[:2])
    return f"{collective.operation} of {sizes}" if sizes else collective.operation


def _position(report: RankReport) -> str:
    parts = [f"step {report.step}"]
    if report.activity != TRAINING:
        parts.append(report.activity)
    elif report.phase:
        begun = f" (forward passes begun: {report.micro_batches})" if "pass" in report.phase else ""
        parts.append(f"the {report.phase} of pipeline stage {report.stage}{begun}")
    location = report.location or report.innermost
    within = "" if report.innermost in ("", location) else f" ({report.innermost})"
    return ", ".join(parts) + f", at {location}{within}"
