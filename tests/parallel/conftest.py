"""The ranks end with the last test that needs them: even at rest, the threads of their groups take time."""

from collections.abc import Iterator

import pytest

from tests.parallel.harness import RankPool


@pytest.fixture(scope="package", autouse=True)
def end_ranks(rank_pool: RankPool) -> Iterator[None]:
    yield
    rank_pool.close()
