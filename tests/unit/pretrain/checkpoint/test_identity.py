"""Runs that differ in what a run may not change: their checkpoints are refused in words, by the keys of the config."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.adapters import AdapterConfig
from configs.loader import ConfigError, plain, validate
from posttrain.preference.group_packing import PackedRow, PackedSource, Segment, pack
from pretrain.checkpoint.lineage import Lineage
from pretrain.checkpoint.resume import check_identity
from tests.foreign_tokenizers import gpt2, write

LORA = plain(validate(AdapterConfig, {"rank": 4}))


def rows(margin: float) -> list[PackedRow]:
    """Returns a row with a document of four tokens and a margin."""
    ids = np.arange(4)
    return pack([[Segment(ids, ids, ids > 0, {"margin": np.full(4, margin)})]], 8, 0)


def refusal(identity: dict[str, Any], now: dict[str, Any], before: dict[str, Any], margin: float = 0.0) -> str:
    """Returns the message for a run with the config `now` and a checkpoint with the config `before` and `identity`.

    The margin of the checkpoint's data is 0.
    """
    began, source = PackedSource("pairs", rows(0.0), 1), PackedSource("pairs", rows(margin), 1)
    manifest = {
        "step": 2,
        "samples": 8,
        "config": {"train": {}, **before},
        "identity": {"data": began.fingerprint, **identity},
        "data_spans": [{"facts": began.facts}],
    }
    ours = {"data": source.fingerprint, "adapter": now.get("adapter")}
    with pytest.raises(ConfigError) as refused:
        check_identity("step_2", manifest, ours, source, {"train": {}, **now})
    return str(refused.value).removeprefix("step_2 was trained with other settings than this config: ")


def test_a_key_of_another_section_that_decides_the_data_is_named() -> None:
    before, now = ({"data": {"files": ["a"]}, "reward_model": {"margin": m, "centring": m}} for m in (0.0, 0.5))
    said = refusal({}, now, before, margin=0.5)
    assert said.startswith("reward_model.margin 0.0 -> 0.5; its data differ: pairs differs in content, with 1 rows as")
    assert "centring" not in said, "which may change"
    said = refusal({}, {"data": now["data"], "teacher": {"run": "b"}}, {"data": {}, "teacher": {"run": "a"}}, 0.5)
    assert "teacher.run a -> b" in said


def test_an_adapter_that_is_new_or_gone_is_one_word_and_other_changes_are_keys() -> None:
    assert refusal({"adapter": None}, {"adapter": LORA}, {}).startswith("section adapter, of kind lora, is new; set it")
    assert refusal({"adapter": LORA}, {}, {}).startswith("section adapter, of kind lora, is gone; set it back, or")
    other = {"adapter": {**LORA, "rank": 8, "dropout": 0.5}}
    assert refusal({"adapter": LORA}, other, {}).startswith("adapter.rank 4 -> 8; adapter.dropout 0.0 -> 0.5; set it")


def test_a_fact_that_is_a_hash_alone_is_told_without_it() -> None:
    source = PackedSource("pairs", rows(0.0), 1)
    source.by_keys = lambda facts: facts  # type: ignore[method-assign]
    for before in ({"pairs": "0123456789ab"}, {**source.facts, "teacher": "0123456789ab"}):
        said = source.difference(before)
        assert "differs in content" in said and "-> ;" not in f"{said};" and "0123" not in said, said


def test_another_tokenizer_is_told_by_what_differs_in_it(tmp_path: Path) -> None:
    """Resumes a run with a tokenizer of the same size, whose rules, or roles and template, are others."""
    kept, other = (write(tmp_path / name, *gpt2()) for name in ("run", "other"))
    began = Lineage(kept / "tokenizer.json", roles=b"{}")
    manifest = {"step": 2, "samples": 8, "config": {"train": {}}, "identity": began.identity}

    def refused(roles: dict[str, Any], **parts: Any) -> str:
        described = json.loads((kept / "tokenizer.json").read_text()) | parts
        (other / "tokenizer.json").write_text(json.dumps(described, indent=1))
        lineage = Lineage(other / "tokenizer.json", roles=json.dumps(roles).encode())
        with pytest.raises(ConfigError, match=r"set it back, or choose another run\.dir") as found:
            source = PackedSource("pairs", rows(0.0), 1)
            check_identity(kept / "checkpoints/step_2", manifest, lineage.identity, source, {"train": {}}, lineage)
        return str(found.value).partition("the roles of the tokenizer's tokens differ; ")[2]

    (kept / "tokenizer_config.json").write_text("{}")
    (other / "tokenizer_config.json").write_text("{}")
    where = f"{other}/tokenizer.json against {kept}/tokenizer.json: "
    assert refused({"a": 1}, normalizer={"type": "NFC"}).startswith(f"{where}the same text becomes ")
    said = refused({"pad_token": "b", "chat_template": "c"})
    assert said.startswith(f"{where}pad_token unset -> b; its chat template differs; set")
