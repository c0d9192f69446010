"""The example in docs/families.md is a whole family: models that transformers makes go in and out by it."""

import re
from pathlib import Path
from typing import Any

from export.conversion import family_registry
from tests.unit.export.conversion.parity import check_both_ways, random_model

PAGE = Path(__file__).resolve().parents[4] / "docs/families.md"


def test_the_family_that_the_page_adds_is_converted_both_ways(tmp_path, monkeypatch):
    code = re.search(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert code
    names: dict[str, Any] = {}
    exec(compile(code[1], str(PAGE), "exec"), names)
    monkeypatch.setattr(family_registry, "FAMILIES", (*family_registry.FAMILIES, names["STARCODER2"]))
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    source = check_both_ways(tmp_path, random_model("starcoder2", **sizes, **heads, sliding_window=8))
    assert source.architecture == "Starcoder2ForCausalLM"
    assert (source.model.mlp.kind, source.model.norm.kind, source.model.mlp.bias) == ("gelu_tanh", "layer", True)
