"""An export is verified before it is published; a wrong one is refused with a message that names the fault."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import export.hf_tokenizer
import export.hf_writer
import export.reloading
import export.tensors
from configs.export import ExportConfig
from configs.loader import plain, validate
from configs.model import ModelConfig
from data_pipeline.tokens.tokenizer import Tokenizer
from export import huggingface, publishing
from export.checked_texts import read_texts
from posttrain.chat.chat_format import ChatFormat, jinja_template
from tests.tiny_models import ENGLISH, make_source, random_weights, tiny


def run(source, out: Path, **keys) -> tuple[int, str]:
    """Exports `source` and returns (exit status, printed text)."""
    config = ExportConfig(
        run="unused", out=str(out), prompts=["春眠", ENGLISH[:40]], chat_prompts=["春眠"], sample_tokens=8, **keys
    )
    console = Console(record=True, width=200, file=io.StringIO())
    texts = read_texts(source, config, console)
    status = huggingface.export(source, texts, config, out, {"key": "value"}, console)
    return status, console.export_text()


@pytest.mark.parametrize(("moe", "tie"), [(False, False), (False, True), (True, False), (True, True)])
def test_export_loads_in_transformers_and_agrees(tmp_path, tokenizer_path, moe, tie):
    config = tiny(moe, tie)
    out = tmp_path / "out"
    status, printed = run(make_source(config, random_weights(config), tokenizer_path), out)
    assert status == 0
    assert "FAILED" not in printed
    assert "transformers loads it" in printed and re.search(r"\d+ tensors bit-identical", printed)
    assert "64 identical on 2 prompts" in printed
    assert "2 prompts (no held-out documents)" in printed
    assert "written by transformers" in printed
    model = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters()
    assert "and at the end of 128 tokens" in printed
    card = (out / "README.md").read_text()
    assert f"{type(model).__name__}, {config.num_parameters():,} parameters" in card
    assert re.search(r"\| logits, max difference \| \d\.\d\de-\d\d over ", card)
    assert model.generation_config.eos_token_id == [2]
    assert AutoTokenizer.from_pretrained(out, local_files_only=True)("It").input_ids[0] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o644}


def test_experts_of_odd_sizes_are_exported_and_modules_left_out_where_the_family_has_none(tmp_path, tokenizer_path):
    tree = plain(tiny(moe=True))
    changes = {"moe": {**tree["moe"], "ffn_hidden_size": 45}, "head": {"mtp_depth": 1}}
    config = validate(ModelConfig, tree | changes)
    status, printed = run(make_source(config, random_weights(config), tokenizer_path), tmp_path / "out")
    assert status == 0
    assert "FAILED" not in printed
    assert "MixtralForCausalLM has no modules of multi-token prediction, which are left out" in printed
    assert 'experts of these sizes need from_pretrained(..., experts_implementation="eager")' in printed
    options = {"local_files_only": True, "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
    assert sum(p.numel() for p in model.parameters()) == config.without_mtp().num_parameters()
    assert model(torch.tensor([[1, 5, 9]])).logits.isfinite().all()


def test_qwen2_keeps_the_tokenizer_that_the_model_was_trained_with(tmp_path, tokenizer_path):
    # AutoTokenizer builds one of its own for model_type qwen2, unless the folder has a class for it.
    tree = plain(tiny())
    config = validate(ModelConfig, tree | {"attention": {**tree["attention"], "qkv_bias": True}})
    status, printed = run(make_source(config, random_weights(config), tokenizer_path), tmp_path / "out")
    assert status == 0
    assert "FAILED" not in printed
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "qwen2"
    text = "  def f(x):\n\n\treturn 春眠  # 12345"
    for trusted in (False, True):
        fast = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True, trust_remote_code=trusted)
        assert fast(text).input_ids == [1, *Tokenizer.load(tokenizer_path).encode(text)]


def test_only_the_first_layers_are_compared_and_the_rest_bit_by_bit(tmp_path, tokenizer_path, monkeypatch):
    config = tiny()
    source = make_source(config, random_weights(config), tokenizer_path)
    status, printed = run(source, tmp_path / "out", verify={"layers": 2})
    assert status == 0
    assert "through the first 2 of 3 layers" in printed
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True).config.num_hidden_layers == 3
    norm = "model.layers.2.mlp.gate_proj.weight"
    _change_written(monkeypatch, lambda tensors: tensors | {norm: tensors[norm] + 1})
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.gate_proj\.weight differs by up to 1"):
        run(source, tmp_path / "other", verify={"layers": 2})


def test_a_vocabulary_larger_than_the_tokenizers_stays_whole(tmp_path, tokenizer_path):
    config = tiny(vocab_size=832)
    weights = random_weights(config)
    assert run(make_source(config, weights, tokenizer_path), tmp_path / "out")[0] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == 832


def test_everything_wrong_with_weights_is_told_at_once(tmp_path, tokenizer_path):
    config = tiny()
    weights = random_weights(config)
    del weights["layers.1.mlp_norm.weight"], weights["final_norm.weight"]
    weights["embedding.weight"] = weights["embedding.weight"].t()
    weights["value_head"] = torch.zeros(1)
    with pytest.raises(ValueError) as raised:
        run(make_source(config, weights, tokenizer_path), tmp_path / "out")
    for said in (
        "2 tensors are missing that the model of the config has: layers.1.mlp_norm.weight, final_norm.weight",
        "embedding.weight (32, 800) instead of (800, 32)",
        "1 tensor is not part of the model of the config: value_head",
    ):
        assert said in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_bf16_and_shards(tmp_path, tokenizer_path):
    config = tiny(moe=True)
    source = make_source(config, random_weights(config), tokenizer_path)
    status, _ = run(source, tmp_path / "out", dtype="bfloat16", max_shard_gb=2e-5)
    assert status == 0
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    assert model.dtype == torch.bfloat16


def test_chat_template_gives_the_ids_of_training(tmp_path, tokenizer_path):
    config = tiny()
    source = make_source(config, random_weights(config), tokenizer_path, template=jinja_template())
    status, printed = run(source, tmp_path / "out")
    assert status == 0
    assert "chat template" in printed
    fast = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    messages = [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": "Say <|end|> and </s>\u2581"},
        {"role": "assistant", "content": "It was 春"},
        {"role": "user", "content": ENGLISH},
    ]
    trained = ChatFormat(Tokenizer.load(tokenizer_path))
    ids = fast.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == trained.render_prompt(messages)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    assert model.generation_config.eos_token_id == [2, 7]


def _change_written(monkeypatch, change):
    """Lets `change` alter the tensors of the file, as a wrong rule of a table would."""
    original = export.hf_writer.convert

    def changed(walked, read, config, to, *kept):
        return change(dict(original(walked, read, config, to, *kept))).items()

    monkeypatch.setattr(export.hf_writer, "convert", changed)


def _swap_gate_and_up(monkeypatch):
    gate, up = (f"model.layers.1.mlp.{kind}_proj.weight" for kind in ("gate", "up"))
    _change_written(monkeypatch, lambda tensors: tensors | {gate: tensors[up], up: tensors[gate]})


def _drop_a_tensor(monkeypatch):
    _change_written(monkeypatch, lambda tensors: {k: v for k, v in tensors.items() if k != "model.norm.weight"})


def _config_key(key, value):
    def change(monkeypatch):
        original = export.hf_writer.to_hf_config
        monkeypatch.setattr(
            export.hf_writer, "to_hf_config", lambda *args: original(*args) | {key: value, "rope_theta": None}
        )

    return change


def _head_adds_one(monkeypatch):
    original = export.reloading.reload

    def changed(*args, **keys):
        hf = original(*args, **keys)
        hf.model.lm_head.register_forward_hook(lambda module, given, logits: logits + 1)
        return hf

    monkeypatch.setattr(export.reloading, "reload", changed)


def _reverse_merges(monkeypatch):
    original = export.hf_tokenizer.merges
    monkeypatch.setattr(export.hf_tokenizer, "merges", lambda model: original(model)[::-1])


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (_swap_gate_and_up, r"tensors on disk: layers\.1\.mlp\.gate_proj\.weight differs"),
        (_drop_a_tensor, r"tensors on disk: 1 tensor is missing that LlamaForCausalLM has: model\.norm\.weight"),
        (
            _config_key("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}),
            r"logits, max difference: first at the output of layers\.0",
        ),
        (_config_key("rms_norm_eps", 1e-2), r"first at the output of layers\.0"),
        (_head_adds_one, "logits, max difference: lm_head, all layers before it agree"),
        (_reverse_merges, r"tokenizer: text"),
    ],
)
def test_a_wrong_export_is_named_and_not_published(tmp_path, tokenizer_path, exported, monkeypatch, fault, named):
    config = tiny()
    source = make_source(config, random_weights(config), tokenizer_path)
    out = shutil.copytree(exported, tmp_path / "out")
    before = (out / publishing.RECORD).read_text()
    fault(monkeypatch)
    with pytest.raises(ValueError, match=named):
        run(source, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert (out / publishing.RECORD).read_text() == before


def test_a_router_that_differs_is_found_in_its_layer(tmp_path, tokenizer_path, monkeypatch):
    config = tiny(moe=True)
    _config_key("num_experts_per_tok", 1)(monkeypatch)
    with pytest.raises(ValueError, match=r"first at the output of layers\.0"):
        run(make_source(config, random_weights(config), tokenizer_path), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_current_exports_are_known_again(tmp_path, tokenizer_path):
    config = tiny()
    out = tmp_path / "out"
    run(make_source(config, random_weights(config), tokenizer_path), out)
    assert publishing.is_current(out, {"key": "value"})
    assert not publishing.is_current(out, {"key": "other"})
    raw = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(raw | {"rope_theta": 1.0}))
    assert not publishing.is_current(out, {"key": "value"})


def test_other_folders_are_left_alone_and_interrupted_ones_healed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="was not written by `trivium export`"):
        publishing.check_target(tmp_path / "mine")
    (tmp_path / ".out.previous").mkdir()
    publishing.check_target(tmp_path / "out")
    assert (tmp_path / "out").is_dir()
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial/left").write_text("from a killed export")
    with publishing.partly_written(tmp_path / "new", "out") as partial:
        assert not list(partial.iterdir())
    with pytest.raises(KeyError), publishing.partly_written(tmp_path / "deep/er/new", "out") as partial:
        raise KeyError
    assert not (tmp_path / "deep").exists()


def test_files_of_others_stay_when_a_folder_is_exported_again(tmp_path):
    out = tmp_path / "out"
    for number, names in enumerate((("config.json", "model-1.safetensors", "adapter/a"), ("config.json", "model"))):
        with publishing.partly_written(out, "out") as partial:
            for name in names:
                (partial / name).parent.mkdir(exist_ok=True)
                (partial / name).write_text(f"export {number}")
            publishing.publish(partial, out, {"made_from": number})
        (out / "eval").mkdir(exist_ok=True)
        (out / f"eval/step_{number}.json").write_text("result")
    found = [file.relative_to(out).as_posix() for file in sorted(out.rglob("*")) if file.is_file()]
    assert found == ["config.json", "eval/step_0.json", "eval/step_1.json", "model", publishing.RECORD]
    assert publishing.is_current(out, 1) and (out / "config.json").read_text() == "export 1"


def test_what_fp32_rounds_is_allowed(tmp_path, tokenizer_path):
    """Makes logits in the hundreds, which fp32 has to about 1e-4."""
    weights = random_weights(tiny())
    weights["lm_head.weight"] *= 100
    status, printed = run(make_source(tiny(), weights, tokenizer_path), tmp_path / "out")
    assert status == 0
    assert "8 times what fp32 rounds here" in printed


def test_a_fault_is_found_in_its_layer_among_large_hidden_states(tmp_path, tokenizer_path, monkeypatch):
    """Makes one element of the hidden state some ten thousands, which fp32 has to about 1e-3."""
    original = export.reloading.reload

    def reload(*args):
        hf = original(*args)
        with torch.no_grad():
            hf.model.model.layers[2].mlp.up_proj.weight.mul_(1.1)
        return hf

    monkeypatch.setattr(export.reloading, "reload", reload)
    weights = random_weights(tiny())
    weights["layers.0.mlp.down_proj.weight"][0] *= 1e3
    with pytest.raises(ValueError, match=r"first at the output of layers\.2"):
        run(make_source(tiny(), weights, tokenizer_path), tmp_path / "out")
