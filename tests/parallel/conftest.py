"""Ends the ranks after the last test that needs them, since the threads of their groups take CPU even when idle."""

from collections.abc import Iterator

import pytest

from tests.parallel.harness import RankPool


@pytest.fixture(scope="package", autouse=True)
def end_ranks(rank_pool: RankPool) -> Iterator[None]:
    yield
    rank_pool.close()
