"""The held-out split."""

import pytest

from data_pipeline.heldout import heldout_ids

IDS = [f"doc/{number}" for number in range(2000)]


def test_the_share_is_about_right_and_other_documents_do_not_move_it() -> None:
    chosen = heldout_ids(IDS, 0.05, 0, "s")
    assert 60 < len(chosen) < 140
    assert heldout_ids(IDS[::-1][:1000], 0.05, 0, "s") == chosen & set(IDS[1000:])
    assert heldout_ids(IDS, 0.05, 1, "s") != chosen


def test_one_document_at_least_on_either_side() -> None:
    assert len(heldout_ids(IDS[:2], 0.0001, 0, "s")) == 1
    for number in range(40):
        assert len(heldout_ids(IDS[number : number + 2], 0.49, 0, "s")) == 1


def test_a_source_of_one_document_is_an_error() -> None:
    with pytest.raises(ValueError, match="source poems has 1 documents left"):
        heldout_ids(["a", "a"], 0.1, 0, "poems")
