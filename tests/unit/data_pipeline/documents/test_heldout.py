"""Tests the choice of held-out documents."""

from collections.abc import Sequence

import pytest

from data_pipeline.core.hashing import draw
from data_pipeline.documents.heldout import Extremes, HeldoutRule

IDS = [f"doc/{number}" for number in range(2000)]


def held_out(ids: Sequence[str], share: float, seed: int) -> set[str]:
    rule = HeldoutRule.of(Extremes.of(ids, seed), share, seed)
    return {name for name in ids if rule.holds_out(name)}


def test_the_share_is_about_right_and_other_documents_do_not_move_it() -> None:
    chosen = held_out(IDS, 0.05, 0)
    assert 60 < len(chosen) < 140
    assert held_out(IDS[::-1][:1000], 0.05, 0) == chosen & set(IDS[1000:])
    assert held_out(IDS, 0.05, 1) != chosen


@pytest.mark.parametrize("share", [0.0001, 0.49, 0.9999])
def test_one_document_at_least_on_either_side(share: float) -> None:
    for number in range(40):
        for count in (2, 3):
            assert 0 < len(held_out(IDS[number : number + count], share, 0)) < count


def test_parts_together_are_the_whole() -> None:
    whole = Extremes.of(IDS, 3)
    drawn = sorted((draw(3, name), name) for name in IDS)
    assert (whole.lowest, whole.highest) == (drawn[0], drawn[-1])
    parts = Extremes()
    for first in range(0, 2000, 300):
        parts |= Extremes.of(IDS[first : first + 300], 3)
    assert parts | Extremes() == whole


def test_of_one_document_or_a_share_of_0_none_is_held_out() -> None:
    assert held_out(["a"], 0.4999, 0) == held_out(["a", "a"], 0.4999, 0) == held_out([], 0.4, 0) == set()
    assert held_out(["", *IDS], 0.0, 0) == set()
    assert "" in held_out(["", *IDS], 0.9999, 0), "an empty id is drawn like any other"
