"""The text model of Llama 4: chunks with rotary positions, whole rows without positions, experts of scaled inputs."""

from typing import Any

from configs.model import ModelConfig
from configs.model_parts import TemperatureConfig
from export.conversion.config_keys import Custom, Draft, Fixed, MappedKey, shortest_pattern
from export.conversion.families.llama import AUXILIARY, BOTH, ENDS, NORMS, OURS, THEIRS, head_dim, named, sizes
from export.conversion.operations import Join, Rotary, Transpose, chain
from export.conversion.rope_keys import Rope
from export.conversion.table import Family, Rule

PAIRS = Rotary("pairs")
CHUNKED, FULL = "chunked_attention", "full_attention"
INTERVAL, CHUNK = 4, 8192  # what transformers takes where config.json says nothing
# The kinds of layers by (whether positions rotate, whether attention is in chunks).
KINDS = {(True, True): "local", (False, False): "global", (True, False): "rotary", (False, True): "chunked"}
RULES = (
    *ENDS,
    *NORMS,
    *named("attention.q_proj", "self_attn.q_proj", BOTH, operation=PAIRS),
    *named("attention.k_proj", "self_attn.k_proj", BOTH, operation=PAIRS),
    *named("attention.v_proj", "self_attn.v_proj", BOTH),
    *named("attention.o_proj", "self_attn.o_proj", BOTH),
    *(rule for kind in ("gate", "up", "down") for rule in named(f"mlp.{kind}_proj", f"feed_forward.{kind}_proj")),
    *named("moe.router", "feed_forward.router"),
    Rule(
        (f"{OURS}moe.experts.gate_proj", f"{OURS}moe.experts.up_proj"),
        f"{THEIRS}feed_forward.experts.gate_up_proj",
        chain(Join(dim=1), Transpose()),
    ),
    Rule(f"{OURS}moe.experts.down_proj", f"{THEIRS}feed_forward.experts.down_proj", Transpose()),
    *(
        rule
        for kind in ("gate", "up", "down")
        for rule in named(f"moe.shared.{kind}_proj", f"feed_forward.shared_expert.{kind}_proj")
    ),
)


def _read_layers(draft: Draft) -> None:
    """Reads which layers rotate, which attend in chunks, and what norm and temperature their queries get."""
    raw, count = draft.raw, draft.raw.get("num_hidden_layers")
    if not isinstance(count, int):
        return
    rotates = raw.get("no_rope_layers") or _every(draft.value("no_rope_layer_interval", INTERVAL), count)
    if not isinstance(rotates, list) or len(rotates) < count or not set(rotates) <= {0, 1}:
        return draft.refuse("no_rope_layers", rotates, f"{count} values, each 1 for a layer with positions or 0")
    types = raw.get("layer_types")
    if types is None:
        types = [CHUNKED if rotated else FULL for rotated in rotates[:count]]
    if not isinstance(types, list) or len(types) != count or not set(types) <= {CHUNKED, FULL}:
        return draft.refuse("layer_types", types, f"{count} values, each {CHUNKED!r} or {FULL!r}")
    width = raw.get("attention_chunk_size", CHUNK)
    if CHUNKED in types and not isinstance(width, int):
        return draft.refuse("attention_chunk_size", width, "a number of tokens")
    kinds = [KINDS[bool(rotated), kind == CHUNKED] for rotated, kind in zip(rotates, types, strict=False)]
    sections = {
        name: {
            **({"pattern": "chunked", "window": width} if chunked else {}),
            **({"temperature": False} if rotated else {"position": "none", "qk_norm": False}),
        }
        for (rotated, chunked), name in KINDS.items()
        if name in kinds
    }
    draft.put("layer_pattern", shortest_pattern(kinds))
    draft.put("kinds", sections)
    if draft.value("use_qk_norm", True):
        draft.put("attention.qk_norm", "unweighted")
    if draft.value("attn_temperature_tuning", True):
        draft.put("attention.temperature.scale", draft.value("attn_scale", 0.1))
        draft.put("attention.temperature.floor", draft.value("floor_scale", 8192))


def _write_layers(config: ModelConfig) -> dict[str, Any]:
    layers = [layer.attention for layer in config.layers]
    rotates = [int(layer.position.kind == "rotary") for layer in config.layers]
    types = [CHUNKED if layer.pattern == "chunked" else FULL for layer in layers]
    temperature = config.attention.temperature or TemperatureConfig()
    intervals = (n for n in (INTERVAL, *range(1, config.num_layers + 1)) if _every(n, config.num_layers) == rotates)
    return {
        "no_rope_layers": rotates,
        "no_rope_layer_interval": next(intervals, INTERVAL),
        "layer_types": types,
        "attention_chunk_size": next((layer.window for layer in layers if layer.pattern == "chunked"), CHUNK),
        "use_qk_norm": config.attention.qk_norm == "unweighted",
        "attn_temperature_tuning": config.attention.temperature is not None,
        "attn_scale": temperature.scale,
        "floor_scale": temperature.floor,
    }


def _every(interval: int, count: int) -> list[int]:
    """Returns a list of 0 for every `interval`-th layer, which has no rotary embedding, and 1 for all others."""
    return [int((layer + 1) % interval != 0) for layer in range(count)]


def _read_experts(draft: Draft) -> None:
    count, step = draft.raw.get("num_hidden_layers"), draft.value("interleave_moe_layer_step", 1)
    if not isinstance(count, int):
        return
    if not isinstance(step, int) or step < 1:
        return draft.refuse("interleave_moe_layer_step", step, "a whole number from 1 on")
    listed = draft.value("moe_layers", list(range(step - 1, count, step)))
    if not isinstance(listed, list) or not set(listed) & set(range(count)):
        return draft.refuse("moe_layers", listed, "at least one layer with experts")
    first = min(listed)
    every = step if all((layer - first) % step == 0 for layer in listed) else 1
    draft.put("moe.first_layer", first)
    draft.put("moe.every", every)
    draft.put("moe.dense_layers", [layer for layer in range(first, count, every) if layer not in listed])


def _write_experts(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    step = moe.every if moe and (moe.first_layer + 1) % moe.every == 0 else 1
    return {
        "moe_layers": [layer.index for layer in config.layers if layer.moe],
        "interleave_moe_layer_step": step,
    }


LLAMA_4 = Family(
    architecture="Llama4ForCausalLM",
    model_type="llama4_text",
    rules=RULES,
    keys=(
        *sizes(kv_heads=8, eps=1e-5),
        MappedKey("intermediate_size_mlp", "ffn_hidden_size", absent=16384),
        head_dim(absent=128),
        MappedKey("attention_bias", ("attention.qkv_bias", "attention.output_bias"), absent=False),
        MappedKey("num_local_experts", "moe.num_experts", absent=16),
        Fixed("num_experts_per_tok", 1, accepted=(None,)),
        MappedKey("intermediate_size", "moe.ffn_hidden_size", absent=8192, get=lambda config: config.expert_size),
        Custom(_read_experts, _write_experts),
        Fixed("router_jitter_noise", 0.0, free=True),
        *AUXILIARY,
        Custom(_read_layers, _write_layers),
        Rope(theta=500000.0, positions=131072),
    ),
    fixed={
        **{"position.layout": "pairs", "moe.gating": "sigmoid", "moe.renormalize": False, "moe.weigh": "input"},
        **{"moe.num_shared_experts": 1, "moe.top_k": 1},
    },
    converted=("position.layout",),
    positions=("max_position_embeddings", 131072),
    moe=True,
)

FAMILIES = (LLAMA_4,)
