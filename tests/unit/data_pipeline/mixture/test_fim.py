"""Tests that rearranged pieces, put back in order, give the documents; tests their masks, labels and provenance."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.mixture import PlanConfig
from configs.tokenizer import TokenizerConfig
from data_pipeline.mixture.draft import Gone
from data_pipeline.mixture.earlier import first_difference
from data_pipeline.mixture.fim import PLAIN, PSM, SPM, FimSymbols, cuts, draw, rearranged
from data_pipeline.mixture.packing import PACKINGS
from data_pipeline.mixture.plan_files import build_plan
from data_pipeline.mixture.rows import Plan
from data_pipeline.tokens import store, tokenizer_training
from data_pipeline.tokens.tokenizer import FIM_CONTROLS, SPECIALS, Tokenizer
from tests.unit.data_pipeline.mixture.plans import same

L, SAMPLES = 64, 600
WEIGHTS = {"english": 0.5, "code": 0.5}


@pytest.fixture(scope="module")
def run_dir(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a tokenizer that has the control symbols, and its token stores."""
    folder = tmp_path_factory.mktemp("fim")
    files = sorted(documents.glob("train/*/*.zst"))
    tokenizer_training.train(
        files, folder / "tokenizer", TokenizerConfig(vocab_size=3000, train_bytes=600_000), controls=FIM_CONTROLS
    )
    model = Tokenizer.load(folder / "tokenizer")
    for path in documents.glob("*/*/*.jsonl.zst"):
        out = folder / "tokens" / path.relative_to(documents).with_name(path.name.removesuffix(".jsonl.zst"))
        store.build(path, out, model)
    return folder


def make(run_dir: Path, out: Path, without: Gone | None = None, **changes: Any) -> Plan:
    settings: dict[str, Any] = {
        "seq_length": L,
        "samples": SAMPLES,
        "seed": 2,
        "weights": WEIGHTS,
        "fim": {"code": 0.6},
    }
    build_plan(run_dir / "tokens", run_dir / "tokenizer", out, PlanConfig(**settings | changes), without=without)
    return Plan.open(out)


@pytest.fixture(scope="module", params=PACKINGS)
def plan(request: pytest.FixtureRequest, run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return make(run_dir, tmp_path_factory.mktemp("plan"), packing=request.param)


def restored(tokens: list[int], form: str, special: dict[str, int]) -> tuple[list[int], list[int], list[int]]:
    """Returns (prefix, middle, suffix) of a rearranged segment without <s> and </s>, from its control symbols alone.

    In SPM form prefix and middle are one list, the prefix, and the middle is empty.
    """
    first, second, third = (tokens.index(special[name]) for name in FIM_CONTROLS)
    assert first == 0 and first < second < third
    front, suffix, rest = tokens[1:second], tokens[second + 1 : third], tokens[third + 1 :]
    if form == "psm":
        return front, rest, suffix
    assert not front
    return rest, [], suffix


def test_segments_put_back_in_order_are_the_documents(plan: Plan, run_dir: Path) -> None:
    special, seen, cut = plan.special_ids, Counter[str](), 0
    stores = {(s, n): store.Store(run_dir / f"tokens/train/{s}/0000{n}") for s in WEIGHTS for n in (0, 1)}
    for i in range(plan.num_samples):
        row, at = plan.row(i), 0
        for number, piece in enumerate(plan.provenance(i)):
            opened = stores[piece["source"], int(piece["shard"])]
            whole = opened.tokens(piece["document"]).tolist()
            stop = piece["start"] + piece["length"]
            content, form = whole[piece["start"] : stop], piece.get("fim", "plain")
            size = len(content) + (0 if form == "plain" else 3)
            here = slice(at, at + size)
            tokens, labels, mask = (array[here].tolist() for array in (row.tokens, row.labels, row.loss_mask))
            seen[form] += 1
            assert piece["source"] == "code" or form == "plain"
            assert (row.segments[here] == number).all() and row.positions[here].tolist() == list(range(size))
            assert labels[:-1] == tokens[1:] and all(mask[:-1])
            assert mask[-1] == (stop < len(whole))
            if form != "plain":
                head, ended = piece["start"] == 0, stop == len(whole)
                assert (tokens[0] == special["<s>"]) == head and (tokens[-1] == special["</s>"]) == ended
                text = content[head : len(content) - ended]
                prefix, middle, suffix = restored(tokens[head : size - ended], form, special)
                assert [*prefix, *middle, *suffix] == text
                assert labels[-1] == (0 if ended else special["</s>"])
                cut += not ended
            elif mask[-1]:
                assert labels[-1] == whole[stop]
            at += size
        assert (row.tokens[at:] == plan.pad_id).all() and (row.segments[at:] == -1).all()
        assert not row.loss_mask[at:].any() and not row.labels[at:].any()
    assert min(seen["plain"], seen["psm"], seen["spm"], cut) > 50
    described = {source["name"]: source for source in plan.description["sources"]}
    assert described["code"]["fim_pieces"] == {"psm": seen["psm"], "spm": seen["spm"]}
    assert "fim_pieces" not in described["english"]


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_epoch_is_every_token_once_and_padding_is_what_is_empty(run_dir: Path, tmp_path: Path, packing: str) -> None:
    changes: dict[str, Any] = {"weights": {"code": 1.0}, "packing": packing}
    told = make(run_dir, tmp_path / "a", **changes, samples=1300).description["sources"][0]["forecast"]["epoch_ends"]
    assert told
    epoch = told[0]["sample"] + 1
    plan = make(run_dir, tmp_path / "b", **changes, samples=epoch)
    seen = Counter(
        (piece["shard"], piece["document"], piece["start"] + k)
        for i in range(epoch)
        for piece in plan.provenance(i)
        for k in range(piece["length"])
    )
    (code,) = plan.description["sources"]
    assert set(seen.values()) == {1} and len(seen) == code["tokens"] == code["trained_tokens"]
    empty = np.mean([plan.row(i).segments < 0 for i in range(epoch)])
    assert plan.description["padding_share"] == pytest.approx(empty, abs=1e-6)
    if packing == "best_fit":  # concat cuts documents elsewhere in each epoch, since their order changes
        assert code["padding_share"] == code["packings"][packing]["padding_share"] == pytest.approx(empty, abs=1e-6)


def test_a_document_is_drawn_by_seed_and_itself(run_dir: Path, tmp_path: Path) -> None:
    forms: dict[str, dict[Any, str]] = {}
    for name, changes in {"a": {}, "b": {"seq_length": 96, "samples": 200}, "c": {"seed": 3}}.items():
        plan = make(run_dir, tmp_path / name, **changes)
        forms[name] = {}
        for i in range(plan.num_samples):
            for piece in plan.provenance(i):
                key = (piece["source"], piece["shard"], piece["document"])
                assert forms[name].setdefault(key, piece.get("fim", "plain")) == piece.get("fim", "plain")
    both = forms["a"].keys() & forms["b"].keys()
    assert len(both) > 100 and all(forms["a"][key] == forms["b"][key] for key in both)
    assert any(forms["a"][key] != forms["c"][key] for key in forms["a"].keys() & forms["c"].keys())


def test_a_takedown_changes_no_other_document(run_dir: Path, tmp_path: Path) -> None:
    plan = make(run_dir, tmp_path / "a")
    gone = next(p for i in range(SAMPLES) for p in plan.provenance(i) if p.get("fim"))
    where = (gone["shard"], gone["document"])
    clean = make(run_dir, tmp_path / "b", without={"train/code": [where]})
    assert plan.uses("code", *where) and not clean.uses("code", *where)
    left, kept = (
        {
            (piece["shard"], piece["document"], piece["start"]): piece.get("fim")
            for i in range(SAMPLES)
            for piece in opened.provenance(i)
            if piece["source"] == "code"
        }
        for opened in (clean, plan)
    )
    assert where not in {key[:2] for key in left}
    assert len(left.keys() & kept.keys()) > 100 and all(left[key] == kept[key] for key in left.keys() & kept.keys())


def test_rows_are_pure_and_other_sources_and_held_out_rows_plain(plan: Plan) -> None:
    again = Plan.open(plan.path)
    for i in reversed(range(SAMPLES)):
        assert same(plan.row(i), again.row(i))
    controls = [plan.special_ids[name] for name in FIM_CONTROLS]
    held = [plan.heldout_row("code", i) for i in range(plan.heldout_rows("code"))]
    english = [plan.row(i) for i in range(SAMPLES) if plan.sources[plan.row(i).source] == "english"]
    assert held and english
    assert not any(np.isin(row.tokens, controls).any() for row in [*held, *english])


def test_rate_and_forms_are_as_asked() -> None:
    drawn = draw(1, "code", 200_000, 0.3, 0.25)
    shares = [float((drawn == form).mean()) for form in (PLAIN, PSM, SPM)]
    # Five standard deviations of a binomial share of 200,000.
    np.testing.assert_allclose(shares, [0.7, 0.225, 0.075], atol=5 * 0.5 / 200_000**0.5)
    assert (draw(1, "code", 100, 1.0, 0.0) == PSM).all() and (draw(1, "code", 100, 1.0, 1.0) == SPM).all()
    # A source with more documents draws the same for the first ones.
    assert (draw(1, "code", 100, 0.5, 0.5) == draw(1, "code", 300, 0.5, 0.5)[:100]).all()


def test_cuts_fall_everywhere() -> None:
    found = [cuts(1, "code", document, 0, 4) for document in range(4000)]
    assert set(found) == {(a, b) for a in range(5) for b in range(a, 5)}
    # The smaller of two uniform positions from 0 to 4 is 0 in 9 of 25 cases; five standard deviations.
    assert np.mean([first == 0 for first, _ in found]) == pytest.approx(9 / 25, abs=5 * 0.48 / 4000**0.5)
    assert {cuts(1, "code", document, 0, 0) for document in range(9)} == {(0, 0)}


@pytest.mark.parametrize("form", [PSM, SPM])
@pytest.mark.parametrize("piece", [[1], [2], [1, 2], [9], [1, 9, 2]])
def test_the_smallest_pieces(form: int, piece: list[int]) -> None:
    tokens, labels = rearranged(np.array(piece, np.uint16), form, FimSymbols(20, 21, 22, 1, 2), 0, "s", 0, 0)
    assert sorted(tokens) == sorted([*piece, 20, 21, 22])
    assert labels.tolist() == [*tokens[1:], *([] if piece[-1] == 2 else [2])]


def test_symbols_are_the_tokenizers_only_where_asked_for(run_dir: Path, tokenizer_folder: Path, tokens: Path) -> None:
    model, plain = Tokenizer.load(run_dir / "tokenizer"), Tokenizer.load(tokenizer_folder)
    assert list(model.special_ids) == [*SPECIALS, *FIM_CONTROLS] and list(plain.special_ids) == list(SPECIALS)
    assert list(json.loads((run_dir / "tokenizer/info.json").read_text())["special_ids"].values()) == list(range(11))
    text = "a <|fim_middle|> b"
    assert not {8, 9, 10} & set(model.encode(text)) and model.decode(model.encode(text)) == text
    assert not model.token_bytes[:11].any()
    with pytest.raises(ValueError, match=r"mixture\.fim needs a tokenizer with <\|fim_prefix\|>"):
        settings = PlanConfig(seq_length=L, samples=9, weights=WEIGHTS, fim={"code": 1})
        build_plan(tokens, tokenizer_folder, run_dir / "p", settings)


def test_more_samples_begin_with_the_same_forms(run_dir: Path, tmp_path: Path) -> None:
    short, long = (make(run_dir, tmp_path / str(samples), samples=samples) for samples in (200, 333))
    assert first_difference(long, short, 200) is None
    assert all(np.array_equal(long.row(i).tokens, short.row(i).tokens) for i in range(200))
    other = make(run_dir, tmp_path / "other", samples=333, fim_spm=0.9)
    alike = [long.provenance(i) == other.provenance(i) for i in range(333)]
    assert first_difference(long, other, 333) == alike.index(False)
