"""A rank that is slow in every step is named in the log, though the others wait for it and take as long."""

from pathlib import Path
from typing import Any

import pytest

from tests.parallel.harness import RanksOf
from tests.parallel.matrix import MODELS

WORKER = "tests.parallel.workers.bad_steps:train_with_a_slow_rank"
full = pytest.mark.full


@pytest.mark.parametrize(
    ("parallel", "slow", "mesh"),
    [
        ({"tp": 2}, "layer", "rank 1 (tp 1)"),
        pytest.param({}, "layer", "rank 1 (dp 1)", marks=full),
        pytest.param({"cp": 2}, "layer", "rank 1 (cp 1)", marks=full),
        pytest.param({}, "rows", "rank 1 (dp 1)", marks=full),
    ],
)
def test_a_slow_rank_is_named(ranks: RanksOf, tmp_path: Path, parallel: dict[str, Any], slow: str, mesh: str) -> None:
    """Trains while rank 1 sleeps 0.3 s a step, in the first layer or before the rows; a step takes some 20 ms."""
    options: dict[str, Any] = {"model": MODELS["dense"], "parallel": parallel, "slow": slow}
    first, _ = ranks(2).run(WORKER, process_group=False, run_dir=str(tmp_path), **options)
    (line,) = [line for line in first["said"].splitlines() if " is slow: " in line]
    assert f"{mesh} on {first['host']} is slow: " in line and "the others wait for it" in line
