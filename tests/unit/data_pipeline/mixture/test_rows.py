"""Tests labels, masks, positions and segments of rows against the stores, held-out rows, and what opening refuses."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from configs.mixture import PlanConfig
from data_pipeline.mixture.plan_files import build_plan
from data_pipeline.mixture.rows import Plan
from data_pipeline.tokens.store import SourceStores
from data_pipeline.tokens.tokenizer import Tokenizer
from tests.unit.data_pipeline.mixture.plans import same

L = 64


@pytest.fixture(scope="module", params=["concat", "best_fit"])
def plan_folder(
    request: pytest.FixtureRequest, tokens: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("plan")
    weights = {"english": 0.5, "chinese": 0.2, "code": 0.3}
    settings = PlanConfig(seq_length=L, samples=600, seed=1, weights=weights, packing=request.param)
    build_plan(tokens, tokenizer_folder, out, settings)
    return out


@pytest.fixture(scope="module")
def plan(plan_folder: Path) -> Plan:
    return Plan.open(plan_folder)


@pytest.fixture
def moved(plan_folder: Path, tokens: Path, tokenizer_folder: Path, tmp_path: Path) -> Path:
    """Folder, laid out as a run, with copies of tokens and tokenizer and the same plan over them."""
    shutil.copytree(tokens, tmp_path / "tokens")
    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    description = json.loads((plan_folder / "plan.json").read_text())
    build_plan(
        tmp_path / "tokens",
        tmp_path / "tokenizer",
        tmp_path / "plan",
        PlanConfig(**{key: description[key] for key in ("seq_length", "samples", "seed", "weights", "packing")}),
    )
    return tmp_path


def test_rows_say_what_the_documents_say(plan: Plan, tokens: Path) -> None:
    stores = {
        (source, opened.path.name): opened
        for source in plan.sources
        for opened in SourceStores.in_folder(tokens / "train" / source).stores
    }
    ends = cuts = 0
    for i in range(plan.num_samples):
        row, at = plan.row(i), 0
        for number, piece in enumerate(plan.provenance(i)):
            assert piece["source"] == plan.sources[row.source]
            opened = stores[piece["source"], piece["shard"]]
            assert opened.document_id(piece["document"]) == piece["document_id"]
            document = opened.tokens(piece["document"]).astype(np.int64)
            here, stop = slice(at, at + piece["length"]), piece["start"] + piece["length"]
            np.testing.assert_array_equal(row.tokens[here], document[piece["start"] : stop])
            following = document[piece["start"] + 1 : stop + 1]
            np.testing.assert_array_equal(row.labels[here][: len(following)], following)
            assert row.loss_mask[here][: len(following)].all()
            if stop == len(document):
                assert not row.loss_mask[here][-1] and row.labels[here][-1] == 0
                assert row.tokens[here][-1] == plan.special_ids["</s>"]
                ends += 1
            else:
                assert len(following) == piece["length"]
                cuts += 1
            np.testing.assert_array_equal(row.positions[here], np.arange(piece["length"]))
            assert (row.segments[here] == number).all()
            at += piece["length"]
        assert (row.tokens[at:] == plan.pad_id).all() and (row.segments[at:] == -1).all()
        assert not row.loss_mask[at:].any() and not row.labels[at:].any()
    assert ends > 20 and cuts > 100


def test_shapes_and_dtypes(plan: Plan) -> None:
    row = plan.row(0)
    for name, dtype in {
        "tokens": np.int64,
        "labels": np.int64,
        "loss_mask": bool,
        "positions": np.int64,
        "segments": np.int64,
    }.items():
        array = getattr(row, name)
        assert array.shape == (L,) and array.dtype == dtype, name


def test_row_is_a_pure_function_of_plan_and_number(plan: Plan, plan_folder: Path) -> None:
    other = Plan.open(plan_folder)
    numbers = list(np.random.default_rng(0).permutation(plan.num_samples))
    backwards = {int(i): other.row(int(i)) for i in numbers}
    for i in range(plan.num_samples):
        assert same(plan.row(i), backwards[i])
    # A row belongs to the caller: changing it does not change another read of it.
    plan.row(3).tokens[:] = 0
    assert same(plan.row(3), backwards[3])


def test_prefixes_are_near_the_weights(plan: Plan) -> None:
    sources = np.array([plan.row(i).source for i in range(plan.num_samples)])
    for size in range(1, plan.num_samples + 1, 7):
        counts = np.bincount(sources[:size], minlength=3)
        assert np.abs(counts - size * np.array([0.5, 0.2, 0.3])).max() <= 2


def test_every_heldout_document_once(plan: Plan, tokens: Path) -> None:
    for source in plan.sources:
        expected = np.concatenate(
            [
                opened.tokens(document)
                for opened in SourceStores.in_folder(tokens / "heldout" / source).stores
                for document in range(len(opened))
            ]
        )
        rows = [plan.heldout_row(source, i) for i in range(plan.heldout_rows(source))]
        found = np.concatenate([row.tokens[row.segments >= 0] for row in rows])
        np.testing.assert_array_equal(np.sort(found), np.sort(expected))
        # Each token but a document's first is a label exactly once, so that bits per byte count every byte once.
        labels = np.concatenate([row.labels[row.loss_mask] for row in rows])
        np.testing.assert_array_equal(np.sort(labels), np.sort(expected[expected != plan.special_ids["<s>"]]))
        assert {row.source for row in rows} == {plan.sources.index(source)}
        with pytest.raises(ValueError, match=rf"row {len(rows)} of {source} does not exist; it has {len(rows)}$"):
            plan.heldout_row(source, len(rows))


def test_bytes_per_token(plan: Plan, small_tokenizer: Tokenizer) -> None:
    assert plan.vocab_size == small_tokenizer.vocab_size == len(plan.token_bytes)
    assert plan.token_bytes.dtype == np.int64
    np.testing.assert_array_equal(plan.token_bytes, small_tokenizer.token_bytes)
    assert Tokenizer.load(plan.tokenizer_path).sha256 == small_tokenizer.sha256


def test_numbers_out_of_range_are_refused(plan: Plan) -> None:
    for i in (-1, plan.num_samples):
        with pytest.raises(ValueError, match="outside the plan's 600"):
            plan.row(i)
        with pytest.raises(ValueError, match="outside the plan's 600"):
            plan.provenance(i)
    with pytest.raises(ValueError, match="source 'klingon' is not in the plan; it has english, chinese, code"):
        plan.heldout_rows("klingon")


def test_a_run_can_be_moved(moved: Path, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "run"
    before = Plan.open(moved / "plan").fingerprint
    shutil.move(moved, elsewhere)
    opened = Plan.open(elsewhere / "plan" / "plan.json")
    assert opened.fingerprint == before
    assert all(same(opened.row(i), plan.row(i)) for i in range(50))


def test_an_opened_plan_goes_to_another_process(plan: Plan) -> None:
    other = pickle.loads(pickle.dumps(plan))
    assert same(other.row(5), plan.row(5))


def test_opening_refuses_what_does_not_belong(moved: Path) -> None:
    plan = moved / "plan"
    Plan.open(plan)
    with pytest.raises(ValueError, match="there is no plan"):
        Plan.open(moved)

    def refused(path: Path, content: bytes | None, message: str) -> None:
        kept = path.read_bytes()
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            Plan.open(plan)
        assert "trivium data run" in str(error.value)
        path.write_bytes(kept)
        Plan.open(plan)

    array = plan / "train.code.start.npy"
    refused(array, array.read_bytes()[:-1] + b"\x01", "checksum")
    refused(array, None, "lacks train.code.start.npy")
    refused(plan / "plan.json", b"{", "is not JSON")
    refused(plan / "plan.json", b'{"format": "other"}', "is not a trivium-plan file")
    refused(
        moved / "tokenizer/tokenizer.model",
        None,
        "the plan's tokenizer .* does not exist; restore what the plan was made of",
    )
    refused(moved / "tokenizer/tokenizer.model", b"x", "not the one")
    store = moved / "tokens/train/code/00000"
    refused(store.with_name("00000.bin"), None, "no .bin")
    refused(store.with_name("00000.bin"), b"x", "it was cut")
    other = moved / "tokens/train/code/00001"
    for suffix in (".bin", ".idx", ".parquet", ".json"):  # replaced by a sound store with other tokens
        shutil.copy(other.with_name(f"00001{suffix}"), store.with_name(f"00000{suffix}"))
    with pytest.raises(ValueError, match="not the one that the plan was made of"):
        Plan.open(plan)
