"""Tests the comparison of plans, against reading every row, and the keeping and finding of replaced plans."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.mixture import PlanConfig
from data_pipeline.core.shards import read_records
from data_pipeline.mixture.earlier import (
    differences,
    find,
    first_difference,
    keep_for_plans,
    keep_plans,
    note_use,
    was_at,
)
from data_pipeline.mixture.plan_files import build_plan, build_stages
from data_pipeline.mixture.rows import Plan, Row
from data_pipeline.tokens.store import Store, build
from data_pipeline.tokens.tokenizer import Tokenizer
from tests.shards import write_shard
from tests.unit.data_pipeline.mixture.plans import mixture

GENERAL: dict[str, Any] = {
    "seq_length": 64,
    "samples": 300,
    "seed": 3,
    "weights": {"english": 0.47, "chinese": 0.31, "code": 0.22},
    "max_epochs": 9,
}


def same(a: Row, b: Row) -> bool:
    arrays = ("tokens", "labels", "loss_mask", "positions", "segments")
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays)


def by_rows(a: Plan, b: Plan, samples: int) -> int | None:
    """Returns `first_difference` of two plans, found by reading every row of both."""
    for i in range(samples):
        if i >= min(a.num_samples, b.num_samples):
            return i
        one, other = a.row(i), b.row(i)
        if a.sources[one.source] != b.sources[other.source] or a.provenance(i) != b.provenance(i):
            return i
        if not same(one, other):
            return i
    return None


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"packing": "concat"},
        {"weights": {"code": 1.0}, "samples": 200},
        {"weights": None, "temperature": 3.0},
        {"weights": {"english": 0.001, "code": 0.999}},
    ],
)
def test_more_samples_begin_with_the_same(tokens: Path, tokenizer_folder: Path, tmp_path: Path, settings: Any) -> None:
    settings = GENERAL | settings
    build_plan(tokens, tokenizer_folder, tmp_path / "short", PlanConfig(**settings))
    short = Plan.open(tmp_path / "short")
    for more in (1, 37, 900):
        build_plan(
            tokens,
            tokenizer_folder,
            tmp_path / "long",
            PlanConfig(**settings | {"samples": settings["samples"] + more}),
        )
        long = Plan.open(tmp_path / "long")
        assert long.fingerprint != short.fingerprint
        assert by_rows(long, short, short.num_samples) is None
        assert first_difference(long, short, short.num_samples) is None
        assert first_difference(short, long, short.num_samples + 1) == short.num_samples
        assert differences(short.facts, long.facts) == f"samples {short.num_samples} -> {long.num_samples}"
        shutil.rmtree(tmp_path / "long")


# A change of the plan, and a part of what `differences` says about it.
CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"weights": {"english": 0.4, "chinese": 0.3, "code": 0.3}}, "weights.code 0.22 -> 0.3"),
    ({"weights": {"english": 0.47, "code": 0.22}}, "source chinese is gone"),
    ({"packing": "concat"}, "packing best_fit -> concat"),
    ({"seed": 4}, "seed 3 -> 4"),
    ({"seq_length": 128}, "seq_length 64 -> 128"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_what_differs_is_found_and_told(
    tokens: Path, tokenizer_folder: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    build_plan(tokens, tokenizer_folder, tmp_path / "a", PlanConfig(**GENERAL))
    build_plan(tokens, tokenizer_folder, tmp_path / "b", PlanConfig(**GENERAL | change))
    one, other = Plan.open(tmp_path / "a"), Plan.open(tmp_path / "b")
    expected = by_rows(one, other, 300) if one.seq_length == other.seq_length else 0
    assert expected is not None and first_difference(one, other, 300) == expected == first_difference(other, one, 300)
    assert words in differences(one.facts, other.facts)


def test_a_document_that_changed_or_went_is_found(
    documents: Path, tokens: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    build_plan(tokens, tokenizer_folder, tmp_path / "a/plan", PlanConfig(**GENERAL))
    one = Plan.open(tmp_path / "a/plan")
    # One document fewer: the stores are the same, but rows are packed differently from the epoch's start.
    gone = one.provenance(0)[0]
    without = {f"train/{gone['source']}": [(gone["shard"], gone["document"])]}
    build_plan(tokens, tokenizer_folder, tmp_path / "without", PlanConfig(**GENERAL), without=without)
    other = Plan.open(tmp_path / "without")
    assert first_difference(one, other, 300) == by_rows(one, other, 300)
    assert differences(one.facts, other.facts) == "different documents are left out"
    # One token in one store differs: the rows have the same layout, but another text.
    shutil.copytree(tokens, tmp_path / "tokens")
    shard = sorted((tmp_path / "tokens/train/code").glob("*.idx"))[0].with_suffix("")
    _rebuild(documents / "train/code" / f"{shard.name}.jsonl.zst", tokenizer_folder, shard)
    build_plan(tmp_path / "tokens", tokenizer_folder, tmp_path / "changed", PlanConfig(**GENERAL))
    other = Plan.open(tmp_path / "changed")
    first = first_difference(one, other, 300)
    assert first is not None
    assert first == next(i for i in range(300) if any(e["shard"] == shard.name for e in _code(one, i)))
    assert all(same(one.row(i), other.row(i)) for i in range(first))
    assert differences(one.facts, other.facts) == "the documents of source code differ"


def _code(plan: Plan, i: int) -> list[dict[str, Any]]:
    return [entry for entry in plan.provenance(i) if entry["source"] == "code"]


def _rebuild(documents: Path, tokenizer_folder: Path, out: Path) -> None:
    """Writes the store again with one digit changed, which is a single token before and after."""
    records = list(read_records(documents))
    changed = next(record for record in records if re.search("[0-8]", record["text"]))
    changed["text"] = re.sub("[0-8]", "9", changed["text"], count=1)
    before = Store(out)
    lengths, tokens = before.lengths.copy(), before.file(".bin").read_bytes()
    build(write_shard(out.with_suffix(".jsonl.zst"), records), out, Tokenizer.load(tokenizer_folder))
    assert np.array_equal(Store(out).lengths, lengths) and Store(out).file(".bin").read_bytes() != tokens


def test_a_longer_last_stage_begins_with_the_same(tokens: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    stages = mixture().plans()
    longer = stages | {"long_context": stages["long_context"].model_copy(update={"samples": 600})}
    other = stages | {"annealing": stages["annealing"].model_copy(update={"samples": 1500})}
    for name, plans in (("a", stages), ("b", longer), ("c", other)):
        build_stages(tokens, tokenizer_folder, tmp_path / name, plans)
    last, longest, shifted = (Plan.open(tmp_path / name / "long_context") for name in "abc")
    assert first_difference(last, longest, 450) is None
    assert first_difference(last, shifted, 450) == 0
    assert "it goes on after another plan" in differences(last.facts, shifted.facts)
    assert differences(last.facts, last.facts) == "the same settings and documents, laid out in another order"
    assert differences(last.facts, {**last.facts, "tokenizer": "0"}) == "the tokenizer differs"
    assert Plan.open(tmp_path / "b/annealing").fingerprint == Plan.open(tmp_path / "a/annealing").fingerprint


def test_replaced_plans_are_kept_and_found(tokens: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    made = {}
    stages = mixture().plans()
    for name, plans in (("first", {"": stages["general"]}), ("second", stages), ("third", {"": stages["annealing"]})):
        build_stages(tokens, tokenizer_folder, tmp_path / "new", plans)
        shutil.copytree(tmp_path / "new", tmp_path / "again")
        assert keep_plans(tmp_path / "again", tmp_path / "new") is None, "they are the same"
        if (tmp_path / "plan").exists():
            kept = keep_plans(tmp_path / "plan", tmp_path / "new")
            assert kept is not None and kept.is_dir() and not (tmp_path / "plan").exists()
        (tmp_path / "new").rename(tmp_path / "plan")
        shutil.rmtree(tmp_path / "again")
        made[name] = {path.parent.name: Plan.open(path) for path in (tmp_path / "plan").rglob("plan.json")}
    wanted = [plan.fingerprint for plans in made.values() for plan in plans.values()]
    assert len(set(wanted)) == 5
    for location in ("plan", "plan/plan.json", "plan/general"):  # the last folder no longer exists
        for fingerprint in wanted:
            found = find(tmp_path / location, fingerprint)
            assert found is not None and found.fingerprint == fingerprint
            found.row(0)
    assert find(tmp_path / "plan", "0" * 64) is None
    (first,) = (find(tmp_path / "plan", plan.fingerprint) for plan in made["first"].values())
    general = find(tmp_path / "plan", made["second"]["general"].fingerprint)
    assert first is not None and was_at(first, tmp_path / "plan") and not was_at(first, tmp_path / "plan/general")
    assert general is not None and was_at(general, tmp_path / "plan/general/plan.json")
    assert not was_at(general, tmp_path / "plan") and not was_at(general, tmp_path / "plan/annealing")


def test_tokens_are_kept_where_a_run_needs_them(
    documents: Path, tokens: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    for name, folder in (("tokens", tokens), ("same", tokens), ("other", tokens), ("tokenizer", tokenizer_folder)):
        shutil.copytree(folder, tmp_path / name)
    _rebuild(documents / "train/code/00001.jsonl.zst", tokenizer_folder, tmp_path / "other/train/code/00001")
    build_plan(tmp_path / "tokens", tmp_path / "tokenizer", tmp_path / "plan", PlanConfig(**GENERAL))
    old = tmp_path / "tokens"
    assert keep_for_plans(old, tmp_path / "other") is None, "no run is trained on the plan"
    note_use(tmp_path / "plan", tmp_path / "run")
    assert keep_for_plans(old, tmp_path / "same") is None and old.is_dir()
    row = Plan.open(tmp_path / "plan").row(7)
    assert keep_for_plans(old, tmp_path / "other") == next(tmp_path.glob("tokens.*"))
    (tmp_path / "other").rename(old)
    assert same(Plan.open(tmp_path / "plan").row(7), row)
    shutil.rmtree(next(tmp_path.glob("tokens.*")))
    with pytest.raises(ValueError, match="not the one that the plan was made of"):
        Plan.open(tmp_path / "plan")


def test_a_runs_note_is_written_once(tmp_path: Path) -> None:
    for name in ("a", "b", "a"):
        note_use(tmp_path, tmp_path / name)
    assert (tmp_path / "used_by").read_text() == f"{tmp_path / 'a'}\n{tmp_path / 'b'}\n"
