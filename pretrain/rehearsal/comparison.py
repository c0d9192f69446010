"""Compares what ranks ask of the groups they share, call by call: a pure function of their records.

The calls of a collective must be the same on all ranks of a group, in the same order. Messages that a rank sends to
another must be those that the other receives from it, in the same order. The order of calls of different groups is not
compared, and neither are values.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, pairwise, zip_longest

from pretrain.rehearsal.collective_calls import Group, GroupCall

MOST_PAIRED = 16  # members of a group whose ranks are all compared with each other; of others neighbours are
Calls = Sequence[tuple[int, GroupCall]]  # (number of the call in its rank's step, call)


def mismatch(ranks: Mapping[int, Sequence[GroupCall]]) -> str:
    """Returns one sentence on the first call that two ranks do not agree on; "" if they agree on all of them."""
    found = [*_different_collectives(ranks), *_different_messages(ranks)]
    return min(found)[1] if found else ""


def _different_collectives(ranks: Mapping[int, Sequence[GroupCall]]) -> Iterator[tuple[int, str]]:
    """Yields (number of the call in the step, sentence) for the first difference in each group and pair of ranks."""
    by_group: dict[Group, dict[int, Calls]] = defaultdict(dict)
    for rank, calls in ranks.items():
        own: dict[Group, list[tuple[int, GroupCall]]] = defaultdict(list)
        for number, call in enumerate(calls):
            if not call.is_message:
                own[call.group].append((number, call))
        for group, of_group in own.items():
            by_group[group][rank] = of_group
    for group, entered in by_group.items():
        members = [rank for rank in group.ranks if rank in ranks]
        for i, j in combinations(members, 2) if len(members) <= MOST_PAIRED else pairwise(members):
            pairs = zip_longest(entered.get(i, ()), entered.get(j, ()))
            for index, (first, second) in enumerate(pairs, start=1):
                if first and second and _agree(first[1], second[1]):
                    continue
                at = max(found[0] for found in (first, second) if found)
                told = " and ".join(f"rank {rank} {_told(found)}" for rank, found in ((i, first), (j, second)))
                yield at, f"ranks {i} and {j} differ in collective no. {index} of {group}: {told}"
                break


def _different_messages(ranks: Mapping[int, Sequence[GroupCall]]) -> Iterator[tuple[int, str]]:
    """Yields (number of the call in the step, sentence) for the first difference of each direction of two ranks."""
    messages: dict[tuple[Group, int, int], tuple[list[tuple[int, GroupCall]], list[tuple[int, GroupCall]]]]
    messages = defaultdict(lambda: ([], []))
    for rank, calls in ranks.items():
        for number, call in enumerate(calls):
            if call.is_message and call.peer in ranks:
                ends = (rank, call.peer) if call.operation == "send" else (call.peer, rank)
                messages[call.group, *ends][call.operation == "recv"].append((number, call))
    for (group, sender, receiver), (sent, received) in messages.items():
        for index, (one, other) in enumerate(zip_longest(sent, received), start=1):
            if one and other and (one[1].dtype, one[1].numel) == (other[1].dtype, other[1].numel):
                continue
            at = max(found[0] for found in (one, other) if found)
            told = " and ".join(f"rank {rank} {_told(found)}" for rank, found in ((sender, one), (receiver, other)))
            which = f"message no. {index} of rank {sender} to rank {receiver} in {group}"
            yield at, f"ranks {sender} and {receiver} differ in {which}: {told}"
            break


def _agree(a: GroupCall, b: GroupCall) -> bool:
    """Returns whether calls of two ranks of a group are the two ends of one collective."""
    if (a.operation, a.dtype, a.on_host) != (b.operation, b.dtype, b.on_host):
        return False
    if a.operation == "all_to_all":
        i, j = (call.group.ranks.index(call.peer) for call in (a, b) if call.peer is not None)
        return a.sent[j] == b.received[i] and b.sent[i] == a.received[j]
    return (a.numel, a.peer) == (b.numel, b.peer)


def _told(found: tuple[int, GroupCall] | None) -> str:
    if found is None:
        return "enters none"
    call = found[1]
    phase = f" in the {call.phase}" if call.phase else ""
    return f"enters {call}{phase}" + (f" ({call.location})" if call.location else "")
