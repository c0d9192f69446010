"""Tests that the ledger notices documents lost between a stage's input and output."""

import pytest

from data_pipeline.core.ledger import LedgerError, Tally


def test_a_lost_document_is_noticed() -> None:
    tally = Tally()
    tally.came_in("s", 10)
    tally.came_in("s", 20)
    tally.kept("s", 10)
    with pytest.raises(
        LedgerError, match=r"2 documents came in, but 1 were kept and 0 dropped; 1 are unaccounted for$"
    ):
        tally.check("filter")
    tally.dropped("s", "why", 20)
    tally.check("filter")
    before = Tally()
    before.kept("s", 31, documents=2)
    with pytest.raises(LedgerError, match="the stage before passed on"):
        tally.check("filter", before)
