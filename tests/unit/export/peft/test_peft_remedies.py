"""Remedies in messages about adapters: each is done word for word, and the export or the import goes on then."""

import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from configs.adapters import AdapterConfig
from configs.initial import InitConfig
from configs.loader import ConfigError, validate
from configs.model import ModelConfig
from configs.sealed import CHECKPOINT
from export import huggingface, import_hf
from export.conversion.family_registry import family_of
from export.hf_folder import FolderTensors, open_hf_folder
from export.model_source import open_source
from export.peft import importing
from export.peft.adapter import Base, OwnAdapter, PeftError
from export.peft.forms import form_of_kind
from export.peft.low_rank import LowRankForm
from export.publishing import RECORD
from pretrain.checkpoint import storage
from pretrain.model import Decoder, LayerContext, init_weights
from pretrain.model.adapters import add_adapters, is_adapter
from pretrain.run.initial_model import InitialModel
from tests.tiny_models import tiny, write_imported
from tests.unit.export.conversion.parity import random_model

LORA = AdapterConfig(rank=2)
KINDS = {
    "lora": LORA,
    "nf4": AdapterConfig(rank=2, base="nf4"),
    "prompt": AdapterConfig(kind="prompt", virtual_tokens=2),
    "prefix": AdapterConfig(kind="prefix", virtual_tokens=2, encoder_size=4),
    "bottleneck": AdapterConfig(kind="bottleneck", bottleneck_size=4),
}
MODELS = {
    "text": tiny(),
    "values": tiny().with_values(),
    "scaled": tiny(tie=True).model_copy(update={"scale_embedding": True}),
}


def drawn(model: ModelConfig, config: AdapterConfig) -> OwnAdapter:
    decoder = Decoder(model, context=(context := LayerContext(dtype=torch.float32)))
    add_adapters(decoder, config, context, 0.1)
    init_weights(decoder, seed=1)
    return OwnAdapter(config, {n: p.detach().clone() for n, p in decoder.named_global_parameters() if is_adapter(n)})


def dora(targets: Sequence[str]) -> AdapterConfig:
    return validate(AdapterConfig, {"kind": "dora", "rank": 2, "targets": targets})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Path:
    """Folder with three models, and a run of each kind of adapter on each of them; one began from random weights."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, model in MODELS.items():
        base = write_imported(folder / name, model, tokenizer_path)
        initial = InitialModel.open(InitConfig(run=str(base)), str(folder / "new"), "no")
        for kind, config in KINDS.items():
            own = drawn(model, config)
            run = folder / f"{name}_{kind}"
            run.mkdir()
            importing._write(run, run, own, initial, None)
    weights = open_source(folder / "text").read()
    initial = InitialModel.open(InitConfig(run=str(folder / "text")), str(folder / "new"), "no")
    for kind in ("lora", "prefix"):
        own = drawn(MODELS["text"], KINDS[kind])
        run = folder / f"random_{kind}"
        run.mkdir()
        importing._write(run, run, OwnAdapter(own.config, {**weights, **own.tensors}), initial, None)
        manifest = storage.directory(run, 0) / "manifest.json"
        facts = CHECKPOINT.read(manifest.read_bytes(), manifest)
        manifest.write_bytes(CHECKPOINT.write({name: fact for name, fact in facts.items() if name != "base"}))
    return folder


def refused(run: Path, way: str, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Returns the message with which an export of the adapter this way is refused, "" if it is not."""
    (out / "export.toml").write_text(
        f'run = "{run}"\nout = "{out}/{run.name}_{way}"\nprompts = ["It was"]\nsample_tokens = 1\nadapter = "{way}"\n'
    )
    capsys.readouterr()
    try:
        status = huggingface.main([str(out / "export.toml"), "--dry-run", "verify.greedy_tokens=8"])
    except ConfigError as error:
        return str(error)
    return capsys.readouterr().out if status else ""


@pytest.mark.parametrize(
    ("run", "way", "words", "right"),
    [
        ("text_prefix", "merge", r"set adapter=peft, which writes them alone, or tune the", [("text_prefix", "peft")]),
        ("text_prefix", "merge", r"or tune the model with adapter\.kind=lora$", [("text_lora", "merge")]),
        (
            "text_bottleneck",
            "merge",
            r"no class of transformers computes them; tune the model with adapter\.kind=lora$",
            [("text_lora", "merge")],
        ),
        ("text_bottleneck", "peft", r"train with one that does, lora, .*prefix", [("text_lora", "peft")]),
        ("text_bottleneck", "peft", r"train with one that does, lora, .*prefix", [("text_prefix", "peft")]),
        ("text_nf4", "peft", r"PEFT's format does not say so; .*set adapter=merge", [("text_nf4", "merge")]),
        ("values_lora", "both", r"text, not reward models; set adapter=merge", [("values_lora", "merge")]),
        (
            "values_prefix",
            "merge",
            r"no class of transformers computes them; tune the model with adapter\.kind=lora$",
            [("values_lora", "merge")],
        ),
        (
            "values_prefix",
            "peft",
            r"is for models that write text, .*; train with adapter\.kind=lora, and set adapter=merge",
            [("values_lora", "merge")],
        ),
        ("random_lora", "peft", r"there is no base to load them onto; set adapter=merge", [("random_lora", "merge")]),
        ("random_prefix", "peft", r"load them onto; train with adapter.kind=lora, and set", [("random_lora", "merge")]),
        (
            "random_prefix",
            "merge",
            r"no class of transformers computes them; tune the model with adapter\.kind=lora$",
            [("random_lora", "merge")],
        ),
        (
            "scaled_prompt",
            "peft",
            r"train with adapter\.kind=prefix or lora, which can be written",
            [("scaled_prefix", "peft"), ("scaled_lora", "peft")],
        ),
        (
            "scaled_prompt",
            "merge",
            r"no class of transformers computes them; tune the model with adapter\.kind=lora$",
            [("scaled_lora", "merge")],
        ),
    ],
)
def test_an_adapter_is_exported_as_its_message_says(
    run: str, way: str, words: str, right: list[tuple[str, str]], runs: Path, tmp_path: Path, capsys: Any
) -> None:
    said = " ".join(refused(runs / run, way, tmp_path, capsys).split()).removesuffix("; nothing was published")
    assert re.search(words, said), said
    for other, instead in right:
        assert not refused(runs / other, instead, tmp_path, capsys)


def test_dora_leaves_out_the_layers_that_its_message_leaves_out(tmp_path: Path) -> None:
    """Writes DoRA of a model with experts, whose layer without them PEFT takes for one of theirs."""
    sizes: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "head_dim": 12,
    }
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    random_model("qwen3_moe", **sizes, moe_intermediate_size=24, mlp_only_layers=[0]).save_pretrained(tmp_path)
    opened = open_hf_folder(tmp_path)
    base, form = Base(opened.family, opened.model, FolderTensors(opened).read), LowRankForm()
    every = ("q_proj", "o_proj", "gate_proj", "down_proj")
    with pytest.raises(PeftError, match=r"takes the layer for one of the experts; .* adapter=merge, or train") as told:
        form.write(drawn(opened.model, dora(every)), base)
    named = re.findall(r"'(\w+)'", str(told.value).partition("adapter.targets=")[2])
    assert named == ["q_proj", "o_proj"]
    form.write(drawn(opened.model, dora(named)), base)
    with pytest.raises(PeftError, match=r"since it takes the layer for one of .*set adapter=merge$"):
        form.write(drawn(opened.model, dora(every[2:])), base)


def test_a_damaged_adapter_is_read_once_its_files_are_as_the_message_says(runs: Path, tmp_path: Path) -> None:
    folder, base = tmp_path / "peft", open_source(runs / "text")
    with base.weights() as weights:
        read = Base(family_of(base.model), base.model, weights.read)
        written = form_of_kind("lora").write(drawn(base.model, LORA), read)
    folder.mkdir()
    config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    whole = json.dumps(written.config | {"base_model_name_or_path": str(runs / "text")})
    save_file(dict(written.tensors), tensors)
    arguments = [str(folder), str(tmp_path / "out"), "--dry-run"]
    for damage, words in (
        ("{", r"adapter_config\.json is not valid JSON \(.*\); fetch it again"),
        ("[1]", r"adapter_config\.json holds no JSON object; fetch it again"),
    ):
        config.write_text(damage)
        with pytest.raises(ConfigError, match=words):
            import_hf.main(arguments)
        config.write_text(whole)
        assert import_hf.main(arguments) == 0
    pickled = folder / "adapter_model.bin"
    torch.save(load_file(tensors), pickled)
    tensors.unlink()
    with pytest.raises(ConfigError, match="which are never loaded; save the adapter as safetensors"):
        import_hf.main(arguments)
    save_file(torch.load(pickled), tensors)
    assert import_hf.main(arguments) == 0


def test_an_adapter_is_loaded_as_its_export_says(
    runs: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exports where peft is not installed, which is told, and fits the folder on its base without writing anything."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "peft" else find_spec(name))
    out, config = tmp_path / "out", tmp_path / "export.toml"
    config.write_text(f'run = "{runs}/text_lora"\nout = "{out}"\nprompts = ["It was"]\nsample_tokens = 1\n')
    assert huggingface.main([str(config), "adapter=peft", "verify.greedy_tokens=8"]) == 0
    checks = json.loads((out / RECORD).read_text())["checks"]
    assert re.fullmatch(r"\d+ tensors; not loaded, since peft is not installed", checks["adapter"])
    said = " ".join(capsys.readouterr().out.split())
    loads = f'load it with PeftModel.from_pretrained(base, "{out}")'
    assert f"published {out}; {loads}" in said
    monkeypatch.undo()
    base = AutoModelForCausalLM.from_pretrained(exported, local_files_only=True)
    assert PeftModel.from_pretrained(base, str(out)).peft_config
    assert import_hf.main([str(out), str(tmp_path / "again"), "--dry-run"]) == 0
    assert ": every tensor fits; nothing was written" in " ".join(capsys.readouterr().out.split())
