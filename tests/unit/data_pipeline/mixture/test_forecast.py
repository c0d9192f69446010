"""Tests a plan's forecast and its caps against counts over all of its rows."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from configs.mixture import PlanConfig
from data_pipeline.mixture.draft import draft_plan
from data_pipeline.mixture.forecast import show
from data_pipeline.mixture.packing import PACKINGS
from data_pipeline.mixture.plan_files import build_plan
from data_pipeline.mixture.rows import Plan
from tests.unit.data_pipeline.mixture.plans import make

MORE_CHINESE = {"english": 0.2, "chinese": 0.6, "code": 0.2}
SMALL = {"english": 0.1, "chinese": 0.2, "code": 0.7}


def ends_of_epochs(plan: Plan) -> dict[str, list[int]]:
    """Returns by source the samples at which every token was seen exactly once, exactly twice..., by brute force."""
    ends: dict[str, list[int]] = {name: [] for name in plan.sources}
    seen: dict[str, Counter[tuple[str, int, int]]] = {name: Counter() for name in plan.sources}
    tokens = {source["name"]: source["tokens"] for source in plan.description["sources"]}
    for i in range(plan.num_samples):
        for piece in plan.provenance(i):
            counts, end = seen[piece["source"]], piece["start"] + piece["length"]
            counts.update((piece["shard"], piece["document"], k) for k in range(piece["start"], end))
        name = piece["source"]
        if counts.total() == (len(ends[name]) + 1) * tokens[name]:
            ends[name].append(i)
            assert set(counts.values()) == {len(ends[name])} and len(counts) == tokens[name]
    return ends


@pytest.mark.parametrize("packing", PACKINGS)
def test_epochs_end_where_it_says(tokens: Path, tokenizer_folder: Path, tmp_path: Path, packing: str) -> None:
    described = make(tokens, tokenizer_folder, tmp_path, weights=MORE_CHINESE, samples=1500, packing=packing)
    plan = Plan.open(tmp_path)
    ends = ends_of_epochs(plan)
    assert max(len(found) for found in ends.values()) >= 2
    for source in described["sources"]:
        told = source["forecast"]["epoch_ends"]
        assert [end["sample"] for end in told] == ends[source["name"]]
        assert [end["epoch"] for end in told] == list(range(1, len(told) + 1))
        assert [end["fraction"] for end in told] == [round((end["sample"] + 1) / 1500, 6) for end in told]


def test_lasts_as_long_and_rises_as_far_as_it_says(tokens: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    described = make(tokens, tokenizer_folder, tmp_path, weights=SMALL, samples=1000, epochs={"chinese": 0.75})
    told = {source["name"]: source["forecast"] for source in described["sources"]}
    assert told["chinese"]["max_epochs"] == 0.75 and told["code"]["max_epochs"] == 4
    fewest = min(source["lasts_samples"] for source in told.values())
    settings: dict[str, Any] = {"weights": SMALL, "epochs": {"chinese": 0.75}}
    make(tokens, tokenizer_folder, tmp_path / "a", samples=fewest, **settings)
    with pytest.raises(ValueError, match="too few tokens"):
        # Shares are rounded to whole rows: a source's last row may come later by one sample for each other source.
        make(tokens, tokenizer_folder, tmp_path / "b", samples=fewest + round(2 / min(SMALL.values())), **settings)
    # A source's share can rise by more_possible and no further, if the other sources have caps out of reach.
    for source in described["sources"]:
        name, most = source["name"], source["samples"] + round(1000 * source["forecast"]["more_possible"])
        cap = {name: source["forecast"]["max_epochs"]}
        for rows in (most, most + 1):
            if rows > 1000:
                continue
            weights = {name: rows} | {other: (1000 - rows) / 2 for other in SMALL if other != name and rows < 1000}
            epochs = dict.fromkeys(weights, 99.0) | cap
            if rows == most:
                make(tokens, tokenizer_folder, tmp_path / "c", samples=1000, weights=weights, epochs=epochs)
            else:
                with pytest.raises(ValueError, match=f"{name} is to give {rows}"):
                    make(tokens, tokenizer_folder, tmp_path / "d", samples=1000, weights=weights, epochs=epochs)


def test_a_cap_of_one_source_is_named(tokens: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"samples": 1500, "epochs": {"code": 0.25}}
    with pytest.raises(ValueError, match=r"within mixture\.epochs\.code = 0\.25: code is to give 450 rows") as error:
        make(tokens, tokenizer_folder, tmp_path, **changes)
    assert "raise mixture.epochs.code to 1, or add text" in str(error.value)
    make(tokens, tokenizer_folder, tmp_path, **changes | {"epochs": {"code": 1}})


def test_unimax_gives_the_small_source_its_cap_and_the_others_alike(
    tokens: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"weights": None, "unimax": True, "samples": 3000}
    plain = make(tokens, tokenizer_folder, tmp_path / "a", **settings)
    rows = {source["name"]: source["rows_per_epoch"] for source in plain["sources"]}
    assert [source["samples"] for source in plain["sources"]] == [1000] * 3, "no cap is met"
    smallest = min(rows, key=lambda name: rows[name])
    capped = make(tokens, tokenizer_folder, tmp_path / "b", **settings, epochs={smallest: 0.5})
    given = {source["name"]: source["samples"] for source in capped["sources"]}
    assert given.pop(smallest) == rows[smallest] // 2
    assert max(given.values()) - min(given.values()) <= 1 and sum(given.values()) == 3000 - rows[smallest] // 2

    most = 2 * sum(rows.values())
    full = make(tokens, tokenizer_folder, tmp_path / "c", **settings | {"samples": most}, max_epochs=2)
    assert {source["name"]: source["epochs"] for source in full["sources"]} == dict.fromkeys(rows, 2)
    with pytest.raises(ValueError, match=f"Lower mixture.samples to {most:,}, raise mixture.max_epochs to 3"):
        make(tokens, tokenizer_folder, tmp_path / "d", **settings | {"samples": most + 1}, max_epochs=2)


@pytest.mark.parametrize("packing", PACKINGS)
def test_both_packings_are_told_whichever_is_chosen(
    tokens: Path, tokenizer_folder: Path, tmp_path: Path, packing: str
) -> None:
    described = make(tokens, tokenizer_folder, tmp_path / packing, packing=packing)
    other = make(tokens, tokenizer_folder, tmp_path / "other", packing=next(p for p in PACKINGS if p != packing))
    for source, others in zip(described["sources"], other["sources"], strict=True):
        assert source["packings"] == others["packings"]
        assert source["packings"][packing]["rows"] == source["rows_per_epoch"]
        for key in ("padding_share", "cut_share", "needless_cut_share"):
            assert (
                source["packings"][packing][key] == source[key]
                and source["packings"][other["packing"]][key] == others[key]
            )
    assert source["packings"]["concat"]["cut_share"] > source["packings"]["best_fit"]["cut_share"]


def test_what_is_laid_out_is_what_is_built_and_shown(tokens: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    settings = PlanConfig(seq_length=64, samples=3000, seed=3, weights=SMALL)
    before = set(tmp_path.rglob("*"))
    outlook = draft_plan(tokens, tokenizer_folder, settings).outlook()
    assert set(tmp_path.rglob("*")) == before
    plan = build_plan(tokens, tokenizer_folder, tmp_path / "p", settings)
    for told, built in zip(outlook["sources"], plan["sources"], strict=True):
        assert told.items() <= built.items()
    console = Console(width=140, record=True, file=io.StringIO())
    show(plan, console)
    said = console.export_text()
    for source in plan["sources"]:
        ends = [f"{end['epoch']}: {end['fraction']:.1%}" for end in source["forecast"]["epoch_ends"]]
        (line,) = (line for line in said.splitlines() if f" {source['name']} " in line and "rows" in line)
        assert (ends[0] if ends else "not within the run") in line
        assert f"{source['forecast']['lasts_samples']:,} rows" in line
