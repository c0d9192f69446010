"""Tables of what a rehearsal found: bytes a step by process group, and memory by pipeline stage."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction

from rich.table import Table

from pretrain.rehearsal.collective_calls import GroupCall
from pretrain.rehearsal.rehearsal_rank import RehearsedRank

GB = 1e9
ONCE = Fraction(1)
# Groups in the order of rows; others come after.
ORDER = ("tp", "key-value head", "cp", "ep", "pp", "embedding", "dp", "dp x cp", "expert-dp", "world")


def traffic(ranks: Sequence[RehearsedRank], repeated: Fraction = ONCE) -> Table:
    """Returns the table of calls and bytes a step by group; each row shows the rank that sends most in this group.

    The step has `repeated` times as many micro-batches as were run.
    """

    def times(call: GroupCall) -> Fraction:
        return repeated if call.is_of_micro_batch else ONCE

    by_rank: dict[str, dict[int, list[GroupCall]]] = defaultdict(lambda: defaultdict(list))
    for rank in ranks:
        for call in rank.calls:
            by_rank[call.group.name][rank.rank].append(call)
    table = Table("group", "of ranks", "operation", "calls", "sent, MB", "by rank", box=None)
    for column in (1, 3, 4, 5):
        table.columns[column].justify = "right"
    for name in sorted(by_rank, key=lambda name: ([*ORDER, name].index(name), name)):
        found = by_rank[name]
        most = max(found, key=lambda rank: (sum(times(call) * call.bytes_sent for call in found[rank]), -rank))
        operations: dict[str, list[GroupCall]] = defaultdict(list)
        for call in found[most]:
            operations[call.operation + (" (host)" if call.on_host else "")].append(call)
        shown = name, str(len(found[most][0].group.ranks))
        for operation, calls in operations.items():
            number = round(sum(map(times, calls)))
            sent = round(sum(times(call) * call.bytes_sent for call in calls))
            table.add_row(*shown, operation, f"{number:,}", _megabytes(sent), str(most))
            shown = "", ""
    return table


def memory(ranks: Sequence[RehearsedRank]) -> Table:
    """Returns the table of parameters and bytes by pipeline stage, of the rank that needs most of each stage."""
    stages: Mapping[int, list[RehearsedRank]] = defaultdict(list)
    for rank in ranks:
        stages[rank.stage].append(rank)
    table = Table("stage", "parameters", "weights, GB", "gradients, GB", "optimizer, GB", "sum, GB", "rank", box=None)
    for column in table.columns:
        column.justify = "right"
    for stage, of_stage in sorted(stages.items()):
        most = max(of_stage, key=lambda rank: (sum(rank.memory.values()), -rank.rank))
        sizes = [*most.memory.values(), sum(most.memory.values())]
        shown = [f"{size / GB:,.3g}" if size < 100 * GB else f"{size / GB:,.0f}" for size in sizes]
        table.add_row(str(stage), f"{most.parameters:,}", *shown, str(most.rank))
    return table


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}" if size >= 100_000 else f"{size / 1e6:,.6f}".rstrip("0").rstrip(".")
