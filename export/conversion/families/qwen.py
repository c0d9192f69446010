"""Qwen 1 to 2.5, Qwen2-MoE, Qwen3 and Qwen3-MoE.

transformers has no class for Qwen 1, whose remote code computes what Qwen2's class does, up to the length of rows that
the model was trained on; beyond it, two keys stretch positions and scores, which Trivium does not.
"""

from typing import Any

from configs.model import ModelConfig
from export.conversion.config_keys import ConfigKey, Custom, Draft, Fixed, MappedKey, shortest_pattern
from export.conversion.families.llama import (
    ATTENTION,
    AUXILIARY,
    ENDS,
    FFN,
    MLP,
    NORMS,
    OLD_ROTARY,
    OURS,
    QK_NORM,
    experts,
    head_dim,
    heads,
    named,
    sizes,
)
from export.conversion.operations import Join, Rotary, chain
from export.conversion.rope_keys import Rope
from export.conversion.table import Family, Rule

SLIDING, FULL = "sliding_attention", "full_attention"
ROPE = Rope(positions=32768)
POSITIONS = ("max_position_embeddings", 32768)
MOE = (*named("moe.router", "mlp.gate"), *experts("mlp"))
SHARED = (
    *(
        rule
        for kind in ("gate", "up", "down")
        for rule in named(f"moe.shared.{kind}_proj", f"mlp.shared_expert.{kind}_proj")
    ),
    *named("moe.shared_gate", "mlp.shared_expert_gate"),
)


def _put_window(draft: Draft, types: list[str], width: Any) -> None:
    """Puts the pattern of layers with a sliding window and of those that see everything."""
    if SLIDING not in types:
        return
    if set(types) != {SLIDING}:
        kinds = shortest_pattern(["sliding" if kind == SLIDING else "full" for kind in types])
        draft.put("layer_pattern", kinds)
        draft.put("kinds", {"full": {}, "sliding": {"pattern": "sliding", "window": width}})
        return
    draft.put("attention.pattern", "sliding")
    draft.put("attention.window", width)


def _read_windows(draft: Draft, types_by_default: Any) -> None:
    raw = draft.raw
    count = raw.get("num_hidden_layers")
    if not isinstance(count, int):
        return
    used, width = bool(raw.get("use_sliding_window", False)), raw.get("sliding_window", 4096)
    types = raw.get("layer_types")
    if types is None:
        first = draft.value("max_window_layers", 28)
        types = [SLIDING if used and width is not None and types_by_default(i, first) else FULL for i in range(count)]
    if not isinstance(types, list) or len(types) != count or not set(types) <= {SLIDING, FULL}:
        return draft.refuse("layer_types", types, f"{count} values, each {FULL!r} or {SLIDING!r}")
    if SLIDING in types and (not used or not width):
        return draft.refuse("layer_types", types, f"{FULL!r} alone, or use_sliding_window = true with a sliding_window")
    _put_window(draft, types, width)


def _write_windows(config: ModelConfig) -> dict[str, Any]:
    sliding = [layer.attention.pattern == "sliding" for layer in config.layers]
    first = next((i for i, slides in enumerate(sliding) if slides), config.num_layers)
    return {
        "use_sliding_window": any(sliding),
        "sliding_window": config.layer(first).attention.window if any(sliding) else None,
        "max_window_layers": first,
        "layer_types": [SLIDING if slides else FULL for slides in sliding],
    }


WINDOWS = Custom(lambda draft: _read_windows(draft, lambda i, first: i >= first), _write_windows)
# Qwen2-MoE's class takes every other layer before max_window_layers where layer_types is absent.
MOE_WINDOWS = Custom(lambda draft: _read_windows(draft, lambda i, first: i % 2 == 0 and i < first), _write_windows)


def _read_one_window(draft: Draft) -> None:
    width = draft.raw.get("sliding_window", 4096)
    if draft.raw.get("use_sliding_window", False) and width is not None:
        draft.put("attention.pattern", "sliding")
        draft.put("attention.window", width)


def _write_one_window(config: ModelConfig) -> dict[str, Any]:
    first = config.layer(0).attention
    slides = first.pattern == "sliding"
    return {"use_sliding_window": slides, "sliding_window": first.window if slides else None}


def _read_sparse_layers(draft: Draft) -> None:
    """Reads which layers have experts: each `decoder_sparse_step`th, counted from 1, but for `mlp_only_layers`."""
    count, step = draft.raw.get("num_hidden_layers"), draft.value("decoder_sparse_step", 1)
    only = draft.value("mlp_only_layers", [])
    if not isinstance(count, int) or not isinstance(step, int) or step < 1 or not isinstance(only, list):
        return draft.refuse("decoder_sparse_step", step, "a whole number from 1 on, and a list in mlp_only_layers")
    sparse = range(step - 1, count, step)
    first = next((i for i in sparse if i not in only), None)
    if first is None:
        draft.incomplete = True  # all that is said of experts would seem wrong too
        dense = "without any, set model_type and architectures to those of Qwen2, or of Qwen3 if heads have norms"
        return draft.refuse("mlp_only_layers", only, f"at least one layer with experts ({dense})")
    draft.put("moe.first_layer", first)
    draft.put("moe.every", step)
    draft.put("moe.dense_layers", [i for i in sparse if i > first and i in only])


def _write_sparse_layers(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    step = moe.every if moe and (moe.first_layer + 1) % moe.every == 0 else 1
    dense = [layer.index for layer in config.layers if layer.moe is None and (layer.index + 1) % step == 0]
    return {"decoder_sparse_step": step, "mlp_only_layers": dense}


SPARSE_LAYERS = Custom(_read_sparse_layers, _write_sparse_layers)


def _mixture(top_k: int, size: int) -> tuple[ConfigKey, ...]:
    """Returns the keys of a mixture of experts; the arguments are what transformers takes where they are absent."""
    return (
        MappedKey("num_experts_per_tok", "moe.top_k", absent=top_k),
        MappedKey("moe_intermediate_size", "moe.ffn_hidden_size", absent=size, get=lambda config: config.expert_size),
        MappedKey("norm_topk_prob", "moe.renormalize", absent=False),
        SPARSE_LAYERS,
        *AUXILIARY,
    )


QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    rules=(*ENDS, *NORMS, *ATTENTION, *MLP),
    keys=(*sizes(kv_heads=32), FFN, head_dim(always=False), WINDOWS, ROPE),
    fixed={"attention.qkv_bias": True},
    ignored=OLD_ROTARY,
    converted=("position.layout",),
    positions=POSITIONS,
)

QWEN2_MOE = Family(
    architecture="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    rules=(*ENDS, *NORMS, *ATTENTION, *MLP, *MOE, *SHARED),
    keys=(
        *sizes(kv_heads=16),
        FFN,
        head_dim(always=False),
        MappedKey("qkv_bias", "attention.qkv_bias", absent=True),
        MOE_WINDOWS,
        ROPE,
        MappedKey("num_experts", "moe.num_experts", absent=60),
        *_mixture(top_k=4, size=1408),
        MappedKey(
            "shared_expert_intermediate_size",
            "moe.shared_ffn_hidden_size",
            absent=5632,
            get=lambda config: next((layer.shared_size for layer in config.layers if layer.moe), 0) or None,
        ),
    ),
    fixed={"moe.num_shared_experts": 1, "moe.shared_gate": True},
    ignored=OLD_ROTARY,
    converted=("position.layout",),
    positions=POSITIONS,
    moe=True,
)

BIAS = MappedKey("attention_bias", ("attention.qkv_bias", "attention.output_bias"), absent=False)

QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    rules=(*ENDS, *NORMS, *ATTENTION, *QK_NORM, *MLP),
    keys=(*sizes(kv_heads=32), FFN, head_dim(absent=128), BIAS, WINDOWS, ROPE),
    fixed={"attention.qk_norm": "head"},
    converted=("position.layout",),
    positions=POSITIONS,
)

QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    rules=(*ENDS, *NORMS, *ATTENTION, *QK_NORM, *MLP, *MOE),
    keys=(
        *sizes(kv_heads=4),
        FFN,
        head_dim(),
        BIAS,
        Custom(_read_one_window, _write_one_window),
        ROPE,
        # Version 4 of transformers and vLLM read num_experts, version 5 writes num_local_experts.
        MappedKey("num_experts", "moe.num_experts", absent=128, also=("num_local_experts",)),
        *_mixture(top_k=8, size=768),
    ),
    fixed={"attention.qk_norm": "head"},
    converted=("position.layout",),
    positions=POSITIONS,
    moe=True,
)

FAMILIES = (QWEN2, QWEN3, QWEN2_MOE, QWEN3_MOE)


def _read_inner_size(draft: Draft) -> None:
    """Reads the inner size of the MLP, which Qwen 1 counts twice, once for each of the two projections into it."""
    size = draft.value("intermediate_size")
    if not isinstance(size, int) or size % 2:
        return draft.refuse("intermediate_size", size, "an even number")
    draft.put("ffn_hidden_size", size // 2)


def _read_head_dim(draft: Draft) -> None:
    width, count = draft.raw.get("kv_channels"), heads(draft.raw)
    if isinstance(width, int) and isinstance(count, int) and width * count != draft.raw.get("hidden_size"):
        draft.refuse("kv_channels", width, "hidden_size / num_attention_heads")


IN_BLOCK = "transformer.h.{layer}."
QWEN1 = Family(
    architecture="QWenLMHeadModel",
    model_type="qwen",
    rules=(
        Rule("embedding.weight", "transformer.wte.weight"),
        Rule(f"{OURS}attention_norm.weight", f"{IN_BLOCK}ln_1.weight"),
        *(
            Rule(
                tuple(f"{OURS}attention.{name}_proj.{kind}" for name in "qkv"),
                f"{IN_BLOCK}attn.c_attn.{kind}",
                chain(Rotary("halves", first=2), Join()),
            )
            for kind in ("weight", "bias")
        ),
        Rule(f"{OURS}attention.o_proj.weight", f"{IN_BLOCK}attn.c_proj.weight"),
        Rule(f"{OURS}mlp_norm.weight", f"{IN_BLOCK}ln_2.weight"),
        Rule(f"{OURS}mlp.gate_proj.weight", f"{IN_BLOCK}mlp.w2.weight"),
        Rule(f"{OURS}mlp.up_proj.weight", f"{IN_BLOCK}mlp.w1.weight"),
        Rule(f"{OURS}mlp.down_proj.weight", f"{IN_BLOCK}mlp.c_proj.weight"),
        Rule("final_norm.weight", "transformer.ln_f.weight"),
        Rule("lm_head.weight", "lm_head.weight"),
    ),
    keys=(
        MappedKey("vocab_size", "vocab_size"),
        MappedKey("hidden_size", "hidden_size"),
        MappedKey("num_hidden_layers", "num_layers"),
        MappedKey("num_attention_heads", ("num_heads", "num_kv_heads")),
        Custom(_read_inner_size, lambda config: {"intermediate_size": 2 * config.ffn_hidden_size}),
        Custom(_read_head_dim, lambda config: {"kv_channels": config.dim_per_head}),
        MappedKey("layer_norm_epsilon", "norm.eps", absent=1e-6, number=float),
        MappedKey("rotary_emb_base", "position.theta", absent=10000.0, number=float),
        MappedKey("tie_word_embeddings", "tie_embeddings", absent=False),
        MappedKey("initializer_range", "init_std", absent=0.02, number=float),
        Fixed("rotary_pct", 1.0),
        Fixed("no_bias", True),
        Fixed("scale_attn_weights", True),
    ),
    fixed={"attention.qkv_bias": True},
    ignored=(r"transformer\.rotary_emb\.inv_freq", r"transformer\.h\.\d+\.attn\.(rotary_emb\.inv_freq|masked_bias)"),
    prefix="transformer.",
    converted=("position.layout",),
    positions=("seq_length", 2048),
)
