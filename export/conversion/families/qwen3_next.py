"""Qwen3-Next: gated delta nets in three of four layers, attention with an output gate in the fourth, and many experts.

The file's names differ between the two kinds of layers, so each kind has rules of its own. Published files have one
module of multi-token prediction, which transformers leaves out.
"""

from typing import Any

from configs.model import ModelConfig
from export.conversion.config_keys import Custom, Draft, Fixed, MappedKey, shortest_pattern
from export.conversion.families.llama import (
    AUXILIARY,
    BOTH,
    ENDS,
    FFN,
    HALVES,
    MLP,
    NORMS,
    OURS,
    QK_NORM,
    THEIRS,
    head_dim,
    named,
    sizes,
)
from export.conversion.families.qwen import BIAS, MOE, SHARED, SPARSE_LAYERS
from export.conversion.operations import ByKeyHead, HeadByHead, Join, Rotary, Unsqueeze, chain
from export.conversion.rope_keys import Rope
from export.conversion.table import Family, Rule

LINEAR, FULL = "linear_attention", "full_attention"
MIXER = f"{OURS}attention."


def _projections(*names: str) -> tuple[str, ...]:
    return tuple(f"{MIXER}{name}_proj.weight" for name in names)


_DELTA = f"{MIXER}log_rates"  # which gated delta nets alone have
DELTA_NET = (
    Rule(
        _projections("q", "k", "v", "output_gate"),
        f"{THEIRS}linear_attn.in_proj_qkvz.weight",
        ByKeyHead(),
        beside=_DELTA,
    ),
    Rule(_projections("beta", "decay"), f"{THEIRS}linear_attn.in_proj_ba.weight", ByKeyHead()),
    Rule(
        tuple(f"{MIXER}{name}_conv" for name in "qkv"),
        f"{THEIRS}linear_attn.conv1d.weight",
        chain(Join(), Unsqueeze(1)),
    ),
    Rule(_DELTA, f"{THEIRS}linear_attn.A_log"),
    Rule(f"{MIXER}decay_bias", f"{THEIRS}linear_attn.dt_bias"),
    *named("attention.head_norm", "linear_attn.norm"),
    *named("attention.o_proj", "linear_attn.out_proj", beside=_DELTA),
)
GATED_ATTENTION = (
    *(
        Rule(
            (f"{MIXER}q_proj.{kind}", f"{MIXER}output_gate_proj.{kind}"),
            f"{THEIRS}self_attn.q_proj.{kind}",
            chain(Rotary("halves", first=1), HeadByHead()),
        )
        for kind in BOTH
    ),
    *named("attention.k_proj", "self_attn.k_proj", BOTH, operation=HALVES),
    *named("attention.v_proj", "self_attn.v_proj", BOTH),
    *named("attention.o_proj", "self_attn.o_proj", BOTH),
    *QK_NORM,
)
MODULES = "mtp."
MODULE = (
    Rule(f"{OURS}embedding_norm.weight", f"{MODULES}pre_fc_norm_embedding.weight"),
    Rule(f"{OURS}hidden_norm.weight", f"{MODULES}pre_fc_norm_hidden.weight"),
    Rule(f"{OURS}joint_proj.weight", f"{MODULES}fc.weight"),
    Rule(f"{OURS}output_norm.weight", f"{MODULES}norm.weight"),
)

# Key of config.json, ours, and what transformers takes where it is absent.
_DELTA_KEYS = (
    ("linear_num_key_heads", "num_key_heads", 16),
    ("linear_num_value_heads", "num_value_heads", 32),
    ("linear_key_head_dim", "key_head_dim", 128),
    ("linear_value_head_dim", "value_head_dim", 128),
    ("linear_conv_kernel_dim", "kernel_size", 4),
)


def _read_layers(draft: Draft) -> None:
    """Reads which layers are gated delta nets, and their sizes; without any, their sizes change nothing."""
    raw, count = draft.raw, draft.raw.get("num_hidden_layers")
    every = draft.value("full_attention_interval", 4)
    if not isinstance(count, int) or not isinstance(every, int) or every < 1:
        return draft.refuse("full_attention_interval", every, "a whole number from 1 on")
    types = raw.get("layer_types")
    if types is None:
        types = [LINEAR if (i + 1) % every else FULL for i in range(count)]
    if not isinstance(types, list) or len(types) != count or not set(types) <= {LINEAR, FULL}:
        return draft.refuse("layer_types", types, f"{count} values, each {LINEAR!r} or {FULL!r}")
    if LINEAR not in types:
        return
    for theirs, ours, absent in _DELTA_KEYS:
        draft.put(f"attention.delta.{ours}", draft.value(theirs, absent))
    if FULL in types:
        names = ["linear" if kind == LINEAR else "full" for kind in types]
        draft.put("layer_pattern", shortest_pattern(names))
        draft.put("kinds", {"linear": {}, "full": {"delta": False}})


def _write_layers(config: ModelConfig) -> dict[str, Any]:
    delta = config.attention.delta
    own = {theirs: getattr(delta, ours) for theirs, ours, _ in _DELTA_KEYS} if delta else {}
    return own | {"layer_types": [LINEAR if layer.attention.delta else FULL for layer in config.layers]}


QWEN3_NEXT = Family(
    architecture="Qwen3NextForCausalLM",
    model_type="qwen3_next",
    rules=(*ENDS, *NORMS, *DELTA_NET, *GATED_ATTENTION, *MLP, *MOE, *SHARED, *MODULE),
    keys=(
        # transformers also puts the activation after the convolution, where Trivium has SiLU alone.
        *sizes(kv_heads=2, activation=Fixed("hidden_act", "silu", accepted=("swish",))),
        FFN,
        head_dim(absent=256),
        BIAS,
        Custom(_read_layers, _write_layers),
        Rope(fraction=0.25, whole=False, positions=32768),
        MappedKey("num_experts", "moe.num_experts", absent=512),
        MappedKey("num_experts_per_tok", "moe.top_k", absent=10),
        MappedKey("moe_intermediate_size", "moe.ffn_hidden_size", absent=512, get=lambda config: config.expert_size),
        MappedKey(
            "shared_expert_intermediate_size",
            "moe.shared_ffn_hidden_size",
            absent=512,
            get=lambda config: next((layer.shared_size for layer in config.layers if layer.moe), 0) or None,
        ),
        MappedKey("norm_topk_prob", "moe.renormalize", absent=True),
        SPARSE_LAYERS,
        *AUXILIARY,
        Fixed("use_sliding_window", False, written=False),
    ),
    fixed={
        **{"norm.kind": "rms_plus_one", "attention.qk_norm": "head", "attention.output_gate": True},
        **{"moe.num_shared_experts": 1, "moe.shared_gate": True},
    },
    further_layers=f"{MODULES}layers.0.",
    converted=("position.layout",),
    positions=("max_position_embeddings", 32768),
    moe=True,
)

FAMILIES = (QWEN3_NEXT,)
