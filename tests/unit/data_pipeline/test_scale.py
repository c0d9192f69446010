"""Tests that docs/scale.md shows what its command prints, and no other number."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.bench.data_pipeline.measure import ROOT
from tests.bench.data_pipeline.scale import BEGIN, END, PAPER, RATES, Assumptions, Model, report, with_tables


@pytest.fixture(scope="module")
def rates() -> dict:
    return json.loads(RATES.read_text(encoding="utf-8"))


def test_the_paper_has_the_tables_of_its_rates(rates: dict) -> None:
    paper = PAPER.read_text(encoding="utf-8")
    assert paper == with_tables(paper, report(rates, Assumptions())), (
        "docs/scale.md is not what its rates give; run: python -m tests.bench.data_pipeline.scale --write"
    )


def test_the_prose_has_no_numbers_of_its_own() -> None:
    before, rest = PAPER.read_text(encoding="utf-8").split(BEGIN)
    tables, after = rest.split(END)
    prose = re.sub(r"```.*?```|`[^`]*`", "", before + after, flags=re.DOTALL)
    known = set(re.findall(r"\d[\d.,]*\d|\d", tables))
    for number in re.findall(r"(?<![A-Za-z\d-])\d[\d.,]*\d|(?<![A-Za-z\d-])\d", prose):
        assert number in known, f"{number} stands in docs/scale.md and in none of its tables"


def test_the_command_prints_the_tables_with_other_assumptions() -> None:
    command = [sys.executable, "-m", "tests.bench.data_pipeline.scale", "--terabytes", "1", "--core-hour", "2.5"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "Extrapolated to 1 TB of text, at 2.5 USD a core hour" in printed


def test_a_terabyte_costs_its_seconds(rates: dict) -> None:
    model = Model(rates, Assumptions())
    row = model.stage("score")
    assert model.core_hours("score") == pytest.approx(1e12 / (row["mb_per_s"] * 1e6) / 3600)


def test_ranges_keep_within_memory_and_grow_with_the_text(rates: dict) -> None:
    one = Model(rates, Assumptions())
    ten = Model(rates, replace(Assumptions(), terabytes=1000.0))
    assert ten.ranges == pytest.approx(10 * one.ranges, abs=10)
    for model in (one, ten):
        assert model.documents * 48 / model.ranges <= model.assumed.memory_mb * 1e6


def test_a_paper_without_its_marks_is_an_error() -> None:
    with pytest.raises(ValueError, match="put them back"):
        with_tables("no tables here", "| |")
