"""LLaMA 1 to 3.1, Mistral and Mixtral, and the rules and keys that many other families share with them."""

from collections.abc import Mapping
from typing import Any

from configs.model import ModelConfig
from export.conversion.config_keys import REQUIRED, ConfigKey, Custom, Draft, Fixed, MappedKey
from export.conversion.operations import Rotary, SplitExperts
from export.conversion.rope_keys import Rope
from export.conversion.table import Family, Rule

OURS, THEIRS = "layers.{layer}.", "model.layers.{layer}."
HALVES = Rotary("halves")


def named(ours: str, theirs: str, kinds: tuple[str, ...] = ("weight",), **options: Any) -> tuple[Rule, ...]:
    """Returns the rules of one module of a layer, one for each kind of tensor ("weight", "bias")."""
    return tuple(Rule(f"{OURS}{ours}.{kind}", f"{THEIRS}{theirs}.{kind}", **options) for kind in kinds)


BOTH = ("weight", "bias")
ENDS = (
    Rule("embedding.weight", "model.embed_tokens.weight"),
    Rule("final_norm.weight", "model.norm.weight"),
    Rule("lm_head.weight", "lm_head.weight"),
)
NORMS = (
    *named("attention_norm", "input_layernorm"),
    *named("mlp_norm", "post_attention_layernorm"),
)
ATTENTION = (
    *named("attention.q_proj", "self_attn.q_proj", BOTH, operation=HALVES),
    *named("attention.k_proj", "self_attn.k_proj", BOTH, operation=HALVES),
    *named("attention.v_proj", "self_attn.v_proj", BOTH),
    *named("attention.o_proj", "self_attn.o_proj", BOTH),
)
QK_NORM = (
    *named("attention.q_norm", "self_attn.q_norm", operation=HALVES),
    *named("attention.k_norm", "self_attn.k_norm", operation=HALVES),
)
MLP = tuple(rule for kind in ("gate", "up", "down") for rule in named(f"mlp.{kind}_proj", f"mlp.{kind}_proj", BOTH))


def experts(theirs: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> tuple[Rule, ...]:
    """Returns the rules of experts that the file keeps one by one, as `theirs`.experts.N.`gate`.weight and so on."""
    return tuple(
        Rule(f"{OURS}moe.experts.{ours}_proj", f"{THEIRS}{theirs}.experts.{{expert}}.{name}.weight", SplitExperts())
        for ours, name in (("gate", gate), ("up", up), ("down", down))
    )


MIXTRAL_MOE = (
    *named("moe.router", "block_sparse_moe.gate"),
    *experts("block_sparse_moe", "w1", "w3", "w2"),
)

# transformers' names of the activation in an MLP with a gate; the last two are one formula.
GATED = {
    **{"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"},
    **{"gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh"},
}


def heads(raw: Mapping[str, Any]) -> Any:
    """Returns the number of query heads, which transformers takes for key-value heads that are null."""
    return raw.get("num_attention_heads", REQUIRED)


HIDDEN_ACT = MappedKey("hidden_act", "mlp.kind", absent="silu", values=GATED)


def sizes(
    kv_heads: Any = heads, eps: float = 1e-6, tied: bool = False, activation: ConfigKey = HIDDEN_ACT
) -> tuple[ConfigKey, ...]:
    """Returns the keys of sizes, norm and activation, the last of which some families call otherwise.

    The other arguments are what transformers takes where the keys are absent.
    """
    return (
        MappedKey("vocab_size", "vocab_size"),
        MappedKey("hidden_size", "hidden_size"),
        MappedKey("num_hidden_layers", "num_layers"),
        MappedKey("num_attention_heads", "num_heads"),
        MappedKey("num_key_value_heads", "num_kv_heads", absent=kv_heads, null=heads),
        activation,
        MappedKey("rms_norm_eps", "norm.eps", absent=eps, number=float),
        MappedKey("tie_word_embeddings", "tie_embeddings", absent=tied),
        MappedKey("initializer_range", "init_std", absent=0.02, number=float),
        Fixed("attention_dropout", 0.0, free=True),
        Fixed("use_cache", True, free=True),
    )


FFN = MappedKey("intermediate_size", "ffn_hidden_size")


def head_dim(absent: int | None = None, always: bool = True) -> Custom:
    """Returns the key of the width of a head: `absent` is what transformers takes, None for hidden size / heads.

    With `always` it is written also where it is hidden size / heads.
    """

    def read(draft: Draft) -> None:
        width = draft.value("head_dim", absent if "head_dim" not in draft.raw else None)
        hidden, count = draft.raw.get("hidden_size"), draft.raw.get("num_attention_heads")
        size, heads = (hidden, count) if isinstance(hidden, int) and isinstance(count, int) and count > 0 else (0, 0)
        if width is None and heads and size % heads:
            width = size // heads
        if width is not None and not (heads and width * heads == size):
            draft.put("head_dim", width)

    def write(config: ModelConfig) -> dict[str, Any]:
        width = config.dim_per_head
        return {"head_dim": width} if always or width * config.num_heads != config.hidden_size else {}

    return Custom(read, write)


def even_heads(draft: Draft) -> None:
    """Refuses a hidden size that is no multiple of the number of heads, as transformers' LlamaConfig does."""
    hidden, count = draft.raw.get("hidden_size"), draft.raw.get("num_attention_heads")
    if isinstance(hidden, int) and isinstance(count, int) and count > 0 and hidden % count:
        draft.problems.append(
            f"config.json: hidden_size = {hidden} is not a multiple of num_attention_heads = {count}, which "
            f"transformers' {draft.architecture} does not allow even with a head_dim"
        )


def window(absent: int | None) -> Custom:
    """Returns the key of a sliding window over all layers; `absent` is what transformers takes without the key."""

    def read(draft: Draft) -> None:
        width = draft.raw.get("sliding_window", absent)
        if width is not None:
            draft.put("attention.pattern", "sliding")
            draft.put("attention.window", width)

    def write(config: ModelConfig) -> dict[str, Any]:
        first = config.layer(0).attention
        return {"sliding_window": first.window if first.pattern == "sliding" else None}

    return Custom(read, write)


AUXILIARY = (
    MappedKey("router_aux_loss_coef", "moe.aux_loss_coef", absent=0.001, number=float),
    Fixed("output_router_logits", False, free=True),
)
OLD_ROTARY = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)  # written before version 4.31

LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    rules=(*ENDS, *NORMS, *ATTENTION, *MLP),
    keys=(
        *sizes(),
        FFN,
        head_dim(),
        Custom(even_heads, lambda config: {}),
        MappedKey("attention_bias", ("attention.qkv_bias", "attention.output_bias"), absent=False),
        MappedKey("mlp_bias", "mlp.bias", absent=False),
        Rope(),
    ),
    ignored=OLD_ROTARY,
    converted=("position.layout",),
)

MISTRAL = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    rules=(*ENDS, *NORMS, *ATTENTION, *MLP),
    keys=(*sizes(kv_heads=8), FFN, head_dim(), window(absent=4096), Rope(positions=131072)),
    ignored=OLD_ROTARY,
    converted=("position.layout",),
    positions=("max_position_embeddings", 131072),
)

MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    rules=(*ENDS, *NORMS, *ATTENTION, *MIXTRAL_MOE),
    keys=(
        *sizes(kv_heads=8, eps=1e-5),
        MappedKey("intermediate_size", "ffn_hidden_size", get=lambda config: config.expert_size),
        head_dim(),
        window(absent=None),
        Rope(theta=1e6, positions=131072),
        MappedKey("num_local_experts", "moe.num_experts", absent=8),
        MappedKey("num_experts_per_tok", "moe.top_k", absent=2),
        Fixed("router_jitter_noise", 0.0, free=True),
        *AUXILIARY,
    ),
    ignored=OLD_ROTARY,
    converted=("position.layout",),
    positions=("max_position_embeddings", 131072),
    moe=True,
)

FAMILIES = (LLAMA, MISTRAL, MIXTRAL)
