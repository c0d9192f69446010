"""Tests that alarms report planted faults, name them, and report nothing else."""

from pathlib import Path

import pytest

from configs.alarms import AlarmsConfig
from configs.loader import ConfigError, validate
from data_pipeline.alarms import alarms
from data_pipeline.core.ledger import Tally
from data_pipeline.core.tables import as_table, write_table


def tally(source: str, kept: int, dropped: int, size: int = 10) -> Tally:
    made = Tally()
    made.came_in(source, (kept + dropped) * size, kept + dropped)
    made.kept(source, kept * size, documents=kept)
    if dropped:
        made.dropped(source, "some_rule", dropped * size, dropped)
    return made


def settings(**keys: object) -> AlarmsConfig:
    return validate(AlarmsConfig, {"min_documents": 100, **keys})


def test_a_source_that_is_mostly_lost_alarms_even_if_the_sum_is_not(tmp_path: Path) -> None:
    stage = Tally.merged([tally("big", 900, 100), tally("small", 4, 6)])
    found = alarms({"filter": stage}, tmp_path, settings())
    assert len(found) == 1 and "filter dropped 6 of 10 documents of small (60.0%)" in found[0]
    assert not alarms({"filter": stage}, tmp_path, settings(max_drop_share=0.6))
    assert not alarms({"filter": stage}, tmp_path, settings(stages={"filter": {"max_drop_share": 0.7}}))
    assert len(alarms({"filter": stage}, tmp_path, settings(stages={"filter": {"max_drop_share": 0.05}}))) == 2


def test_bytes_count_where_few_documents_hold_them(tmp_path: Path) -> None:
    stage = tally("s", 9, 0)
    stage.came_in("s", 1000)
    stage.dropped("s", "cut_lines", 1000)
    assert "dropped 1,000 of 1,090 bytes of s (91.7%)" in alarms({"lines": stage}, tmp_path, settings())[0]


def test_a_filter_that_drops_nothing_alarms_over_enough_documents(tmp_path: Path) -> None:
    whole = tally("s", 100, 0)
    assert "dedup dropped nothing of 100 documents" in alarms({"dedup": whole}, tmp_path, settings())[0]
    assert not alarms({"dedup": tally("s", 99, 0)}, tmp_path, settings())
    assert not alarms({"dedup": tally("s", 99, 1)}, tmp_path, settings())
    assert not alarms({"dedup": whole}, tmp_path, settings(stages={"dedup": {"must_drop": False}}))
    assert not alarms(
        {"extract": whole, "tokens": whole}, tmp_path, settings()
    )  # a stage may drop nothing of clean input
    assert len(alarms({"extract": whole}, tmp_path, settings(stages={"extract": {"must_drop": True}}))) == 1


def test_held_out_documents_are_no_loss(tmp_path: Path) -> None:
    assert not alarms({"tokenizer": tally("s", 0, 100)}, tmp_path, settings())


def test_expected_documents_meet_their_fate_or_alarm(tmp_path: Path) -> None:
    for stage, verdicts in {"language": ["", "", "language_score_min"], "filter": ["word_count_min", ""]}.items():
        rows = [
            {"source": "s", "shard": "s/0", "row": row, "id": f"canary-{row}", "bytes": 1, "verdict": verdict}
            for row, verdict in enumerate(verdicts)
        ]
        write_table(tmp_path / stage, "s/0", as_table(rows))
        (tmp_path / stage / "stage.json").write_text("{}")
    caught = {"canary-0": "word_count_min", "canary-2": "language_score_min"}
    done = {"language": Tally(), "filter": Tally()}
    assert not alarms(done, tmp_path, settings(expected=caught))
    found = alarms(done, tmp_path, settings(expected={**caught, "canary-1": "x", "canary-2": "y", "canary-3": "z"}))
    assert [line.split(" should be ")[1] for line in found] == [
        "dropped for y, and was dropped for language_score_min",
        "dropped for x, and was kept",
        "dropped for z, and was not found in the input",
    ]


def test_a_stage_that_drops_nothing_by_design_has_no_alarm() -> None:
    with pytest.raises(ConfigError, match=r"stages\.tokens is not a stage that drops"):
        settings(stages={"tokens": {"must_drop": True}})
