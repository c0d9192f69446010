"""Tests what `trivium data report` and `trivium data recall` print about a run."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from configs.loader import ConfigError
from data_pipeline import command
from data_pipeline.provenance import recall
from data_pipeline.report import ledger_tables as report


def test_a_directory_without_a_run_is_one_sentence(config: Path, tmp_path: Path, capsys: Any) -> None:
    assert report.main([str(config), f'run.dir="{tmp_path}"']) == 1
    assert "no data run has finished" in capsys.readouterr().err


def test_no_word_of_the_ledger_is_cut_in_80_columns(
    config: Path, ledger: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert report.main([str(config)]) == 0
    shown = capsys.readouterr().out.partition("/drops/")[0]
    assert "…" not in shown and max(len(line) for line in shown.splitlines() if line[:1] in "┏┃┡│└") <= 80
    words = set(re.findall(r"[\w/]+", shown))
    for stage in ledger["stages"]:
        reasons = [name for name, amount in stage["total"]["dropped"].items() if amount["documents"]]
        assert {stage["name"], *reasons[: 1 if len(reasons) < 4 else 0]} <= words


def test_alarms_stand_in_ledger_output_and_page_and_fail_if_asked(
    config: Path, run_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    own = Path(shutil.copytree(run_dir, tmp_path / "run"))  # other tests need the run unchanged
    args = [str(config), f"run.dir={own}"]
    missed = ["alarms.expected={ short = 'word_count_min', french = 'word_count_min' }"]
    expected = "document 'french' should be dropped for word_count_min, and was dropped for language_unexpected"
    assert command.main([*args, *missed]) == 0
    assert f"alarm: {expected}" in capsys.readouterr().out
    assert json.loads((own / "ledger.json").read_text())["alarms"] == [expected]
    assert report.main(args) == 0
    page = (own / "report.html").read_text(encoding="utf-8")
    assert "<strong>1 alarm</strong>" in page and "document &#x27;french&#x27; should" in page
    assert command.main([*args, *missed, "alarms.fail=true"]) == 1
    assert command.main([*args, "alarms.fail=true"]) == 0  # no alarm is left
    assert json.loads((own / "ledger.json").read_text())["alarms"] == []


def test_recall_is_printed_by_source(config: Path, capsys: Any) -> None:
    assert recall.main([str(config), "--similar", "0.8"]) == 0
    said = capsys.readouterr().out
    (prose,) = [line.split("│")[1:-1] for line in said.splitlines() if "│ prose" in line]
    assert int(prose[1]) >= 10 and float(prose[3]) == 1.0  # five documents are near-duplicates of each other: ten pairs
    assert recall.main([str(config), "--similar", "1.0"]) == 0
    assert "dropped, but not similar enough" in capsys.readouterr().out  # near-duplicates are not equal
    with pytest.raises(ConfigError, match="--similar 'much'"):
        recall.main([str(config), "--similar", "much"])
