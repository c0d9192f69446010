"""Gemma 2 and the text model of Gemma 3: four norms a block, scaled embeddings, windows in turn with whole rows."""

from typing import Any

from configs.model import ModelConfig
from export.conversion.config_keys import ConfigKey, Custom, Draft, Fixed, MappedKey
from export.conversion.families.llama import ATTENTION, ENDS, FFN, GATED, MLP, QK_NORM, head_dim, named, sizes
from export.conversion.families.windows import FULL, SLIDING, alternating
from export.conversion.rope_keys import Rope, read_scaling, written_scaling
from export.conversion.table import Family

NORMS = (
    *named("attention_norm", "input_layernorm"),
    *named("attention_output_norm", "post_attention_layernorm"),
    *named("mlp_norm", "pre_feedforward_layernorm"),
    *named("mlp_output_norm", "post_feedforward_layernorm"),
)
RULES = (*ENDS, *NORMS, *ATTENTION, *MLP)
LOCAL_THETA, GLOBAL_THETA = 10000.0, 1e6


def _read_scale(draft: Draft) -> None:
    scalar = draft.value("query_pre_attn_scalar", 256)
    if not isinstance(scalar, (int, float)) or scalar <= 0:
        return draft.refuse("query_pre_attn_scalar", scalar, "a number above 0")
    draft.put("attention.scale", float(scalar) ** -0.5)


def _write_scale(config: ModelConfig) -> dict[str, Any]:
    scale = config.attention.scale
    return {"query_pre_attn_scalar": config.dim_per_head if scale is None else round(scale**-2)}


def _keys(attention_cap: ConfigKey, logit_cap: float | None) -> tuple[ConfigKey, ...]:
    """Returns the keys of Gemma 2 and 3; `logit_cap` is what transformers takes without a soft cap of logits."""
    activation = MappedKey("hidden_activation", "mlp.kind", absent="gelu_pytorch_tanh", values=GATED)
    return (
        *sizes(kv_heads=4, tied=True, activation=activation),
        FFN,
        head_dim(absent=256),
        MappedKey("attention_bias", ("attention.qkv_bias", "attention.output_bias"), absent=False),
        attention_cap,
        MappedKey("final_logit_softcapping", "head.softcap", absent=logit_cap, null=None),
        Custom(_read_scale, _write_scale),
        Fixed("use_bidirectional_attention", False, accepted=(None,), written=False),
    )


def _read_two_ropes(draft: Draft) -> None:
    """Reads both bases of rotary positions: transformers 5 keeps them by type of layer, version 4 by key."""
    raw, ropes = draft.raw, draft.raw.get("rope_parameters") or {}
    by_type = isinstance(ropes, dict) and (FULL in ropes or SLIDING in ropes)
    full = ropes.get(FULL, {}) if by_type else raw.get("rope_scaling") or ropes
    local = ropes.get(SLIDING, {}) if by_type else {}
    if not isinstance(full, dict) or not isinstance(local, dict):
        return draft.refuse("rope_parameters", ropes, "a section for each type of layer")
    if not isinstance(scaling := raw.get("rope_scaling") or {}, dict):
        return draft.refuse("rope_scaling", scaling, "a section or null")
    theta = full.get("rope_theta") or raw.get("rope_theta") or GLOBAL_THETA
    draft.put("position.theta", float(theta))
    read_scaling(draft, "rope_parameters", full, "position.scaling", 131072)
    if local.get("rope_type", "default") != "default":
        draft.refuse(f"rope_parameters.{SLIDING}.rope_type", local["rope_type"], "'default'")
    own = local.get("rope_theta") or raw.get("rope_local_base_freq") or LOCAL_THETA
    if "sliding" in draft.fields.get("kinds", {}):
        draft.put("kinds.sliding.theta", float(own))


def _write_two_ropes(config: ModelConfig) -> dict[str, Any]:
    position, scaling = config.position, written_scaling(config.position.scaling)
    local = next((layer.position.theta for layer in config.layers if layer.attention.pattern == "sliding"), LOCAL_THETA)
    return {
        "rope_theta": position.theta,
        "rope_local_base_freq": local,
        "rope_scaling": dict(scaling) if position.scaling else None,
        "rope_parameters": {
            FULL: {**scaling, "rope_theta": position.theta},
            SLIDING: {"rope_type": "default", "rope_theta": local},
        },
    }


ATTENTION_CAP = "attn_logit_softcapping"
_FIXED = {"norm.kind": "rms_plus_one", "residual.kind": "sandwich", "scale_embedding": True}
GEMMA_2 = Family(
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    rules=RULES,
    keys=(
        *_keys(MappedKey(ATTENTION_CAP, "attention.softcap", absent=50.0, null=None), 30.0),
        alternating(lambda i, every: i % 2 == 0, width=4096),
        Rope(positions=8192),
    ),
    fixed=_FIXED,
    converted=("position.layout",),
    positions=("max_position_embeddings", 8192),
)
GEMMA_3 = Family(
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    rules=(*RULES, *QK_NORM),
    keys=(
        *_keys(Fixed(ATTENTION_CAP, None), None),  # transformers' class of Gemma 3 has the key and does not use it
        alternating(lambda i, every: (i + 1) % every != 0, width=4096, every=6, local={"scaled": False}),
        Custom(_read_two_ropes, _write_two_ropes),
    ),
    fixed={**_FIXED, "attention.qk_norm": "head"},
    converted=("position.layout",),
    positions=("max_position_embeddings", 131072),
)

FAMILIES = (GEMMA_2, GEMMA_3)
