"""Imported models with tokenizers that others trained: which file is taken, its roles, templates, and none at all."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sentencepiece import sentencepiece_model_pb2

from configs.loader import ConfigError
from configs.tokenizer import TokenizerConfig
from data_pipeline.tokens.foreign import load_named
from export import generate, huggingface
from export.hf_tokenizer import convert, read_model
from export.import_hf import main
from export.model_source import open_source
from tests.foreign_tokenizers import TEMPLATE, gpt2, qwen, write

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def saved(folder: Path, vocabulary: int, **ids: Any) -> Path:
    """Saves a random model whose config.json states the special `ids` and no others."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=vocabulary, **SIZES))
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    raw = json.loads((folder / "config.json").read_text())
    stated = {key: value for key, value in raw.items() if not key.endswith("token_id")} | ids
    (folder / "config.json").write_text(json.dumps(stated))
    return folder


def text(model: Path, capsys: pytest.CaptureFixture[str], prompt: str = "def f", tokens: int = 12) -> str:
    capsys.readouterr()
    arguments = [str(model), "--prompt", prompt, "--max-new-tokens", str(tokens), "--temperature", "0"]
    assert generate.main(arguments) == 0
    return capsys.readouterr().out


def exports(model: Path, out: Path) -> None:
    """Exports a model; the command's own checks hold transformers' tokenizer against Trivium's."""
    settings = out.with_suffix(".toml")
    settings.write_text(f'run = "{model}"\nout = "{out}"\nprompts = ["def"]\nchat_prompts = ["a"]\nsample_tokens = 2\n')
    assert huggingface.main([str(settings), "verify.greedy_tokens=8"]) == 0


def test_tokenizer_json_is_taken_where_the_sentencepiece_model_changes_text(
    tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Imports a folder like LLaMA's: tokenizer.model puts a space before a text; both files have equal pieces."""
    hub = saved(tmp_path / "hub", 800, eos_token_id=2)
    described = json.loads(convert(read_model(tokenizer_path)).to_str())
    described["added_tokens"] = described["added_tokens"][:3]  # <unk>, <s>, </s>: none of Trivium's for chats
    names = {"bos_token": "<s>", "add_bos_token": True}
    (hub / "tokenizer.json").write_text(json.dumps(described))
    (hub / "tokenizer_config.json").write_text(json.dumps(names))
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(tokenizer_path.read_bytes())
    model.normalizer_spec.add_dummy_prefix = True
    (hub / "tokenizer.model").write_bytes(model.SerializeToString())
    assert main([str(hub), str(tmp_path / "ours")]) == 0
    for source in (open_source(tmp_path / "ours"), open_source(hub)):
        codec = source.codec()
        assert source.tokenizer is not None and source.tokenizer.name == "tokenizer.json"
        assert codec.encode_prompt("a")[0] == 1 and codec.stop_ids == [2]
    assert text(tmp_path / "ours", capsys) == text(hub, capsys)
    exports(tmp_path / "ours", tmp_path / "back")
    # The roles, which only config.json and tokenizer_config.json named, are the import's own, and sealed.
    roles = tmp_path / "ours/tokenizer_config.json"
    roles.write_text(roles.read_text().replace("</s>", "<unk>"))
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json is not the one that the model was trained with"):
        text(tmp_path / "ours", capsys)


def test_a_model_without_an_end_writes_to_the_length_and_an_empty_prompt_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, _ = gpt2()
    hub = write(saved(tmp_path / "hub", made.get_vocab_size()), made, {})
    assert main([str(hub), str(tmp_path / "ours")]) == 0
    assert "names an eos_token_id, so that nothing says where its texts end" in capsys.readouterr().out
    for model in (tmp_path / "ours", hub):
        assert open_source(model).codec().stop_ids == []
        assert text(model, capsys).startswith("def f")
        with pytest.raises(ConfigError, match=r"--prompt '': the prompt is empty, and no token .*; write a prompt"):
            text(model, capsys, prompt="")
    exports(tmp_path / "ours", tmp_path / "back")
    told = json.loads((tmp_path / "back/config.json").read_text())
    assert "eos_token_id" not in told and "eos_token" not in json.loads(
        (tmp_path / "back/tokenizer_config.json").read_text()
    )
    with pytest.raises(ConfigError, match=r"which token ends a document .*; set tokenizer\.end_of_document"):
        load_named(TokenizerConfig(file=str(tmp_path / "ours")))
    named = load_named(TokenizerConfig(file=str(tmp_path / "ours"), end_of_document="<|endoftext|>"))
    assert named.pieces[named.eos_id] == "<|endoftext|>"


@pytest.mark.parametrize("held_in", ["file", "key", "both"])
def test_the_template_comes_from_its_file_or_its_key(held_in: str, tmp_path: Path) -> None:
    made, files = qwen()
    files["tokenizer_config.json"]["eos_token"] = "<|im_end|>"  # transformers wants more of one that is an object
    if held_in == "file":
        del files["tokenizer_config.json"]["chat_template"]
    hub = write(saved(tmp_path / "hub", made.get_vocab_size() + 9), made, files)
    wanted = TEMPLATE
    if held_in != "key":
        wanted = "{{ messages[0]['content'] }}"  # as transformers, which takes the file where both are there
        (hub / "chat_template.jinja").write_text(wanted)
    assert main([str(hub), str(tmp_path / "ours")]) == 0
    dialogue = [{"role": "user", "content": "hello"}]
    theirs = transformers.AutoTokenizer.from_pretrained(hub, local_files_only=True)
    for source in (open_source(tmp_path / "ours"), open_source(hub)):
        assert source.chat_template == wanted
        assert source.codec().render_chat(dialogue) == theirs.apply_chat_template(dialogue, tokenize=False)


def test_a_folder_with_several_ends_keeps_them_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, files = qwen()
    ends = [made.token_to_id("<|im_end|>"), made.token_to_id("<|endoftext|>")]
    hub = write(saved(tmp_path / "hub", made.get_vocab_size() + 9, eos_token_id=ends), made, files)
    assert main([str(hub), str(tmp_path / "ours")]) == 0
    shutil.rmtree(hub)
    assert open_source(tmp_path / "ours").codec().stop_ids == ends
    exports(tmp_path / "ours", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["eos_token_id"] == ends


@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer_config.json"])
def test_an_export_of_a_folder_that_says_other_ends_is_made_anew(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, files = qwen()
    ends = [made.token_to_id("<|im_end|>"), made.token_to_id("<|endoftext|>")]
    hub = write(saved(tmp_path / "hub", made.get_vocab_size() + 9, eos_token_id=ends[0]), made, files)
    (hub / "generation_config.json").write_text("{}")
    exports(hub, tmp_path / "back")
    config = json.loads((hub / "tokenizer_config.json").read_text())
    other = {"eos_token_id": ends} if file == "generation_config.json" else config | {"eos_token": "<|endoftext|>"}
    (hub / file).write_text(json.dumps(other))
    for says_it_again in (False, True):
        capsys.readouterr()
        exports(hub, tmp_path / "back")
        said = " ".join(capsys.readouterr().out.split())
        assert (f"back is up to date with {hub}; --force exports it again" in said) == says_it_again
    assert huggingface.main([str(tmp_path / "back.toml"), "verify.greedy_tokens=8", "--force"]) == 0
    assert "weights imported as LlamaForCausalLM" in (tmp_path / "back/README.md").read_text()
    assert f"published {tmp_path / 'back'}; load it with" in " ".join(capsys.readouterr().out.split())


def test_a_model_writes_text_once_its_folder_had_a_tokenizer_as_the_message_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, files = gpt2()
    hub = saved(tmp_path / "hub", made.get_vocab_size())
    assert main([str(hub), str(tmp_path / "bare")]) == 0
    told = (
        r"bare\S* does not say which tokenizer it was trained with; a run of `trivium train` does, and an imported mod"
    )
    with pytest.raises(ConfigError, match=told):
        text(tmp_path / "bare", capsys)
    assert main([str(write(hub, made, files)), str(tmp_path / "whole")]) == 0
    assert text(tmp_path / "whole", capsys, tokens=2)
