"""Checkpoints that torch's DCP and megatron-core wrote from several ranks are imported, and compute the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from configs.loader import ConfigError
from export import import_hf
from export.model_source import ModelSource, open_source
from pretrain.model import build_single
from tests.parallel.harness import RanksOf

VOCAB, PADDED, HEADS, KV_HEADS, TOLERANCE = 90, 96, 4, 2, 1e-5  # of the largest logit
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}
TOKENS = torch.arange(20).view(2, 10)


def described(folder: Path) -> Path:
    """Writes the config.json of the model into a folder of its own."""
    transformers.LlamaConfig(**LLAMA, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return folder


def logits(source: ModelSource) -> torch.Tensor:
    decoder = build_single(source.model, source.read())
    with torch.no_grad():
        return decoder(TOKENS, torch.arange(10)[None].expand(2, -1))


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns Meta's queries or keys as transformers has them, as in its script that converts LLaMA."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def test_a_sharded_checkpoint_of_torchtitans_names(ranks: RanksOf, tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
    draw = torch.Generator().manual_seed(1)
    theirs: dict[str, torch.Tensor] = {}

    def drawn(name: str, like: torch.Tensor) -> torch.Tensor:
        theirs[name] = torch.randn(like.shape, generator=draw) * 0.3 + (1.0 if like.ndim == 1 else 0.0)
        return theirs[name]

    with torch.no_grad():
        for name, module in (("tok_embeddings", model.model.embed_tokens), ("norm", model.model.norm)):
            module.weight.copy_(drawn(f"{name}.weight", module.weight))
        model.lm_head.weight.copy_(drawn("output.weight", model.lm_head.weight))
        for number, layer in enumerate(model.model.layers):
            attention, mlp, at = layer.self_attn, layer.mlp, f"layers.{number}."
            for name, module, heads in (
                *(("attention.wq", attention.q_proj, HEADS), ("attention.wk", attention.k_proj, KV_HEADS)),
                *(("attention.wv", attention.v_proj, 0), ("attention.wo", attention.o_proj, 0)),
                *(("feed_forward.w1", mlp.gate_proj, 0), ("feed_forward.w2", mlp.down_proj, 0)),
                *(("feed_forward.w3", mlp.up_proj, 0), ("attention_norm", layer.input_layernorm, 0)),
                ("ffn_norm", layer.post_attention_layernorm, 0),
            ):
                weight = drawn(f"{at}{name}.weight", module.weight)
                module.weight.copy_(halves(weight, heads) if heads else weight)
        expected = model(TOKENS).logits
    save_file(theirs, tmp_path / "weights.safetensors")
    arguments = {"weights": str(tmp_path / "weights.safetensors"), "folder": str(tmp_path / "step-3")}
    ranks(2).run("tests.parallel.workers.checkpoints:save_sharded", **arguments)
    assert len(list((tmp_path / "step-3").glob("*.distcp"))) == 2
    imported = [str(tmp_path / "step-3"), str(tmp_path / "ours"), "--from", "dcp"]
    with pytest.raises(ConfigError, match=r"has no config\.json, and a checkpoint .*; give --config a folder"):
        import_hf.main(imported)
    hub = str(described(tmp_path / "hub"))
    with pytest.raises(ConfigError, match=r"no embedding that --from megatron knows by its name; .* give --from dcp"):
        import_hf.main([*imported[:3], "megatron", "--config", hub])
    assert import_hf.main([*imported, "--config", hub]) == 0
    assert (logits(open_source(tmp_path / "ours")) - expected).abs().max() < TOLERANCE * expected.abs().max()
    lost = next((tmp_path / "step-3").glob("__1*.distcp"))
    lost.rename(tmp_path / "aside")
    with pytest.raises(ConfigError, match=rf"lacks {lost.name}, which its \.metadata names; fetch them again"):
        import_hf.main([*imported[:1], str(tmp_path / "again"), *imported[2:], "--config", hub])


@pytest.mark.parametrize("split", [False, True], ids=["stacked layers", "a name for each shard"])
def test_a_checkpoint_that_megatron_core_wrote_with_tp(ranks: RanksOf, tmp_path: Path, split: bool) -> None:
    """Imports what megatron-core's own model wrote, with a padded vocabulary and fused projections."""
    sizes: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "layernorm_epsilon": 1e-5}
    sizes |= {"num_attention_heads": HEADS, "num_query_groups": KV_HEADS}
    folder = tmp_path / "run/iter_0000007"
    folder.parent.mkdir()
    parts = ranks(2).run(
        "tests.parallel.workers.checkpoints:save_megatron",
        folder=str(folder),
        sizes=sizes,
        vocabulary=PADDED,
        metadata={"singleton_local_shards": True} if split else {},
    )
    expected = torch.cat([torch.tensor(part) for part in parts], -1)[..., :VOCAB]
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("7\n")
    hub = described(tmp_path / "hub")
    arguments = [str(tmp_path / "run"), str(tmp_path / "ours"), "--from", "megatron", "--config", str(hub)]
    assert import_hf.main(arguments) == 0
    assert (logits(open_source(tmp_path / "ours")) - expected).abs().max() < TOLERANCE * expected.abs().max()
    if split:
        return
    raw = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 3, "attention_bias": True}))
    shutil.rmtree(tmp_path / "ours")
    with pytest.raises(ConfigError, match=r"tensors are missing that megatron-core's GPTModel has: .*linear_qkv\.bias"):
        import_hf.main(arguments)
