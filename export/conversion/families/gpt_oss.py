"""gpt-oss: sinks, windows on every other layer, experts with biases and a clamped SwiGLU."""

from export.conversion.config_keys import Draft, Fixed, MappedKey
from export.conversion.families.llama import (
    ATTENTION,
    AUXILIARY,
    BOTH,
    ENDS,
    NORMS,
    OURS,
    THEIRS,
    head_dim,
    named,
    sizes,
)
from export.conversion.families.windows import alternating
from export.conversion.operations import Interleave, Transpose, chain
from export.conversion.rope_keys import Rope
from export.conversion.table import Family, Rule

_EXPERTS = f"{THEIRS}mlp.experts."
_YARN = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}


class _Yarn(Rope):
    """The keys of rotary positions, with a YaRN of factor 32 where they are absent."""

    def read(self, draft: Draft) -> None:
        raw = draft.raw
        if not raw.get("rope_parameters") and not raw.get("rope_scaling"):
            draft = Draft({**raw, "rope_parameters": _YARN}, draft.architecture, draft.fields, draft.problems)
        super().read(draft)


GPT_OSS = Family(
    architecture="GptOssForCausalLM",
    model_type="gpt_oss",
    rules=(
        *ENDS,
        *NORMS,
        *ATTENTION,
        Rule(f"{OURS}attention.sinks", f"{THEIRS}self_attn.sinks"),
        *named("moe.router", "mlp.router", BOTH),
        Rule(
            (f"{OURS}moe.experts.gate_proj", f"{OURS}moe.experts.up_proj"),
            f"{_EXPERTS}gate_up_proj",
            chain(Interleave(dim=1), Transpose()),
        ),
        Rule(
            (f"{OURS}moe.experts.gate_bias", f"{OURS}moe.experts.up_bias"),
            f"{_EXPERTS}gate_up_proj_bias",
            Interleave(dim=1),
        ),
        Rule(f"{OURS}moe.experts.down_proj", f"{_EXPERTS}down_proj", Transpose()),
        Rule(f"{OURS}moe.experts.down_bias", f"{_EXPERTS}down_proj_bias"),
    ),
    keys=(
        *sizes(kv_heads=8, eps=1e-5, activation=Fixed("hidden_act", "silu")),
        MappedKey("intermediate_size", "ffn_hidden_size", get=lambda config: config.expert_size),
        head_dim(absent=64),
        MappedKey("attention_bias", ("attention.qkv_bias", "attention.output_bias"), absent=True),
        MappedKey("num_local_experts", "moe.num_experts", absent=128),
        MappedKey("num_experts_per_tok", "moe.top_k", absent=4, also=("experts_per_token",)),
        Fixed("swiglu_alpha", 1.702),
        Fixed("swiglu_limit", 7.0),
        *AUXILIARY,
        alternating(lambda i, every: i % 2 == 0, width=128),
        _Yarn(theta=150000.0, positions=131072),
    ),
    fixed={
        **{"attention.sinks": True, "mlp.kind": "clamped_swiglu", "mlp.bias": True},
        **{"moe.router_bias": True, "moe.renormalize": True},
    },
    converted=("position.layout",),
    positions=("max_position_embeddings", 131072),
    moe=True,
)

FAMILIES = (GPT_OSS,)
