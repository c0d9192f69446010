"""Converts a ModelConfig to the config.json of transformers' LlamaConfig or MixtralConfig, and back.

On import, features that Trivium's decoder lacks (biases, scaled rotary embedding, sliding windows, other activations,
quantized weights) are errors that name the key.
"""

from typing import Any

from configs.loader import validate
from configs.model import ModelConfig
from export.families import FAMILIES, LLAMA, MIXTRAL, family_of


def to_hf_config(
    config: ModelConfig,
    max_positions: int,
    dtype: str,
    bos_id: int,
    eos_id: int | list[int],
    pad_id: int | None,
) -> dict[str, Any]:
    """Returns the content of config.json; `dtype` is torch's name for the dtype of the files, e.g. "float32".

    Raises ValueError if the family cannot express the model.
    """
    if config.hidden_size % config.num_heads:
        raise ValueError(
            f"model.hidden_size = {config.hidden_size} is not a multiple of "
            f"model.num_heads = {config.num_heads}; "
            f"transformers' {family_of(config).architecture} does not allow that, even with a head_dim"
        )
    family = family_of(config)
    result: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.expert_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.dim_per_head,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm.eps,
        # transformers 5 reads rope_parameters; version 4, vLLM and llama.cpp read rope_theta.
        "rope_theta": config.position.theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.position.theta},
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "dtype": dtype,
    }
    if config.moe:
        result |= {
            "num_local_experts": config.moe.num_experts,
            "num_experts_per_tok": config.moe.top_k,
            "router_aux_loss_coef": config.moe.aux_loss_coef,
            "router_jitter_noise": 0.0,
            "output_router_logits": False,
            "sliding_window": None,
        }
    else:
        result |= {"attention_bias": False, "mlp_bias": False}
    return result


# Keys that change what the model computes: (key, supported values, why no others are).
_ONLY: list[tuple[str, tuple[Any, ...], str]] = [
    ("attention_bias", (False, None), "Trivium's projections have no bias"),
    ("mlp_bias", (False, None), "Trivium's projections have no bias"),
    ("sliding_window", (None,), "Trivium's attention sees the whole document"),
    ("hidden_act", ("silu",), "Trivium's MLP is SwiGLU"),
    ("quantization_config", (None,), "export full-precision weights first"),
    ("partial_rotary_factor", (1.0, None), "Trivium rotates the whole head dimension"),
]


def from_hf_config(raw: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig of config.json's content. Raises ValueError naming a key that is not supported."""
    model_type = raw.get("model_type")
    family = next((family for family in FAMILIES if family.model_type == model_type), None)
    if family is None:
        known = ", ".join(family.model_type for family in FAMILIES)
        raise ValueError(f"config.json: model_type = {model_type!r} is not supported; supported are {known}")
    for key, supported, why in _ONLY:
        if raw.get(key, supported[0]) not in supported:
            raise ValueError(f"config.json: {key} = {raw[key]!r} is not supported ({why}); expected {supported[0]!r}")

    def need(key: str) -> Any:
        if raw.get(key) is None:
            raise ValueError(f"config.json: {key} is missing; transformers' {family.architecture} writes it")
        return raw[key]

    fields: dict[str, Any] = {
        "vocab_size": need("vocab_size"),
        "num_layers": need("num_hidden_layers"),
        "hidden_size": need("hidden_size"),
        "ffn_hidden_size": need("intermediate_size"),
        "num_heads": need("num_attention_heads"),
        "num_kv_heads": raw.get("num_key_value_heads") or need("num_attention_heads"),
        "norm": {"eps": float(need("rms_norm_eps"))},
        "position": {"theta": _rope_theta(raw, default=10000.0 if family is LLAMA else 1e6)},
        "tie_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "init_std": float(raw.get("initializer_range", 0.02)),
    }
    if raw.get("head_dim") and raw["head_dim"] * fields["num_heads"] != fields["hidden_size"]:
        fields["head_dim"] = raw["head_dim"]
    if family is MIXTRAL:
        fields["moe"] = {
            "num_experts": need("num_local_experts"),
            "top_k": need("num_experts_per_tok"),
            "aux_loss_coef": float(raw.get("router_aux_loss_coef", 0.001)),
        }
    return validate(ModelConfig, fields, origin="config.json")


def _rope_theta(raw: dict[str, Any], default: float) -> float:
    """Returns the rotary base; `default` is transformers' own, for a file without one."""
    theta = raw.get("rope_theta")
    for section in ("rope_scaling", "rope_parameters"):
        rope = raw.get(section) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f"config.json: {section}.rope_type = {kind!r} is not supported; only plain RoPE is")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"config.json: {section}.partial_rotary_factor = {rope['partial_rotary_factor']!r} is not "
                "supported; "
                "Trivium rotates the whole head dimension"
            )
        theta = rope.get("rope_theta", theta)
    return float(theta if theta is not None else default)
