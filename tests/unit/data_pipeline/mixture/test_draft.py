"""Tests shares, order and epochs of mixture plans, and the messages about too little text."""

import hashlib
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.mixture import PlanConfig
from configs.sealed import STAGE
from configs.tokenizer import TokenizerConfig
from data_pipeline.mixture.plan_files import build_plan, build_stages
from data_pipeline.mixture.rows import Plan
from data_pipeline.tokens import store
from data_pipeline.tokens.tokenizer import Tokenizer
from data_pipeline.tokens.tokenizer_training import train
from tests.shards import write_shard
from tests.unit.data_pipeline.mixture.plans import make


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_an_epoch_is_every_token_once_in_an_order_of_its_own(
    tokens: Path, tokenizer_folder: Path, tmp_path: Path, packing: str
) -> None:
    rows = make(tokens, tokenizer_folder, tmp_path / "probe", weights={"code": 1}, samples=1, packing=packing)
    epoch = rows["sources"][0]["rows_per_epoch"]
    described = make(tokens, tokenizer_folder, tmp_path / "p", weights={"code": 1}, samples=2 * epoch, packing=packing)
    assert described["sources"][0]["epochs"] == 2
    plan = Plan.open(tmp_path / "p")
    orders = []
    for first in (0, epoch):
        pieces = [
            (entry["shard"], entry["document"], entry["start"], entry["length"])
            for i in range(first, first + epoch)
            for entry in plan.provenance(i)
        ]
        seen = Counter((shard, document, start + k) for shard, document, start, length in pieces for k in range(length))
        expected = {
            (opened.path.name, document, k)
            for opened in store.SourceStores.in_folder(tokens / "train" / "code").stores
            for document in range(len(opened))
            for k in range(opened.lengths[document])
        }
        assert set(seen) == expected and set(seen.values()) == {1}
        orders.append(pieces)
    assert orders[0] != orders[1]


def test_samples_do_not_run_through_one_document(tokens: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    make(tokens, tokenizer_folder, tmp_path, weights={"chinese": 1}, samples=100)
    plan = Plan.open(tmp_path)
    first = [plan.provenance(i)[0]["document_id"] for i in range(100)]
    assert sum(a == b for a, b in pairwise(first)) < 60


def test_plan_is_a_function_of_its_inputs(tokens: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    for name, changes in {"a": {}, "b": {}, "c": {"seed": 4}, "d": {"packing": "concat"}}.items():
        make(tokens, tokenizer_folder, tmp_path / name, **changes)
    content = {
        name: {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / name).iterdir()}
        for name in "abcd"
    }
    assert content["a"] == content["b"]
    fingerprints = {Plan.open(tmp_path / name).fingerprint for name in "abcd"}
    assert len(fingerprints) == 3


def test_says_epochs_and_padding(tokens: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    described = make(tokens, tokenizer_folder, tmp_path)
    plan = Plan.open(tmp_path)
    rows = [plan.row(i) for i in range(plan.num_samples)]
    padding = np.mean([row.segments < 0 for row in rows])
    assert described["padding_share"] == pytest.approx(padding, abs=1e-6)
    samples = Counter(plan.sources[row.source] for row in rows)
    assert samples == {"english": 500, "chinese": 200, "code": 300}
    for source in described["sources"]:
        assert source["epochs"] == pytest.approx(source["samples"] / source["rows_per_epoch"], abs=1e-6)


def test_too_few_tokens_say_how_many_and_what_to_change(tokens: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"samples": 20_000, "max_epochs": 2}
    with pytest.raises(ValueError, match=r"mixture\.max_epochs = 2") as error:
        make(tokens, tokenizer_folder, tmp_path, **changes)
    message = str(error.value)
    total = int(store.SourceStores.in_folder(tokens / "train" / "chinese").lengths.sum())
    assert f"({total:,} tokens in " in message and " documents): at most " in message
    assert "chinese is to give 4,000 rows" in message
    assert not (tmp_path / "plan.json").exists()
    # The number of samples that the message names works; one more does not.
    most = int(message.split("Lower mixture.samples to ")[1].split(", ")[0].replace(",", ""))
    make(tokens, tokenizer_folder, tmp_path, **changes | {"samples": most})
    with pytest.raises(ValueError, match="too few tokens"):
        make(tokens, tokenizer_folder, tmp_path, **changes | {"samples": most + 10})
    epochs = int(message.split("raise mixture.max_epochs to ")[1].split(",")[0])
    make(tokens, tokenizer_folder, tmp_path, **changes | {"max_epochs": epochs})
    with pytest.raises(ValueError, match="too few tokens"):
        make(tokens, tokenizer_folder, tmp_path, **changes | {"max_epochs": epochs - 1})


def test_temperature_takes_all_sources(tokens: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    described = make(tokens, tokenizer_folder, tmp_path, weights=None, temperature=2.0)
    roots = {source["name"]: source["tokens"] ** 0.5 for source in described["sources"]}
    assert set(roots) == {"english", "chinese", "code"}
    for source in described["sources"]:
        assert source["share"] == pytest.approx(roots[source["name"]] / sum(roots.values()))


def test_bad_settings_are_named(tokens: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    cases = [
        ({"weights": {"english": 1, "klingon": 1}}, r"mixture\.weights\.klingon"),
        ({"weights": {"english": 0.0}}, "source english has weight 0.0, expected above 0; leave it out of the mixture"),
        ({"temperature": 1.0}, "exactly one"),
        ({"weights": None}, "exactly one"),
        ({"unimax": True}, "exactly one"),
        ({"epochs": {"klingon": 1}}, r"mixture\.epochs\.klingon"),
        ({"fim": {"klingon": 1}}, r"mixture\.fim\.klingon"),
        ({"packing": "tight"}, "'concat' or 'best_fit'"),
        ({"samples": 0}, "greater than or equal to 1"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            make(tokens, tokenizer_folder, tmp_path, **changes)
    with pytest.raises(ValueError, match="no token stores"):
        make(tmp_path, tokenizer_folder, tmp_path / "p")
    assert make(tokens, tokenizer_folder, tmp_path / "all", weights=None, temperature=0.1)["samples"] == 1000


def test_a_plan_is_made_once_each_source_has_documents_as_the_messages_say(
    tokens: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Takes down all documents of a source, and names one that the data run has no document of."""
    stores = store.SourceStores.in_folder(tokens / "train/code").stores
    gone = {"train/code": [(one.path.name, document) for one in stores for document in range(len(one))]}
    settings: dict[str, Any] = {"seq_length": 64, "samples": 50}
    mixed = PlanConfig(**settings, weights={"code": 0.5, "chinese": 0.5})
    with pytest.raises(
        ValueError, match=r"source code has no tokens under \S+train/code; leave it out of the mixture$"
    ):
        build_plan(tokens, tokenizer_folder, tmp_path / "p", mixed, without=gone)
    build_plan(tokens, tokenizer_folder, tmp_path / "p", PlanConfig(**settings, weights={"chinese": 1}), without=gone)

    run = tmp_path / "tokens"
    (run / "train").mkdir(parents=True)
    for source in ("code", "chinese"):
        (run / "train" / source).symlink_to(tokens / "train" / source)
    (run / "stage.json").write_bytes(STAGE.write({"sources": {"code": {}, "empty": {}}}))
    bare = PlanConfig(**settings, weights={"empty": 1.0})
    told = (
        r"mixture\.weights: none of empty has a document to train on; loosen their rules, give them more files, or gi"
    )
    with pytest.raises(ValueError, match=told):
        build_stages(run, tokenizer_folder, tmp_path / "q", {"": bare})
    other = PlanConfig(**settings, weights={"empty": 1.0, "code": 1.0})
    build_stages(run, tokenizer_folder, tmp_path / "other", {"": other})
    (run / "train/empty").symlink_to(tokens / "train/chinese")  # as with more files, or other rules
    build_stages(run, tokenizer_folder, tmp_path / "more", {"": bare})


def test_another_tokenizer_is_refused(tokens: Path, tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.jsonl.zst", [{"text": "other words, other pieces " * 5}])
    train([path], tmp_path / "tokenizer", TokenizerConfig.model_construct(vocab_size=290))
    with pytest.raises(ValueError, match=r"another tokenizer than \S+; tokenize it again, or name its own tokenizer$"):
        make(tokens, tmp_path / "tokenizer", tmp_path / "p")
    store.build(path, tmp_path / "again/train/code/00000", Tokenizer.load(tmp_path / "tokenizer"))
    make(tmp_path / "again", tmp_path / "tokenizer", tmp_path / "p", samples=1, weights={"code": 1.0})
