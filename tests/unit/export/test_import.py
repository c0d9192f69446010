"""Hugging Face directories are imported bit for bit, or refused with a message that names the reason."""

import errno
import json
import shutil

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from configs.files import file_sha256
from configs.loader import ConfigError, load
from configs.model import ModelConfig
from export import huggingface, tensors
from export.conversion.family_registry import computation
from export.hf_config import from_hf_config, to_hf_config
from export.hf_tokenizer import write_tokenizer
from export.import_hf import import_directory, main
from export.model_source import open_source
from export.publishing import RECORD
from export.tensors import open_tensors, write_tensors
from pretrain.checkpoint import storage
from tests.tiny_models import random_weights, tiny
from tests.unit.export.conversion.parity import export_again

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
    config = transformers.MixtralConfig(**MIXTRAL | keys) if moe else transformers.LlamaConfig(**LLAMA | keys)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    return model.eval()


def test_model_section_is_read_by_the_config_loader(tmp_path):
    from configs.section import Section

    class Section_(Section):
        model: ModelConfig

    saved(tmp_path, moe=True, tie_word_embeddings=True)
    import_directory(tmp_path / "hf", tmp_path / "out")
    config = load(Section_, tmp_path / "out/config.toml").model
    assert (config.tie_embeddings, config.moe.num_experts, config.norm.eps) == (True, 4, 1e-6)


@pytest.mark.parametrize(("moe", "tie"), [(False, False), (True, True)])
def test_config_both_ways(moe, tie):
    config = tiny(moe, tie)
    assert computation(from_hf_config(to_hf_config(config, 64, "float32", 1, 2, 3))) == computation(config)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (
            {"model_type": "kimi_linear"},
            r"'kimi_linear' is not supported \(its gated delta nets decay each element",
        ),
        ({"model_type": ["llama"]}, r"model_type = \['llama'\] is not supported"),
        ({"model_type": None, "architectures": 3}, "model_type = None is not supported"),
        ({"model_type": "mamba"}, "model_type = 'mamba' is not supported; supported are llama, mistral, mixtral, "),
        ({"hidden_act": "relu2"}, "hidden_act = 'relu2' is not supported .* expected 'silu' or"),
        (
            {"quantization_config": {"bits": 4}},
            "quantization_config = .* is not supported; import the weights in full precision, without that key",
        ),
        ({"rope_scaling": {"type": "mrope"}}, "rope_scaling.rope_type = 'mrope' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        (
            {"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5 is not supported .* expected 1.0",
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
    with pytest.raises(ConfigError, match=named):
        main([str(tmp_path / "hf"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    path.write_text(json.dumps(right))
    assert main([str(tmp_path / "hf"), str(tmp_path / "out"), "--dry-run"]) == 0


def test_everything_wrong_with_a_folder_is_told_in_one_message(tmp_path):
    saved(tmp_path, moe=False)
    folder = tmp_path / "hf"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    # A shard is removed, a tensor of another one renamed, one cut; the config says another vocabulary and activation.
    gone = index["model.layers.0.self_attn.q_proj.weight"]
    file = next(
        name
        for name in sorted(set(index.values()))
        if name != gone and "layers.1.mlp" in str(load_file(folder / name).keys())
    )
    tensors = load_file(folder / file)
    renamed = next(name for name in tensors if "layers.1.mlp" in name)
    tensors["model.layers.1.mlp.renamed.weight"] = tensors.pop(renamed)
    cut = next(name for name in tensors if "layers.1" in name and "renamed" not in name)
    tensors[cut] = tensors[cut][:3]
    save_file(tensors, folder / file)
    index["model.layers.1.mlp.renamed.weight"] = index.pop(renamed)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / gone).unlink()
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"hidden_act": "relu2", "vocab_size": 90}))
    with pytest.raises(ConfigError) as raised:
        main([str(folder), str(tmp_path / "out")])
    for said in (
        f"{folder / gone} is missing, but",
        f"1 tensor is missing that LlamaForCausalLM has: {renamed}",
        f"{cut} (3",
        "1 tensor is not part of LlamaForCausalLM: model.layers.1.mlp.renamed.weight",
        "hidden_act = 'relu2' is not supported",
        "the embedding has 96 rows and config.json says vocab_size = 90; set vocab_size = 96",
    ):
        assert said in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_tied_without_a_key_is_told_with_the_remedy(tmp_path):
    # transformers would draw a random head, and say so only in a list of missing keys.
    saved(tmp_path, moe=False, tie_word_embeddings=True)
    path = tmp_path / "hf/config.json"
    raw = json.loads(path.read_text())
    del raw["tie_word_embeddings"]
    path.write_text(json.dumps(raw))
    args = [str(tmp_path / "hf"), str(tmp_path / "out")]
    with pytest.raises(ConfigError, match=r"lm_head\.weight; if .* set tie_word_embeddings = true in config.json"):
        main(args)
    path.write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    assert main(args) == 0


def test_a_tokenizer_of_more_tokens_than_the_model_is_told_with_the_rest(tmp_path, tokenizer_path):
    saved(tmp_path, moe=False, hidden_act="relu2")
    write_tokenizer(tmp_path / "hf", tokenizer_path, max_length=64)
    with pytest.raises(ConfigError, match=r"(?s)relu2.* has tokens up to id 799, and .* says vocab_size = 96"):
        main([str(tmp_path / "hf"), str(tmp_path / "out")])


def test_a_missing_bias_is_not_taken_for_zeros(tmp_path):
    saved(tmp_path, moe=False)
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "qwen2"}))
    with pytest.raises(ConfigError, match=r"6 tensors are missing that Qwen2ForCausalLM has: .*q_proj\.bias"):
        main([str(tmp_path / "hf"), str(tmp_path / "out")])


def test_old_and_doubled_tensors_are_left_out_and_names_may_lack_their_beginning(tmp_path):
    saved(tmp_path, moe=False, tie_word_embeddings=True)
    folder = tmp_path / "hf"
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in folder.glob("model*"):
        file.unlink()
    # Old files have rotary frequencies, and some tied ones a copy of the head.
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    more["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | more, folder / "model.safetensors")
    assert main([str(folder), str(tmp_path / "one")]) == 0
    with storage.Reader(tmp_path / "one/checkpoints/step_0") as reader:
        names = [*reader.shapes, *reader.kept]
    assert not {name for name in names if "lm_head" in name or "inv_freq" in name}
    save_file(tensors | {"lm_head.weight": more["lm_head.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"tie_word_embeddings = true, but lm_head\.weight differs.* set .* = false"):
        main([str(folder), str(tmp_path / "two")])
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert main([str(folder), str(tmp_path / "bare")]) == 0
    assert set(export_again(open_source(tmp_path / "bare"), tmp_path / "again").files) == set(tensors)


def test_the_context_of_an_imported_model_is_what_it_states(tmp_path):
    saved(tmp_path, moe=False)
    assert main([str(tmp_path / "hf"), str(tmp_path / "out")]) == 0
    source = open_source(tmp_path / "out")
    assert source.context == 64
    export_again(source, tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["max_position_embeddings"] == 64


def test_bad_folders_and_files(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere does not exist; name a Hugging Face"):
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


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "is not a complete index"),
        ("[]", "it has no weight_map"),
        ('{"weight_map": []}', "it has no weight_map"),
        ('{"weight_map": {}}', "it has no weight_map"),
        ('{"weight_map": {"a": 3}}', "the file of a is 3, and not the name of a file"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "the file of a is '../a.safetensors', and not the name of a"),
        ('{"weight_map": {"a": "folder"}}', "folder is not a complete safetensors file"),
    ],
)
def test_a_broken_index_is_told(tmp_path, index, said):
    saved(tmp_path, moe=False)
    (tmp_path / "hf/folder").mkdir()
    (tmp_path / "hf/model.safetensors.index.json").write_text(index)
    with pytest.raises(ConfigError, match=said):
        main([str(tmp_path / "hf"), str(tmp_path / "out")])


def test_of_an_index_and_a_whole_file_the_file_counts_as_in_transformers(tmp_path):
    model = saved(tmp_path, moe=False)
    save_file({name: tensor + 1 for name, tensor in model.state_dict().items()}, tmp_path / "hf/model.safetensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", local_files_only=True).state_dict()
    assert main([str(tmp_path / "hf"), str(tmp_path / "out")]) == 0
    weight = open_source(tmp_path / "out").read()["embedding.weight"]
    assert torch.equal(weight, theirs["model.embed_tokens.weight"])
    assert torch.equal(weight, model.state_dict()["model.embed_tokens.weight"] + 1)
    save_file({}, tmp_path / "hf/model.safetensors")
    with pytest.raises(ConfigError, match="holds no tensor; fetch it again"):
        main([str(tmp_path / "hf"), str(tmp_path / "empty")])


def test_a_tokenizer_file_is_restored_or_removed_as_the_message_says(tmp_path, tokenizer_path):
    saved(tmp_path, moe=False, vocab_size=800)
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
    tensors = random_weights(tiny(moe=True))
    write_tensors(tmp_path, tensors.items(), max_bytes=20_000)
    names, read = open_tensors(tmp_path)
    assert names == set(tensors)
    assert all(torch.equal(read(name), tensors[name]) for name in names)
    sizes = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert len(sizes) > 5
    # A tensor alone may exceed the limit; every other file is within it, apart from its header.
    assert sum(size > 24_000 for size in sizes) == sum(tensor.nbytes > 20_000 for tensor in tensors.values())


def test_a_model_that_names_no_end_is_told_and_stays_so(tmp_path, capsys):
    saved(tmp_path, moe=False)
    path = tmp_path / "hf/config.json"
    raw = {key: value for key, value in json.loads(path.read_text()).items() if key != "eos_token_id"}
    path.write_text(json.dumps(raw | {"bos_token_id": None}))
    (tmp_path / "hf/generation_config.json").unlink()
    assert main([str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    assert "names an eos_token_id, so that nothing says where its texts end" in capsys.readouterr().out
    (tmp_path / "export.toml").write_text(f'run = "{tmp_path / "ours"}"\nout = "{tmp_path / "back"}"\n')
    assert huggingface.main([str(tmp_path / "export.toml"), "verify.greedy_tokens=8"]) == 0
    again = json.loads((tmp_path / "back/config.json").read_text())
    assert "eos_token_id" not in again  # transformers' own of the class is taken then, before as after
    assert again["bos_token_id"] is None


@pytest.mark.parametrize("moe", [False, True])
def test_a_model_without_a_tokenizer_of_ours_goes_through_both_commands(tmp_path, capsys, moe):
    saved(tmp_path, moe, torch.bfloat16, bos_token_id=5, eos_token_id=[6, 7])
    (tmp_path / "hf/generation_config.json").write_text("{}")
    (tmp_path / "hf/tokenizer_config.json").write_text('{"tokenizer_class": "Other"}')
    assert main([str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    (tmp_path / "export.toml").write_text(f'run = "{tmp_path / "ours"}"\nout = "{tmp_path / "back"}"\n')
    assert huggingface.main([str(tmp_path / "export.toml"), "verify.greedy_tokens=32"]) == 0
    assert "random tokens" in " ".join(capsys.readouterr().out.split())
    (before, read), (after, read_again) = (open_tensors(tmp_path / name) for name in ("hf", "back"))
    assert before == after
    for name in before:
        assert read(name).dtype == read_again(name).dtype == torch.bfloat16
        assert torch.equal(read(name), read_again(name)), name
    for name in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "back" / name).read_text())
        assert (content["bos_token_id"], content["eos_token_id"]) == (5, [6, 7])
    raw = json.loads((tmp_path / "hf/config.json").read_text())
    again = json.loads((tmp_path / "back/config.json").read_text())
    assert raw["pad_token_id"] is None is again["pad_token_id"]
    assert (tmp_path / "back/tokenizer_config.json").read_bytes() == b'{"tokenizer_class": "Other"}'


def test_a_tokenizer_that_adds_a_space_is_kept_as_a_file_and_never_used(tmp_path, tokenizer_path):
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(tokenizer_path.read_bytes())
    model.normalizer_spec.add_dummy_prefix = True  # as LLaMA's does
    saved(tmp_path, moe=False, vocab_size=800)
    (tmp_path / "hf/tokenizer.model").write_bytes(model.SerializeToString())
    assert main([str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    assert open_source(tmp_path / "ours").tokenizer is None
    (tmp_path / "export.toml").write_text(f'run = "{tmp_path / "ours"}"\nout = "{tmp_path / "back"}"\n')
    assert huggingface.main([str(tmp_path / "export.toml"), "verify.greedy_tokens=8"]) == 0
    assert (tmp_path / "back/tokenizer.model").read_bytes() == model.SerializeToString()


def test_all_ids_that_end_an_answer_are_kept(tmp_path, tokenizer_path):
    saved(tmp_path, moe=False, vocab_size=800, eos_token_id=[2, 7, 9])
    write_tokenizer(tmp_path / "hf", tokenizer_path, max_length=64)
    assert main([str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    assert open_source(tmp_path / "ours").codec().stop_ids == [2, 7, 9]
    (tmp_path / "export.toml").write_text(f'run = "{tmp_path / "ours"}"\nout = "{tmp_path / "back"}"\n')
    keys = ["verify.greedy_tokens=8", "sample_tokens=4", 'prompts=["It was"]']
    assert huggingface.main([str(tmp_path / "export.toml"), *keys]) == 0
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text())["eos_token_id"] == [2, 7, 9]


def test_experts_of_two_dtypes_which_become_one_tensor_are_told(tmp_path):
    model = saved(tmp_path, moe=True)
    for file in (tmp_path / "hf").glob("model*"):
        file.unlink()
    model.save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf/model.safetensors"
    found = load_file(file)
    mixed = {name: tensor.half() if ".norm" in name else tensor for name, tensor in found.items()}
    save_file(mixed, file, {"format": "pt"})
    assert main([str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    again = export_again(open_source(tmp_path / "ours"), tmp_path / "back")
    assert all(again.read(name).dtype == tensor.dtype for name, tensor in mixed.items())
    name = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
    save_file(mixed | {name: mixed[name].bfloat16()}, file, {"format": "pt"})
    with pytest.raises(
        ConfigError, match=rf"experts\.0\.w2\.weight is F32 and {name} is BF16, .* save .* in one dtype"
    ):
        main([str(tmp_path / "hf"), str(tmp_path / "out")])


def test_a_full_disk_is_an_error_of_the_system_that_names_the_file(tmp_path, monkeypatch):
    def refuses(*args, **kwargs):  # as the library does on a full disk
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensors, "save_file", refuses)
    with pytest.raises(OSError, match="No space left on device") as raised:
        write_tensors(tmp_path, [("a", torch.zeros(3))], 100)
    assert raised.value.errno == errno.ENOSPC and str(raised.value.filename).startswith(str(tmp_path))
