"""Fixtures for all tests: the pool of gloo ranks. No test may reach a model hub."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Browser, executable
from tests.parallel.forks import Forks
from tests.parallel.harness import RankPool, RanksOf

os.environ.setdefault("HF_HUB_OFFLINE", "1")
gc.disable()  # until all modules are imported, none of which becomes garbage: a third of the time is spared

# With these first, `make test` keeps both cores at work: one worker starts the longest file, while the other compiles
# the data pipeline's numba functions, which every later process then finds in numba's cache.
FIRST = ("unit/data_pipeline/scan/test_scores.py", "parallel/test_layouts.py", "unit/data_pipeline/test_run.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the tests of the files in FIRST to the beginning; all others stay in their order."""
    order = {Path(__file__).parent / name: number for number, name in enumerate(FIRST)}
    assert all(path.is_file() for path in order)
    items.sort(key=lambda item: order.get(item.path, len(FIRST)))


def pytest_collection_finish() -> None:
    """Turns the garbage collector on again, for what tests make; modules and tests stay as long as the process."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Starter of processes that have torch and pretrain imported already, see tests/parallel/forks.py."""
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium, see tests/browser.py; tests that need it are skipped where there is none."""
    if executable() is None:
        pytest.skip("neither Chromium nor Chrome is installed")
    with Browser() as one:
        yield one


@pytest.fixture(scope="session")
def rank_pool(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Iterator[RankPool]:
    """Pool of ranks: a process starts when a test first asks for that many, and lives to the end of the session."""
    pool = RankPool(tmp_path_factory.mktemp("ranks"), forks)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def ranks(rank_pool: RankPool) -> RanksOf:
    """World of n ranks: `ranks(n).run("module:function", **json)`, see tests/parallel/harness.py."""
    return rank_pool.ranks
