"""Compares what the page draws, and its samples, with the tables of the run."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from configs.data import DataConfig
from configs.loader import load
from configs.sources import RESERVED
from data_pipeline.core.tables import read_table, shards_of
from data_pipeline.provenance.smallest import Smallest
from data_pipeline.report import figures, measures
from data_pipeline.report import page_samples as samples
from data_pipeline.scores.filtering import broken
from tests.unit.data_pipeline.report.reported_run import MAIL, ROOT


def test_score_histograms_count_what_the_rules_count(run_dir: Path) -> None:
    rules = load(DataConfig, run_dir / "config.toml").rules
    drawn = {(one.rules, one.score): one for one in measures.scores(run_dir, rules)}
    assert set(drawn) == {(name, score) for name, one in rules.items() for score in one.bounds()}
    for stage in ("language", "score"):
        table = pa.concat_tables([read_table(run_dir / stage, shard) for shard in shards_of(run_dir / stage)])
        for (name, score), one in drawn.items():
            if (score == "language_score") == (stage == "language"):
                mine = table.filter(pa.array([set_name == name for set_name in table["rules"].to_pylist()]))
                reasons = broken(mine, {name: rules[name]})
                outside = sum(
                    reasons[f"{score}_{side}"].sum() for side in ("min", "max") if f"{score}_{side}" in reasons
                )
                assert one.outside.sum() == outside
                assert one.inside.sum() + one.outside.sum() + one.unknown == mine.num_rows
    assert drawn["english", "word_count"].outside.sum() >= 1
    assert drawn["english", "mean_word_length"].outside.sum() > 1


@pytest.mark.parametrize("size", [1, 100, 300, 600, 5e11])
def test_a_histogram_of_one_bin_has_labels_below_it(size: float) -> None:
    counts, _ = np.histogram([size], measures.SIZE_EDGES)
    drawn = figures.sizes("prose", measures.SIZE_EDGES, counts, counts)
    below = f'y="{figures.HEIGHT - 6}"'
    assert len(re.findall(f"<text [^>]*{below}", drawn)) >= 2, drawn


def test_languages_and_sizes_count_every_document(run_dir: Path, ledger: dict[str, Any]) -> None:
    stages = {stage["name"]: stage for stage in ledger["stages"]}
    found = measures.documents(run_dir, "decontaminate")
    extracted, kept = stages["extract"]["total"]["passed_on"], stages["language"]["total"]["kept"]
    assert [sum(column) for column in zip(*found.languages.values(), strict=True)] == [
        extracted["documents"],
        extracted["bytes"],
        kept["documents"],
    ]
    assert found.languages["fr"][0] == 1
    for source in ("prose", "code"):
        assert found.before[source].sum() == stages["extract"]["sources"][source]["passed_on"]["documents"]
        assert found.after[source].sum() == stages["decontaminate"]["sources"][source]["kept"]["documents"]
        assert (found.after[source] <= found.before[source]).all()


def test_the_largest_cluster_is_shown_with_its_text(run_dir: Path, page: str, ledger: dict[str, Any]) -> None:
    largest, by_size = measures.clusters(run_dir, count=1, shown=2)
    # The copies, and the text that they extend by a line.
    assert largest[0].size == max(by_size) >= 4
    members = largest[0].members.rows()
    assert len(members) == 2 and all("alert(" in row["head"] or row["id"] for row in members)
    dropped = next(stage for stage in ledger["stages"] if stage["name"] == "dedup")["total"]["dropped"]
    assert sum((size - 1) * count for size, count in by_size.items()) == sum(
        amount["documents"] for amount in dropped.values()
    )
    assert f"cluster {largest[0].number}: {largest[0].size} documents" in page


def test_a_sample_depends_on_nothing_but_the_ids() -> None:
    rows = [{"source": "s", "id": str(number)} for number in range(1000)]
    forward, backward = Smallest(5), Smallest(5)
    for row in rows:
        forward.offer(row)
    for row in reversed(rows):
        backward.offer(row)
    assert forward.rows() == backward.rows()
    assert len(forward.rows()) == 5 and forward.rows() != rows[:5]
    assert len({int(row["id"]) // 250 for row in forward.rows()}) > 1  # from all parts of the rows


def test_samples_are_dropped_for_their_reason(run_dir: Path) -> None:
    drawn = samples.drop_samples(run_dir, "filter", 3)
    table = pa.concat_tables([read_table(run_dir / "filter", shard) for shard in shards_of(run_dir / "filter")])
    verdicts = {(row["source"], row["id"]): row["verdict"] for row in table.to_pylist()}
    assert set(drawn) == set(verdicts.values()) - {""}
    for reason, rows in drawn.items():
        assert 0 < len(rows) <= 3 and all(verdicts[row["source"], row["id"]] == reason for row in rows)
    assert set(samples.drop_samples(run_dir, "extract", 3)) == {"bad_json"}
    (matched,) = samples.drop_samples(run_dir, "decontaminate", 3)["contaminated"]
    assert matched["context"] and matched["source"] == "prose"


def test_samples_say_which_score_broke_which_threshold(run_dir: Path, page: str) -> None:
    dropped = samples.drop_samples(run_dir, "filter", 3)
    rules = load(DataConfig, run_dir / "config.toml").rules
    told = 0
    for reason, rows in dropped.items():
        score, _, side = reason.rpartition("_")
        for row in rows:
            said = samples.broken_rule(run_dir, row, rules)
            name = said.partition("rules.")[2].split()[0]
            limit = getattr(rules[name].bounds()[score], side)
            value = float(said.split(" is ")[1].split(",")[0])
            assert value < limit if side == "min" else value > limit
            assert said.endswith(f"requires {'at least' if side == 'min' else 'at most'} {limit:g}")
            told += said in page
    assert told > 0


def test_samples_of_cuts_show_what_went_and_never_personal_data(run_dir: Path, page: str) -> None:
    drawn = samples.cut_samples(run_dir, ["lines", "pii"], 3)
    assert set(drawn) == {"duplicate_line", "pii_email", "pii_ip"}
    lines = {
        json.loads(line)["id"]: json.loads(line)["text"]
        for name in ("prose", "code")
        for line in (run_dir.parent / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        if not line.endswith("cut")
    }
    for row in drawn["duplicate_line"]:
        shown = row["excerpt"]
        assert shown.removed and not shown.replacement
        if MAIL not in lines[row["id"]] and " […] " not in shown.removed:
            assert f"{shown.before}{shown.removed}{shown.after}" in lines[row["id"]]
    mails = samples.cut_samples(run_dir, ["pii"], 1000)["pii_email"]  # others are in code
    (mail,) = [one for one in mails if one["id"] == "letter"]
    assert str(mail["excerpt"]).startswith("Write to [[<EMAIL>]] about")
    assert "<ins>&lt;EMAIL&gt;</ins>" in page and "<del>" in page and MAIL not in page


def test_no_source_may_have_the_name_of_a_folder_that_stages_keep_beside_those_of_sources(run_dir: Path) -> None:
    """Compares the reserved names with the folders that a run leaves and those that it removes at a stage's end."""
    sources = load(DataConfig, run_dir / "config.toml").sources
    by_source = [folder for folder in run_dir.iterdir() if any((folder / name).is_dir() for name in sources)]
    left = {path.name for folder in by_source for path in folder.iterdir() if path.is_dir()} - set(sources)
    assert {"cuts", "drops", "matches", "rejected"} <= left
    stages = [path for path in (ROOT / "data_pipeline").rglob("*_stage*.py") if "folder: Path" in path.read_text()]
    made = {name for path in stages for name in re.findall(r'\bfolder / "(\w+)"', path.read_text())}
    assert "work" in made
    assert left | made == set(RESERVED)
