"""Published models by name: their parameters are those of the originals, and a config takes one with changes to it."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

import cli
from configs import presets
from configs.config_command import main
from configs.loader import ConfigError, load, validate, write
from configs.model import ModelConfig
from configs.train import PretrainConfig
from pretrain.model.decoder import Decoder

DEMO = Path(__file__).resolve().parents[3] / "configs" / "pretrain" / "demo.toml"
# Parameters, and those that one token uses, with the whole embedding among them: the published numbers where there are
# such, and those of transformers' classes.
PUBLISHED = {
    "openai-gpt": (116_534_784, 116_534_784),
    "gpt2-124m": (124_439_808, 124_439_808),
    "gpt2-medium-355m": (354_823_168, 354_823_168),
    "gpt2-large-774m": (774_030_080, 774_030_080),
    "gpt2-xl-1.5b": (1_557_611_200, 1_557_611_200),
    "gpt3-175b": (174_604_259_328, 174_604_259_328),
    "opt-125m": (125_239_296, 125_239_296),
    "opt-1.3b": (1_315_758_080, 1_315_758_080),
    "pythia-1.4b": (1_414_647_808, 1_414_647_808),
    "bloom-560m": (559_214_592, 559_214_592),
    "bloom-176b": (176_247_271_424, 176_247_271_424),
    "baichuan2-7b": (7_505_973_248, 7_505_973_248),
    "baichuan2-13b": (13_896_668_160, 13_896_668_160),
    "baichuan-7b": (7_000_559_616, 7_000_559_616),
    "baichuan-13b": (13_264_901_120, 13_264_901_120),
    "glm-4-9b": (9_399_951_360, 9_399_951_360),
    "glm-4-9b-0414": (9_400_279_040, 9_400_279_040),
    "glm-4.5-air": (106_852_245_504, 13_424_123_904),
    "llama-7b": (6_738_415_616, 6_738_415_616),
    "llama-13b": (13_015_864_320, 13_015_864_320),
    "llama-65b": (65_285_660_672, 65_285_660_672),
    "llama-2-70b": (68_976_648_192, 68_976_648_192),
    "llama-3-8b": (8_030_261_248, 8_030_261_248),
    "llama-3-70b": (70_553_706_496, 70_553_706_496),
    "llama-3.1-405b": (405_853_388_800, 405_853_388_800),
    "llama-3.2-1b": (1_235_814_400, 1_235_814_400),
    "mistral-7b-v0.1": (7_241_732_096, 7_241_732_096),
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248),
    "llama-4-scout": (107_769_861_120, 17_172_894_720),
    "llama-4-maverick": (400_711_848_960, 17_184_691_200),
    "qwen2.5-0.5b": (494_032_768, 494_032_768),
    "qwen2.5-7b": (7_615_616_512, 7_615_616_512),
    "qwen1.5-moe-a2.7b": (14_315_784_192, 2_689_173_504),
    "qwen2-57b-a14b": (57_408_658_944, 14_249_270_784),
    "qwen3-0.6b": (596_049_920, 596_049_920),
    "qwen3-8b": (8_190_735_360, 8_190_735_360),
    "qwen3-30b-a3b": (30_532_122_624, 3_353_032_704),
    "qwen3-235b-a22b": (235_093_634_560, 22_190_763_520),
    "qwen3-next-80b-a3b": (79_674_391_296, 3_874_929_408),
    "deepseek-v2-lite": (15_706_484_224, 2_661_150_208),
    "deepseek-v2": (235_741_434_880, 21_375_800_320),
    "deepseek-v3": (671_026_404_352, 37_552_282_624),
    "kimi-k2": (1_026_408_209_408, 32_861_477_888),
    "gpt-oss-20b": (20_914_757_184, 4_187_440_704),
    "gpt-oss-120b": (116_829_156_672, 5_711_982_912),
    "olmo-2-7b": (7_298_617_344, 7_298_617_344),
    "olmo-2-13b": (13_716_198_400, 13_716_198_400),
    "olmo-2-32b": (32_234_279_936, 32_234_279_936),
    "gemma-2-9b": (9_241_705_984, 9_241_705_984),
    "gemma-3-1b": (999_885_952, 999_885_952),
    "phi-3-mini-4k": (3_821_079_552, 3_821_079_552),
    "chatglm2-6b": (6_243_584_000, 6_243_584_000),
    "qwen-7b": (7_721_324_544, 7_721_324_544),
    "glm-130b": (128_697_794_560, 128_697_794_560),
}
# The table of learned positions in files of OPT begins with two rows that no token of a whole text uses.
UNUSED_ROWS = {"opt-125m": 2, "opt-1.3b": 2}
# Families with as many parameters as LLaMA's class has; ALiBi and normalised heads have none of their own.
LLAMAS = ("LLaMA", "Llama 2", "Llama 3", "Baichuan", "Baichuan 2")


def preset(name: str, *overrides: str) -> ModelConfig:
    """Returns a published model with changes, in the way in which a command line gives them."""
    return load(PretrainConfig, DEMO, [f"model={name}", *(f"model.{override}" for override in overrides)]).model


def shared(model: ModelConfig) -> dict[str, Any]:
    """Returns the keys that most classes of transformers have, by their names there."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "intermediate_size": model.ffn_hidden_size,
        "head_dim": model.dim_per_head,
        "tie_word_embeddings": model.tie_embeddings,
        "pad_token_id": None,
    }


def of_experts(model: ModelConfig) -> dict[str, Any]:
    """Returns the keys of a mixture of experts, by all names that classes of transformers have for them."""
    moe = model.moe
    assert moe is not None
    return shared(model) | {
        "num_local_experts": moe.num_experts,
        "num_experts": moe.num_experts,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": model.expert_size,
        "n_shared_experts": moe.num_shared_experts,
        "shared_expert_intermediate_size": moe.shared_ffn_hidden_size,
        "first_k_dense_replace": moe.first_layer,
    }


def gpt(model: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": model.vocab_size,
        "n_embd": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_positions": model.position.max_positions,
    }


def opt(model: ModelConfig) -> dict[str, Any]:
    sizes = {"ffn_dim": model.ffn_hidden_size, "word_embed_proj_dim": model.hidden_size}
    return shared(model) | sizes | {"max_position_embeddings": model.position.max_positions}


def bloom(model: ModelConfig) -> dict[str, Any]:
    return shared(model) | {"n_layer": model.num_layers, "n_head": model.num_heads}


def deepseek(model: ModelConfig) -> dict[str, Any]:
    latent = model.attention.latent
    assert latent is not None
    return of_experts(model) | {
        "head_dim": latent.rope_head_dim,
        "q_lora_rank": latent.q_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_nope_head_dim": latent.nope_head_dim,
        "qk_rope_head_dim": latent.rope_head_dim,
        "v_head_dim": latent.v_head_dim,
    }


def qwen3_next(model: ModelConfig) -> dict[str, Any]:
    delta = model.attention.delta
    assert delta is not None
    return of_experts(model) | {
        "linear_num_key_heads": delta.num_key_heads,
        "linear_num_value_heads": delta.num_value_heads,
        "linear_key_head_dim": delta.key_head_dim,
        "linear_value_head_dim": delta.value_head_dim,
        "linear_conv_kernel_dim": delta.kernel_size,
        "layer_types": ["linear_attention" if x.attention.delta else "full_attention" for x in model.layers],
    }


def llama_4(model: ModelConfig) -> dict[str, Any]:
    assert model.moe is not None
    own = {"intermediate_size": model.expert_size, "intermediate_size_mlp": model.ffn_hidden_size}
    return of_experts(model) | own | {"interleave_moe_layer_step": model.moe.every}


# The class of transformers for each family, and its config's keys.
CLASSES: dict[str, tuple[str, Any]] = {
    "GPT-1": ("OpenAIGPTLMHeadModel", gpt),
    "GPT-2": ("GPT2LMHeadModel", gpt),
    "GPT-3": ("GPT2LMHeadModel", gpt),
    "OPT": ("OPTForCausalLM", opt),
    "GPT-NeoX": ("GPTNeoXForCausalLM", shared),
    "BLOOM": ("BloomForCausalLM", bloom),
    "ChatGLM": ("GlmForCausalLM", shared),
    "GLM-4": ("GlmForCausalLM", shared),
    "GLM-4-0414": ("Glm4ForCausalLM", shared),
    "GLM-4.5": ("Glm4MoeForCausalLM", lambda model: of_experts(model) | {"attention_bias": True}),
    **dict.fromkeys(LLAMAS, ("LlamaForCausalLM", shared)),
    "Mistral": ("MistralForCausalLM", shared),
    "Mixtral": ("MixtralForCausalLM", of_experts),
    "Llama 4": ("Llama4ForCausalLM", llama_4),
    "Qwen": ("Qwen2ForCausalLM", shared),
    "Qwen2.5": ("Qwen2ForCausalLM", shared),
    "Qwen-MoE": ("Qwen2MoeForCausalLM", of_experts),
    "Qwen3": ("Qwen3ForCausalLM", shared),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", of_experts),
    "Qwen3-Next": ("Qwen3NextForCausalLM", qwen3_next),
    "DeepSeek-V2": ("DeepseekV2ForCausalLM", deepseek),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", deepseek),
    "Kimi-K2": ("DeepseekV3ForCausalLM", deepseek),
    "gpt-oss": ("GptOssForCausalLM", of_experts),
    "OLMo 2": ("Olmo2ForCausalLM", shared),
    "Gemma 2": ("Gemma2ForCausalLM", shared),
    "Gemma 3": ("Gemma3ForCausalLM", shared),
    "Phi-3": ("Phi3ForCausalLM", shared),
}
WITHOUT_CLASS = ("GLM-130B",)


def family(name: str) -> str:
    return str(tomllib.loads((presets.FOLDER / f"{name}.toml").read_text(encoding="utf-8"))["family"])


def parameters_in_transformers(name: str, model: ModelConfig) -> int:
    class_name, keys = CLASSES[family(name)]
    of_class = getattr(transformers, class_name)
    with torch.device("meta"):
        theirs = of_class(of_class.config_class(**keys(model)))
    return sum(parameter.numel() for parameter in theirs.parameters())


def test_there_is_a_preset_for_each_published_size() -> None:
    assert presets.names() == sorted(PUBLISHED)
    assert {family(name) for name in PUBLISHED} == {*CLASSES, *WITHOUT_CLASS}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters(name: str) -> None:
    model = load(presets.Preset, presets.FOLDER / f"{name}.toml").model.without_mtp()
    unused = UNUSED_ROWS.get(name, 0) * model.hidden_size
    total, active = PUBLISHED[name]
    assert (model.num_parameters() + unused, model.num_parameters(active=True) + unused) == (total, active)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_decoder_allocates_the_number_that_its_config_says(name: str) -> None:
    # Enough layers for every kind and every position of a mixture of experts.
    model = preset(name, "num_layers=6")
    with FakeTensorMode():
        decoder = Decoder(model)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == model.num_parameters()


# The first of each class of transformers; the others are built from the same keys.
FIRST_OF_CLASS = list(
    {CLASSES[family(name)][0]: name for name in reversed(PUBLISHED) if family(name) in CLASSES}.values()
)


@pytest.mark.parametrize(
    "name",
    [
        name if name in FIRST_OF_CLASS else pytest.param(name, marks=pytest.mark.full)
        for name in PUBLISHED
        if family(name) not in WITHOUT_CLASS
    ],
)
def test_a_preset_has_as_many_parameters_as_in_transformers(name: str) -> None:
    assert parameters_in_transformers(name, preset(name)) == PUBLISHED[name][0]


def shrunk(name: str) -> ModelConfig:
    """Returns a published model with its sizes made small by overrides alone."""
    published = preset(name)
    changes: dict[str, Any] = {
        "vocab_size": 96,
        "num_layers": 5,
        "hidden_size": 48,
        "ffn_hidden_size": 40,
        "num_heads": 4,
    }
    changes |= {"num_kv_heads": 2, "head_dim": 16}
    if published.position.max_positions:
        changes["position.max_positions"] = 64
    if latent := published.attention.latent:
        del changes["head_dim"]
        if latent.q_rank:
            changes["attention.latent.q_rank"] = 20
        changes["num_kv_heads"] = 4
        sizes = {"kv_rank": 12, "nope_head_dim": 8, "rope_head_dim": 4, "v_head_dim": 6}
        changes |= {f"attention.latent.{key}": value for key, value in sizes.items()}
    if published.attention.delta:
        sizes = {"num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 8, "value_head_dim": 6}
        changes |= {f"attention.delta.{key}": value for key, value in sizes.items()}
    if moe := published.moe:
        changes |= {"moe.num_experts": 8, "moe.ffn_hidden_size": 24, "moe.top_k": min(moe.top_k, 2)}
        if moe.num_groups > 1:
            changes |= {"moe.num_groups": 4, "moe.top_groups": 2}
        if moe.shared_ffn_hidden_size:
            changes["moe.shared_ffn_hidden_size"] = 20
    return preset(name, *(f"{key}={value}" for key, value in changes.items()))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_shrunk_by_overrides_has_a_loss_and_gradients(name: str) -> None:
    model = shrunk(name).without_mtp()  # test_multi_token.py trains such modules
    decoder = Decoder(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(std=0.1)
    tokens, positions = torch.randint(0, 96, (2, 24)), torch.arange(24).expand(2, -1)
    logits = decoder(tokens, positions)
    assert logits.shape == (2, 24, 96)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    without = [key for key, parameter in decoder.named_parameters() if parameter.grad is None]
    assert not without
    assert all(parameter.grad.isfinite().all() for parameter in decoder.parameters())


def test_overrides_change_a_preset_and_the_rest_of_the_config_stays() -> None:
    demo = load(PretrainConfig, DEMO)
    config = load(PretrainConfig, DEMO, ["model=qwen3-8b", "model.num_layers=4", "model.norm.eps=1e-4"])
    assert (config.train, config.optimizer) == (demo.train, demo.optimizer)
    assert config.model == validate(
        ModelConfig,
        presets.filled_in({"model": {"preset": "qwen3-8b", "num_layers": 4, "norm": {"eps": 1e-4}}})["model"],
    )
    assert (config.model.num_layers, config.model.hidden_size, config.model.norm.eps) == (4, 4096, 1e-4)
    assert config.model.tie_embeddings is False  # the demo's own model has it, and is gone


@pytest.mark.parametrize(
    "text",
    ['model = "gemma-3-1b"', '[model]\npreset = "gemma-3-1b"', 'model.preset = "gemma-3-1b"'],
)
def test_a_file_names_a_preset_and_the_run_keeps_all_keys(text: str, tmp_path: Path) -> None:
    rest = DEMO.read_text(encoding="utf-8").split("[train]")[1]
    (tmp_path / "mine.toml").write_text(
        f'{text}\n[run]\ndir = "x"\n[data]\nplan = "x"\n[train]{rest}', encoding="utf-8"
    )
    config = load(PretrainConfig, tmp_path / "mine.toml")
    assert config.model == preset("gemma-3-1b")
    write(config, tmp_path / "kept.toml")
    assert "preset" not in (tmp_path / "kept.toml").read_text(encoding="utf-8")
    assert load(PretrainConfig, tmp_path / "kept.toml") == config


def test_the_layers_of_a_preset_can_be_of_fewer_kinds() -> None:
    """Changes the pattern of layers of a preset: a kind that the new pattern does not name goes with the old one."""
    model = preset("gemma-3-1b", "layer_pattern=['local']")
    assert list(model.kinds) == ["local"]
    assert {layer.attention.window for layer in model.layers} == {512}
    assert [layer.kind for layer in preset("gemma-3-1b", "num_layers=3").layers] == ["local"] * 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model=qwen3-8", ["model = 'qwen3-8'", "did you mean 'qwen3-8b'", "`trivium config --models`"]),
        ("model.preset=nonsense", ["model = 'nonsense' is no published model; `trivium config --models`"]),
        ("model=3", ["model = 3: this is a section"]),
        ("model.preset=3", ["model = 3 is no published model"]),
        ("model.preste=qwen3-8b", ["unknown key 'model.preste'; did you mean 'preset'"]),
        ("model=../demo", ["model = '../demo' is no published model"]),
    ],
)
def test_a_wrong_name_is_told_with_a_remedy(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        load(PretrainConfig, DEMO, [override])
    for part in words:
        assert part in str(raised.value)


def test_the_list_of_presets_has_their_families_and_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["config", "--models"])
    assert stopped.value.code == 0
    with pytest.raises(ConfigError, match="leave out 'qwen3-8b'"):
        main(["--models", "qwen3-8b"])
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert rows.keys() == {"name", *PUBLISHED}
    assert rows["llama-7b"].split() == ["llama-7b", "LLaMA", "6,738,415,616"]
    assert rows["deepseek-v3"].split() == ["deepseek-v3", "DeepSeek-V3", "671,026,404,352", "37,552,282,624"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_cites_its_sources_and_its_number_of_parameters(name: str) -> None:
    lines = (presets.FOLDER / f"{name}.toml").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    comment = " ".join(line.removeprefix("# ") for line in lines)
    assert all(line.startswith("# ") for line in lines)
    assert "Sizes: " in comment and "Parts: " in comment
    model = preset(name)
    assert f"{model.without_mtp().num_parameters():,} parameters" in comment
    if model.head.mtp_depth:
        further = model.num_parameters() - model.without_mtp().num_parameters()
        assert f"multi-token prediction, which has {further:,} more parameters" in comment
