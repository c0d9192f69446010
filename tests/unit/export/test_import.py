"""Hugging Face directories are imported bit for bit, or refused with a message that names the reason."""

import ast
import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

from configs.files import file_sha256
from configs.loader import ConfigError, load
from configs.model import ModelConfig
from export.families import to_hf
from export.hf_config import from_hf_config, to_hf_config
from export.hf_tokenizer import write_tokenizer
from export.import_hf import import_directory, main
from export.model_source import open_source
from export.publishing import RECORD
from export.tensors import open_tensors, write_tensors
from pretrain.model import build_single
from tests.unit.export.conftest import random_weights, tiny

LLAMA = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
}
MIXTRAL = LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}


def saved(tmp_path, moe: bool, dtype=torch.float32, **keys):
    """Saves a random transformers model with transformers and returns it."""
    config = transformers.MixtralConfig(**MIXTRAL, **keys) if moe else transformers.LlamaConfig(**LLAMA, **keys)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    return model.eval()


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_models_come_in_and_go_out_bit_identical(tmp_path, moe, dtype):
    model = saved(tmp_path, moe, dtype, rope_parameters={"rope_type": "default", "rope_theta": 1234.0})
    assert "written to" in import_directory(tmp_path / "hf", tmp_path / "out")
    source = open_source(tmp_path / "out")
    assert source.model.position.theta == 1234.0
    tokens = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours = build_single(source.model, source.read())(tokens, torch.arange(20)[None].expand(2, 20))
        theirs = model.float()(tokens).logits
    assert (ours - theirs).abs().max() < 1e-5
    weights = load_file(tmp_path / "out/model.safetensors")
    names, read = open_tensors(tmp_path / "hf")
    back = dict(to_hf(weights, source.model))
    assert back.keys() == names
    for name, tensor in back.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, read(name)), name


def test_model_section_is_read_by_the_config_loader(tmp_path):
    from configs.section import Section

    class Section_(Section):
        model: ModelConfig

    saved(tmp_path, moe=True, tie_word_embeddings=True)
    import_directory(tmp_path / "hf", tmp_path / "out")
    text = (tmp_path / "out/model.toml").read_text()
    (tmp_path / "train.toml").write_text(text.split("[import]")[0])
    config = load(Section_, tmp_path / "train.toml").model
    assert (config.tie_embeddings, config.moe.num_experts, config.norm.eps) == (True, 4, 1e-6)


@pytest.mark.parametrize(("moe", "tie"), [(False, False), (True, True)])
def test_config_both_ways(moe, tie):
    config = tiny(moe, tie)
    assert from_hf_config(to_hf_config(config, 64, "float32", 1, 2, 3)) == config


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2' is not supported; supported are llama, mixtral"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"mlp_bias": True}, "mlp_bias = True is not supported"),
        ({"sliding_window": 4096}, "sliding_window = 4096 is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = .* is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type = 'linear'"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}},
            "rope_parameters.rope_type = 'llama3'",
        ),
        (
            {"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5",
        ),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_key_value_heads": 3}, "num_heads = 4 is not a multiple of model.num_kv_heads = 3"),
    ],
)
def test_what_the_decoder_does_not_do_is_refused_by_key(tmp_path, capsys, keys, named):
    saved(tmp_path, moe=False)
    path = tmp_path / "hf/config.json"
    right = json.loads(path.read_text())
    path.write_text(json.dumps(right | keys))
    with pytest.raises(ConfigError, match=named) as raised:
        main([str(tmp_path / "hf"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    if expected := re.search(r"(\w+) = .* is not supported \(.*\); expected (\w+|'\w+')$", str(raised.value)):
        path.write_text(json.dumps(right | {expected[1]: ast.literal_eval(expected[2])}))
        assert main([str(tmp_path / "hf"), str(tmp_path / "out")]) == 0


def test_bad_places_and_files(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        main([str(tmp_path / "nowhere"), str(tmp_path / "out")])
    saved(tmp_path, moe=False)
    file = next((tmp_path / "hf").glob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    with pytest.raises(ConfigError, match=r"not a complete safetensors file .*fetch it again"):
        main([str(tmp_path / "hf"), str(tmp_path / "out")])
    file.unlink()
    with pytest.raises(ConfigError, match=f"{file} is missing, .*fetch it again"):
        main([str(tmp_path / "hf"), str(tmp_path / "out")])
    file.write_bytes(whole)
    assert main([str(tmp_path / "hf"), str(tmp_path / "fetched")]) == 0
    shutil.rmtree(tmp_path / "fetched")
    for file in (tmp_path / "hf").glob("model*"):
        file.unlink()
    (tmp_path / "hf/pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"pickled weights .*convert them to safetensors"):
        main([str(tmp_path / "hf"), str(tmp_path / "out")])
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    (tmp_path / "out").mkdir()
    saved(tmp_path, moe=False)
    with pytest.raises(ConfigError, match="exists already; name a new folder"):
        main([str(tmp_path / "hf"), str(tmp_path / "out")])
    assert main([str(tmp_path / "hf"), str(tmp_path / "new")]) == 0


def test_a_tokenizer_file_is_restored_or_removed_as_the_message_says(tmp_path, tokenizer_path):
    saved(tmp_path, moe=False)
    write_tokenizer(tmp_path / "hf", tokenizer_path, max_length=64)
    file, args = tmp_path / "hf/tokenizer.model", [str(tmp_path / "hf"), str(tmp_path / "out"), "--dry-run"]
    file.write_bytes(b"no tokenizer")
    with pytest.raises(ConfigError, match=r"is not a sentencepiece model; fetch it again, or remove it"):
        main(args)
    file.unlink()
    assert main(args) == 0
    record = tmp_path / "hf" / RECORD
    record.write_text(json.dumps({"files": {file.name: file_sha256(tokenizer_path)}}))
    file.write_bytes(b"another one")
    with pytest.raises(ConfigError, match=r"is not the one that .* was exported with; restore that one"):
        main(args)
    shutil.copy(tokenizer_path, file)
    assert main(args) == 0


def test_dry_run_writes_nothing(tmp_path, capsys):
    saved(tmp_path, moe=True)
    assert main([str(tmp_path / "hf"), str(tmp_path / "out"), "--dry-run"]) == 0
    assert "MixtralForCausalLM" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_shards_hold_every_tensor_once(tmp_path):
    config = tiny(moe=True)
    theirs = dict(to_hf(random_weights(config), config))
    write_tensors(tmp_path, theirs.items(), max_bytes=20_000)
    names, read = open_tensors(tmp_path)
    assert names == set(theirs)
    assert all(torch.equal(read(name), theirs[name]) for name in names)
    sizes = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert len(sizes) > 5
    # An embedding alone may exceed the limit; every other file is within it, apart from its header.
    assert sum(size > 24_000 for size in sizes) == 2
