"""Fixtures: one small run with every kind of drop and cut, and its report."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data_pipeline.report.reported_run import make_run


@pytest.fixture(scope="package")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of the config of `make_run`'s run."""
    return make_run(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="package")
def run_dir(config: Path) -> Path:
    return config.parent / "run"


@pytest.fixture(scope="package")
def page(run_dir: Path) -> str:
    return (run_dir / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="package")
def ledger(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "ledger.json").read_text(encoding="utf-8"))
