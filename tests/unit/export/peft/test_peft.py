"""Adapters in PEFT's format, with the package peft itself as the judge: its logits, its merge and its gradients."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from configs.adapters import AdapterConfig
from configs.initial import InitConfig
from configs.loader import ConfigError
from export import huggingface
from export.conversion.family_registry import family_of
from export.hf_folder import FolderTensors, open_hf_folder
from export.import_hf import main
from export.model_source import open_source
from export.peft.adapter import PREFIX, Base, OwnAdapter, PeftAdapter, PeftError
from export.peft.folder import BaseRecord
from export.peft.folder import write as write_folder
from export.peft.forms import form_of_config
from export.peft.low_rank import LowRankForm
from pretrain.checkpoint import storage
from pretrain.checkpoint.whole_model import ModelReader
from pretrain.model import Decoder, LayerContext
from pretrain.model.adapters import add_adapters, is_adapter
from pretrain.model.adapters.merging import merged
from pretrain.run.initial_model import InitialModel
from tests.tiny_models import tiny, write_imported
from tests.unit.export.conversion.parity import TOKENS, random_model

LLAMA: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None},
}
MOE = LLAMA | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 12}
GPT = {"vocab_size": 97, "n_embd": 36, "n_layer": 3, "n_head": 6, "n_positions": 64}
NEOX = {
    **{"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3},
    **{"intermediate_size": 72, "max_position_embeddings": 64},
}
DEEPSEEK = LLAMA | {
    **{"num_hidden_layers": 3, "num_key_value_heads": 4, "kv_lora_rank": 10, "q_lora_rank": 14},
    **{"qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 5, "n_routed_experts": 6, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 24, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 3, "topk_group": 2},
}
LLAMA_4 = LLAMA | {
    **{"num_hidden_layers": 4, "intermediate_size_mlp": 40, "head_dim": 12, "num_local_experts": 3},
    **{"num_experts_per_tok": 1, "attention_chunk_size": 16, "floor_scale": 8},
}
DELTA = MOE | {"shared_expert_intermediate_size": 40, "full_attention_interval": 2, "head_dim": 16}
LORA, DORA = AdapterConfig(rank=3, alpha=4.5), AdapterConfig(kind="dora", rank=3, alpha=6.0)
STABLE = AdapterConfig(rank=4, alpha=5.0, rank_stabilized=True)
HALF = AdapterConfig(rank=2, alpha=3.0, targets=("q_proj", "v_proj", "up_proj"))
ATTENTION = AdapterConfig(kind="dora", rank=2, targets=("q_proj", "v_proj"))
# One model of each way in which a file keeps what an adapter may be on.
CASES: dict[str, tuple[str, dict[str, Any], AdapterConfig]] = {
    "llama": ("llama", LLAMA, STABLE),
    "llama, DoRA, biases": ("llama", LLAMA | {"attention_bias": True, "mlp_bias": True}, DORA),
    "phi3, joined": ("phi3", LLAMA, STABLE),
    "phi3, joined, some parts": ("phi3", LLAMA, HALF),
    "phi3, joined, DoRA of some parts": ("phi3", LLAMA, ATTENTION),
    "glm4, pairs": ("glm4", LLAMA | {"head_dim": 12}, LORA),
    "gpt2, transposed": ("gpt2", GPT, LORA),
    "gpt2, transposed, DoRA": ("gpt2", GPT, DORA),
    "gpt2, one of two names alike": ("gpt2", GPT, AdapterConfig(rank=2, targets=("o_proj",))),
    "gpt_neox, head by head": ("gpt_neox", NEOX, DORA),
    "mixtral": ("mixtral", LLAMA | {"num_local_experts": 6, "num_experts_per_tok": 2}, LORA),
    "qwen3_moe, a dense layer": ("qwen3_moe", MOE | {"mlp_only_layers": [0]}, STABLE),
    "qwen2_moe, shared experts": ("qwen2_moe", MOE | {"shared_expert_intermediate_size": 40}, LORA),
    "deepseek_v3, latent": ("deepseek_v3", DEEPSEEK, LORA),
    "gpt_oss, transposed experts": ("gpt_oss", LLAMA | {"num_local_experts": 6, "head_dim": 12}, LORA),
    "llama4, turned experts": ("llama4_text", LLAMA_4, LORA),
    "qwen3_next, joined by key heads": ("qwen3_next", DELTA, LORA),
}

ALWAYS = ("llama, DoRA, biases", "phi3, joined, some parts", "qwen3_moe, a dense layer")
MORE = [case for case in CASES if case not in ALWAYS]


def with_adapters(base: Base, adapter: AdapterConfig) -> Decoder:
    """Builds the base with random adapters that change much of what it computes."""
    context = LayerContext(dtype=torch.float32)
    decoder = Decoder(base.model, context=context)
    add_adapters(decoder, adapter, context)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in {**dict(decoder.named_global_parameters()), **decoder.named_balance()}.items():
            if name.endswith(".magnitude"):
                tensor.copy_(1 + 0.3 * torch.randn(tensor.shape, generator=draw))
            elif is_adapter(name):
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=draw))
            elif not name.endswith(".load"):
                tensor.copy_(base.read(name))
    return decoder.eval()


def own_adapter(decoder: Decoder, config: AdapterConfig) -> OwnAdapter:
    tensors = {name: p.detach().clone() for name, p in decoder.named_global_parameters() if is_adapter(name)}
    return OwnAdapter(config, tensors)


def logits(decoder: Decoder, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return decoder(tokens, torch.arange(tokens.shape[1])[None].expand_as(tokens))


def saved(tmp_path: Path, kind: str, keys: dict[str, Any]) -> tuple[Any, Base]:
    """Makes a model of transformers, saves it, and returns it with what Trivium reads of it."""
    model = random_model(kind, **keys)
    model.save_pretrained(tmp_path / "base")
    opened = open_hf_folder(tmp_path / "base")
    return model, Base(opened.family, opened.model, FolderTensors(opened).read)


def write(folder: Path, adapter: PeftAdapter) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(adapter.config))
    save_file(dict(adapter.tensors), folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("case", [*ALWAYS, *(pytest.param(case, marks=pytest.mark.full) for case in MORE)])
def test_peft_computes_and_merges_what_trivium_does(tmp_path, case):
    kind, keys, config = CASES[case]
    model, base = saved(tmp_path, kind, keys)
    decoder = with_adapters(base, config)
    mine = own_adapter(decoder, config)
    theirs = LowRankForm().write(mine, base)
    folder = write(tmp_path / "adapter", theirs)
    with torch.no_grad():
        plain, ours = model(TOKENS).logits, logits(decoder)
        tuned = PeftModel.from_pretrained(model, str(folder)).eval()
        assert (tuned(TOKENS).logits - ours).abs().max() < 1e-4 < (plain - ours).abs().max() / 100
    assert_same_names(tuned, theirs)

    again = LowRankForm().read(theirs, base)
    assert again.config.scale == pytest.approx(config.scale) and again.tensors.keys() == mine.tensors.keys()
    assert again.config.model_copy(update={"alpha": config.alpha, "targets": config.targets}) == config
    for name, tensor in mine.tensors.items():
        torch.testing.assert_close(again.tensors[name], tensor, rtol=1e-6, atol=1e-6)

    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged_by_peft = FolderTensors(open_hf_folder(tmp_path / "merged"))
    whole = merged(
        list(mine.tensors),
        lambda name: mine.tensors[name] if is_adapter(name) else base.read(name),
        config,
    )
    for name in merged_by_peft.shapes:
        expected = whole[name]() if name in whole else base.read(name)
        torch.testing.assert_close(
            merged_by_peft.read(name), expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_names(tuned: Any, theirs: PeftAdapter) -> None:
    """Checks that peft has adapters of its own for the tensors that were written, and for no more."""
    held = {name.replace(".default", "") for name, _ in tuned.named_parameters() if ".lora_" in name}
    written = {f"{name}.weight" if name.endswith("magnitude_vector") else name for name in theirs.tensors}
    assert held == written


def tuned_logits(base: Base, own: OwnAdapter) -> torch.Tensor:
    """Returns the logits of the base with an adapter that was read, as the layers compute them in training."""
    decoder = with_adapters(base, own.config)
    with torch.no_grad():
        for name, parameter in decoder.named_global_parameters():
            if is_adapter(name):
                parameter.copy_(own.tensors[name])
        return logits(decoder)


@pytest.mark.parametrize("config", [STABLE, DORA], ids=["lora", "dora"])
def test_gradients_are_those_of_peft(tmp_path, config):
    model, base = saved(tmp_path, "llama", LLAMA | {"attention_bias": True})
    decoder = with_adapters(base, config)
    mine = own_adapter(decoder, config)
    folder = write(tmp_path / "adapter", LowRankForm().write(mine, base))
    tuned = PeftModel.from_pretrained(model, str(folder), is_trainable=True).train()
    labels = TOKENS[:, 1:].flatten()
    F.cross_entropy(tuned(TOKENS).logits[:, :-1].flatten(0, 1), labels).backward()
    F.cross_entropy(logits(decoder)[:, :-1].flatten(0, 1), labels).backward()
    own = {name: p.grad for name, p in decoder.named_global_parameters() if is_adapter(name) and p.grad is not None}
    ours = LowRankForm().write(OwnAdapter(config, own), base).tensors
    # Trivium trains multiples of the rows' lengths, PEFT the lengths: so gradients differ by that length.
    ones = {name: torch.ones_like(tensor) for name, tensor in mine.tensors.items()}
    lengths = LowRankForm().write(OwnAdapter(config, ones), base).tensors
    compared = 0
    for name, parameter in tuned.named_parameters():
        if ".lora_" not in name:
            continue
        plain = name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")
        gradient = ours[plain] / lengths[plain] ** 2 if plain.endswith("magnitude_vector") else ours[plain]
        assert parameter.grad is not None
        assert (gradient - parameter.grad).norm() < 1e-5 * parameter.grad.norm(), name
        compared += 1
    assert compared == len(ours) == len(own)


@pytest.mark.parametrize(
    ("kind", "keys", "options"),
    [
        ("llama", LLAMA, {"rank_pattern": {"v_proj": 5}, "alpha_pattern": {"v_proj": 7, "k_proj": 2}}),
        ("llama", LLAMA, {"use_dora": True, "layers_to_transform": [1]}),
        ("phi3", LLAMA, {"target_modules": ["qkv_proj"], "use_rslora": True}),
        ("phi3", LLAMA, {"target_modules": ["qkv_proj", "o_proj"], "use_dora": True}),
        (
            "qwen3_moe",
            MOE,
            {"target_modules": ["o_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
        ),
    ],
    ids=["patterns", "DoRA of a layer", "joined", "joined DoRA", "some matrices of experts"],
)
def test_adapters_that_peft_made_are_read(tmp_path, kind, keys, options):
    model, base = saved(tmp_path, kind, keys)
    targets = {"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]} | options
    tuned = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **targets))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        tuned.save_pretrained(tmp_path / "adapter")
        theirs = tuned.eval()(TOKENS).logits
    assert (tuned_logits(base, LowRankForm().read(read(tmp_path / "adapter"), base)) - theirs).abs().max() < 1e-4


def read(folder: Path) -> PeftAdapter:
    config = json.loads((folder / "adapter_config.json").read_text())
    return PeftAdapter(config, load_file(folder / "adapter_model.safetensors"))


def test_experts_one_by_one_as_older_versions_wrote_them(tmp_path):
    keys = LLAMA | {"num_local_experts": 6, "num_experts_per_tok": 2}
    model, base = saved(tmp_path, "mixtral", keys)
    config = AdapterConfig(rank=2, alpha=3.0, targets=("experts",))
    decoder = with_adapters(base, config)
    tensors = {}
    for name, tensor in own_adapter(decoder, config).tensors.items():
        layer, matrix, part = name.split(".")[1], name.split(".")[-2], name[-1].upper()
        for expert, single in enumerate(tensor.unbind()):
            module = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[matrix]
            inner = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{module}.lora_{part}.weight"
            tensors[PREFIX + inner] = single.contiguous()
    written = PeftAdapter(
        {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3, "target_modules": ["w1", "w2", "w3"]},
        tensors,
    )
    with torch.no_grad():
        ours = logits(decoder)
        assert (tuned_logits(base, LowRankForm().read(written, base)) - ours).abs().max() < 1e-5
        tuned = PeftModel.from_pretrained(model, str(write(tmp_path / "adapter", written))).eval()
        assert (tuned(TOKENS).logits - ours).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "LOHA"}, ""),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights = 'pissa' is not supported, True is; merge the adapter"),
        ({"bias": "all"}, r"bias = 'all' is not supported"),
        ({"r": 4}, r"has rank 3, and adapter_config.json says 4"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path, change, said):
    _, base = saved(tmp_path, "llama", LLAMA)
    written = LowRankForm().write(own_adapter(with_adapters(base, LORA), LORA), base)
    with pytest.raises(PeftError, match=said or r"peft_type = 'LOHA' is not supported; supported are LORA"):
        form_of_config(written.config | change).read(PeftAdapter(written.config | change, written.tensors), base)


def test_an_adapter_of_another_base_is_refused(tmp_path):
    (tmp_path / "other").mkdir()
    _, base = saved(tmp_path, "llama", LLAMA)
    _, other = saved(tmp_path / "other", "llama", LLAMA | {"hidden_size": 40})
    written = LowRankForm().write(own_adapter(with_adapters(base, LORA), LORA), base)
    with pytest.raises(
        PeftError, match=r"q_proj.lora_A.weight is \[3, 32\], .* takes \[3, 40\]; the adapter is of anot"
    ):
        LowRankForm().read(written, other)
    deeper = {**written.tensors, f"{PREFIX}model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(3, 32)}
    with pytest.raises(PeftError, match=r"1 tensors that belong to no layer .*layers.7.mlp.up_proj.lora_A"):
        LowRankForm().read(PeftAdapter(written.config, deeper), base)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_path) -> Path:
    """A model with a tokenizer, as `trivium import` writes it."""
    return write_imported(tmp_path_factory.mktemp("runs") / "base", tiny(), tokenizer_path)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    """Run with one checkpoint that `trivium import` makes of an adapter on that model."""
    folder = tmp_path_factory.mktemp("adapter")
    source = open_source(base)
    with source.weights() as weights:
        of_base = Base(family_of(source.model), source.model, weights.read)
        own = own_adapter(with_adapters(of_base, STABLE), STABLE)
        record = BaseRecord(str(base), (source.identify(),))
        (folder / "peft").mkdir()
        write_folder(folder / "peft", LowRankForm().write(own, of_base), record)
    assert main([str(folder / "peft"), str(folder / "run")]) == 0
    return folder / "run"


def export(run: Path, out: Path, *more: str) -> int:
    config = out.with_suffix(".toml")
    config.write_text(f'run = "{run}"\nout = "{out}"\nsample_tokens = 1\nprompts = ["It was"]\n[verify]\nrows = 1\n')
    return huggingface.main([str(config), "verify.greedy_tokens=8", *more])


def merged_weights(run: Path) -> dict[str, torch.Tensor]:
    return open_source(run).read()


def test_an_adapter_becomes_a_run_and_is_exported_again(base, run, exported, tmp_path):
    """Makes the first stage of a round trip: peft's adapter in, a model to start from, an adapter for peft out."""
    with ModelReader(storage.directory(run, 0)) as reader, ModelReader(storage.directory(base, 0)) as first:
        names = [name for name in reader.shapes if not torch.equal(reader.read(name), first.read(name))]
        assert len(names) == 7 * 3 and reader.shapes == first.shapes
    initial = InitialModel.open(InitConfig(run=str(run)), str(tmp_path / "later"), "auto")
    assert initial.tokenizer is not None and initial.model == open_source(base).model

    assert export(run, tmp_path / "out", "adapter=both") == 0
    assert export(run, tmp_path / "alone", "adapter=peft", f"base={exported}") == 0
    beside, alone = (read(tmp_path / name) for name in ("out/adapter", "alone"))
    assert all(torch.equal(beside.tensors[name], tensor) for name, tensor in alone.tensors.items())
    assert alone.config["base_model_name_or_path"] == str(exported)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    shutil.rmtree(tmp_path / "out/adapter")
    plain = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    with torch.no_grad():
        untuned = plain(TOKENS).logits.clone()
        tuned = PeftModel.from_pretrained(plain, str(tmp_path / "alone")).eval()(TOKENS).logits
        assert (tuned - whole(TOKENS).logits).abs().max() < 1e-4 < (tuned - untuned).abs().max() / 100

    assert main([str(tmp_path / "alone"), str(tmp_path / "again")]) == 0, "the base is where the config says"
    ours, again = merged_weights(run), merged_weights(tmp_path / "again")
    assert all(torch.allclose(ours[name], tensor, atol=1e-6) for name, tensor in again.items())


def test_the_base_is_known_by_its_hash_or_its_name(base, run, tmp_path, tokenizer_path):
    assert export(run, tmp_path / "alone", "adapter=peft") == 0
    same = write_imported(tmp_path / "same", tiny(), tokenizer_path, template="{{ messages }}")
    assert main([str(tmp_path / "alone"), str(tmp_path / "on_same"), "--base", str(same)]) == 0
    other = write_imported(tmp_path / "other", tiny(tie=True), tokenizer_path)
    arguments = [str(tmp_path / "alone"), str(tmp_path / "out"), "--base", str(other)]
    with pytest.raises(ConfigError, match=r"on top of .*/base.*, and .*/other.* is another model .* with --any-base"):
        main(arguments)
    assert main([*arguments, "--any-base"]) == 0, "the remedy works"

    [one.unlink() for one in (tmp_path / "alone").glob("trivium_*.json")]  # as if peft had saved it
    written = json.loads((tmp_path / "alone/adapter_config.json").read_text())
    for name, fits in (("hub/tiny-other", False), ("hub/other", True), (None, True)):
        (tmp_path / "alone/adapter_config.json").write_text(json.dumps(written | {"base_model_name_or_path": name}))
        if fits:
            assert main([arguments[0], str(tmp_path / "new"), *arguments[2:], "--dry-run"]) == 0
            continue
        with pytest.raises(ConfigError, match=r"an adapter of 'hub/tiny-other', and nothing says that .*/other"):
            main([arguments[0], str(tmp_path / "new"), *arguments[2:]])
    with pytest.raises(ConfigError, match=r"is an adapter of None, which is no folder here; .*--base FOLDER"):
        main([arguments[0], str(tmp_path / "new")])
    with pytest.raises(ConfigError, match=r"adapter in PEFT's format; .*trivium import .*alone OUT --base FOLDER"):
        open_source(tmp_path / "alone")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["adapter=peft", "base={base}"], "is not the model that the run was trained on top of"),
        (["base={base}"], "adapter = 'merge' writes none; set adapter=peft"),
        (["adapter=peft", "run={plain}"], "is of none; set adapter=merge"),
    ],
)
def test_exports_that_cannot_be_are_refused(base, run, tmp_path, more, said):
    saved(tmp_path, "llama", LLAMA)
    with pytest.raises(ConfigError, match=said):
        export(run, tmp_path / "out", *(one.format(base=tmp_path / "base", plain=base) for one in more))
    assert not (tmp_path / "out").exists()


def test_a_model_with_rows_in_an_order_of_its_own(tokenizer_path, tmp_path):
    """Exports from LLaMA's files, which pair rotated rows otherwise: DoRA's lengths and B are put in order."""
    config = tiny()
    config = config.model_copy(update={"position": config.position.model_copy(update={"layout": "pairs"})})
    base = write_imported(tmp_path / "base", config, tokenizer_path)
    source = open_source(base)
    with source.weights() as weights:
        of_base = Base(family_of(source.model), source.model, weights.read)
        own = own_adapter(with_adapters(of_base, ATTENTION), ATTENTION)
        (tmp_path / "adapter").mkdir()
        write_folder(tmp_path / "adapter", LowRankForm().write(own, of_base), BaseRecord(str(base)))
    assert main([str(tmp_path / "adapter"), str(tmp_path / "run")]) == 0
    assert export(tmp_path / "run", tmp_path / "out", "adapter=peft") == 0
