"""Names and shapes of tensors, compared with those that transformers writes and reads."""

import ast
import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from configs.model import ModelConfig
from configs.model_parts import AttentionConfig
from export.families import check_weights, entries, from_hf, to_hf
from export.hf_config import to_hf_config
from export.tensors import open_tensors
from tests.unit.export.conftest import random_weights, tiny

CASES = [(False, False), (False, True), (True, False), (True, True)]


def hf_model(config: ModelConfig):
    raw = to_hf_config(config, 128, "float32", 1, 2, 3)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))


@pytest.mark.parametrize(("moe", "tie"), CASES)
def test_names_and_shapes_are_those_transformers_writes(tmp_path, moe, tie):
    config = tiny(moe, tie)
    hf_model(config).save_pretrained(tmp_path)
    names, read = open_tensors(tmp_path)
    ours = {name: tuple(tensor.shape) for name, tensor in to_hf(random_weights(config), config)}
    assert ours == {name: tuple(read(name).shape) for name in names}


@pytest.mark.parametrize("moe", [False, True])
def test_both_ways_is_the_identity(moe):
    config = tiny(moe)
    weights = random_weights(config)
    theirs = dict(to_hf(weights, config))
    back = dict(from_hf(theirs.__getitem__, theirs, config))
    assert list(back) == list(weights)
    assert all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize(("moe", "tie"), CASES)
def test_parameter_count_is_transformers(moe, tie):
    config = tiny(moe, tie)
    expected = sum(p.numel() for p in hf_model(config).parameters())
    assert config.num_parameters() == expected
    assert sum(torch.Size(entry.shape).numel() for entry in entries(config)) == expected


def test_llama_7b_has_its_published_size():
    config = ModelConfig(
        vocab_size=32000,
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=11008,
        num_heads=32,
        num_kv_heads=32,
    )
    with torch.device("meta"):
        weights = {entry.ours: torch.empty(entry.shape) for entry in entries(config)}
        model = hf_model(config)
    assert sum(tensor.numel() for _, tensor in to_hf(weights, config)) == 6_738_415_616
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    assert {name for name, _ in to_hf(weights, config)} == set(model.state_dict())


def test_wrong_weights_are_named():
    config = tiny()
    weights = random_weights(config)
    with pytest.raises(ValueError, match=r"tensor layers\.1\.mlp_norm\.weight is missing"):
        check_weights({k: v for k, v in weights.items() if k != "layers.1.mlp_norm.weight"}, config)
    with pytest.raises(ValueError, match=r"embedding\.weight has shape \(32, 800\).*\(800, 32\)"):
        check_weights(weights | {"embedding.weight": weights["embedding.weight"].t()}, config)
    with pytest.raises(ValueError, match="value_head is in the weights but not"):
        check_weights(weights | {"value_head": torch.zeros(1)}, config)


def test_foreign_checkpoints_are_refused_by_tensor_name():
    config = tiny(tie=True)
    theirs = dict(to_hf(random_weights(config), config))
    with pytest.raises(ValueError, match=r"tensor model\.norm\.bias and 0 others are not part of LlamaForCausalLM"):
        dict(
            from_hf(
                (theirs | {"model.norm.bias": torch.zeros(1)}).__getitem__,
                [*theirs, "model.norm.bias"],
                config,
            )
        )
    with pytest.raises(ValueError, match=r"tensor model\.norm\.weight is missing"):
        dict(from_hf(theirs.__getitem__, [name for name in theirs if name != "model.norm.weight"], config))
    # Old checkpoints have rotary frequencies, and some tied ones a copy of the head: both are accepted.
    extra = theirs | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6),
        "lm_head.weight": theirs["model.embed_tokens.weight"],
    }
    assert "lm_head.weight" not in dict(from_hf(extra.__getitem__, extra, config))
    extra["lm_head.weight"] = extra["lm_head.weight"] + 1
    with pytest.raises(ValueError, match=r"tie_word_embeddings = true, but lm_head\.weight differs.* set .* = false"):
        dict(from_hf(extra.__getitem__, extra, config))
    assert "lm_head.weight" in dict(from_hf(extra.__getitem__, extra, tiny(tie=False)))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"attention": AttentionConfig(qk_norm="head")}, "model.attention.qk_norm = 'head'"),
        ({"moe": {"gating": "sigmoid"}}, "model.moe.gating = 'sigmoid'"),
     ({"moe": {"num_shared_experts": 1}}, "num_shared_experts = 1"), ({"moe": {"bias_update_rate": 0.1}}, "0.1")],
)  # fmt: skip
def test_what_neither_family_computes_is_not_exported(changes, key):
    model = tiny("moe" in changes)
    moe = model.moe.model_copy(update=changes["moe"]) if model.moe else None
    with pytest.raises(ValueError, match=key) as raised:
        entries(model.model_copy(update={**changes, "moe": moe}))
    told = re.search(
        r"model\.(?:moe\.|attention\.)?(\w+) = .* has (\S+); train the model with that value", str(raised.value)
    )
    assert told
    value = {told[1]: ast.literal_eval(told[2])}
    if "attention" in changes:
        value = {"attention": AttentionConfig(**value)}
    moe = moe and moe.model_copy(update=value)
    assert entries(model.model_copy(update={**changes, "moe": moe} if moe else value))
