"""The doctor's line on links between ranks, of real all-reduces over gloo."""

import re
from pathlib import Path

import pytest

from pretrain.doctor import doctor
from pretrain.doctor.before_run import links
from pretrain.doctor.findings import Severity
from tests.parallel.harness import RanksOf

LINE = re.compile(
    r"gloo between 2 ranks: an all-reduce of 8 bytes takes ([\d,]+) µs, one of 64 MiB runs at ([\d.]+) GB/s"
)
DELAY = 0.05  # seconds


def numbers(said: str) -> tuple[float, float]:
    """Returns microseconds of a small all-reduce, and GB/s of a large one."""
    found = LINE.search(said)
    assert found, said
    return float(found[1].replace(",", "")), float(found[2])


def test_a_slow_link_is_seen_in_both_numbers(ranks: RanksOf) -> None:
    fast, slow = (numbers(ranks(2).run("tests.parallel.workers.reductions:speed", delay=one)[0]) for one in (0, DELAY))
    assert fast[0] < 1e6 * DELAY <= slow[0]
    assert fast[1] > slow[1] > 0 and slow[1] <= 2**26 / DELAY / 1e9


@pytest.mark.full
def test_the_doctor_measures_ranks_that_it_starts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert doctor.main(["--ranks", "2"]) == 0
    assert LINE.search(capsys.readouterr().out)
    found = links(2, "none")
    assert found.level is Severity.FAILURE and "parallel.backend" not in found.remedy and "backend" in found.found
