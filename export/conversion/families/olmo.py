"""OLMo 2 and 3: norms of what attention and MLP add, and of the whole projections to queries and keys."""

from typing import Any

from configs.model import ModelConfig
from export.conversion.config_keys import Custom, Draft, MappedKey
from export.conversion.families.gemma import FULL, SLIDING
from export.conversion.families.llama import ATTENTION, ENDS, FFN, MLP, QK_NORM, head_dim, named, sizes
from export.conversion.families.windows import alternating
from export.conversion.rope_keys import Rope, read_scaling, written_scaling
from export.conversion.table import Family

RULES = (
    *ENDS,
    *named("attention_output_norm", "post_attention_layernorm"),
    *named("mlp_output_norm", "post_feedforward_layernorm"),
    *ATTENTION,
    *QK_NORM,
    *MLP,
)
KEYS = (
    *sizes(eps=1e-5),
    FFN,
    head_dim(always=False),
    MappedKey("attention_bias", ("attention.qkv_bias", "attention.output_bias"), absent=False),
)
THETA = 500000.0  # of OLMo 3


def _read_ropes(draft: Draft) -> None:
    """Reads the base of rotary positions, and the scaling, which only layers without a window have."""
    raw, ropes = draft.raw, draft.raw.get("rope_parameters") or {}
    by_type = isinstance(ropes, dict) and (FULL in ropes or SLIDING in ropes)
    full = ropes.get(FULL, {}) if by_type else raw.get("rope_scaling") or ropes
    local = ropes.get(SLIDING, full) if by_type else full
    if not isinstance(full, dict) or not isinstance(local, dict):
        return draft.refuse("rope_parameters", ropes, "a section for each type of layer")
    if not isinstance(scaling := raw.get("rope_scaling") or {}, dict):
        return draft.refuse("rope_scaling", scaling, "a section or null")
    theta = full.get("rope_theta") or raw.get("rope_theta") or THETA
    own = local.get("rope_theta") or theta
    if own != theta and "sliding" in draft.fields.get("kinds", {}):
        draft.put("kinds.sliding.theta", float(own))
    draft.put("position.theta", float(theta))
    read_scaling(draft, "rope_parameters", full, "position.scaling", 2048)


def _write_ropes(config: ModelConfig) -> dict[str, Any]:
    position, scaling = config.position, written_scaling(config.position.scaling)
    local = next(
        (layer.position.theta for layer in config.layers if layer.attention.pattern == "sliding"), position.theta
    )
    return {
        "rope_theta": position.theta,
        "rope_scaling": dict(scaling) if position.scaling else None,
        "rope_parameters": {
            FULL: {**scaling, "rope_theta": position.theta},
            SLIDING: {"rope_type": "default", "rope_theta": local},
        },
    }


_FIXED = {"residual.kind": "outputs", "attention.qk_norm": "projection"}
OLMO_2 = Family(
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    rules=RULES,
    keys=(*KEYS, Rope()),
    fixed=_FIXED,
)
OLMO_3 = Family(
    architecture="Olmo3ForCausalLM",
    model_type="olmo3",
    rules=RULES,
    keys=(
        *KEYS,
        alternating(lambda i, every: (i + 1) % every != 0, width=4096, every=4, local={"scaled": False}),
        Custom(_read_ropes, _write_ropes),
    ),
    fixed=_FIXED,
)

FAMILIES = (OLMO_2, OLMO_3)
