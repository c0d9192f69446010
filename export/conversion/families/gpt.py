"""GPT-1, GPT-2 (and GPT-3 with dense layers alone), OPT, GPT-NeoX (Pythia) and BLOOM: LayerNorm and biases."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from configs.model import ModelConfig
from configs.model_parts import share_of
from export.conversion.config_keys import ConfigKey, Custom, Draft, Fixed, MappedKey
from export.conversion.families.llama import BOTH, OURS
from export.conversion.operations import Chain, HeadByHead, Join, Operation, Rotary, RowOffset, Transpose, chain
from export.conversion.rope_keys import Rope
from export.conversion.table import COPY, Family, Rule

LAYER_NORM = {"norm.kind": "layer"}
BIASES = {"attention.qkv_bias": True, "attention.output_bias": True, "mlp.bias": True}
LEARNED = {"position.kind": "learned"}
# transformers' names of the activation in an MLP without gate; several are one formula.
GELUS = {
    **{"gelu": "gelu", "gelu_python": "gelu"},
    **{"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"},
}
RELU = {"relu": "relu"}
USE_CACHE = Fixed("use_cache", True, free=True)


def pairs(ours: str, theirs: str, weight: Operation = COPY) -> tuple[Rule, ...]:
    """Returns the rules of a weight, which the file keeps in another form, and of a bias, which it keeps as it is."""
    return (Rule(f"{ours}.weight", f"{theirs}.weight", weight), Rule(f"{ours}.bias", f"{theirs}.bias"))


def packed(theirs: str, weight: Operation, bias: Operation) -> tuple[Rule, ...]:
    """Returns the rules of queries, keys and values in one projection."""
    return tuple(
        Rule(tuple(f"{OURS}attention.{name}_proj.{kind}" for name in "qkv"), f"{theirs}.{kind}", operation)
        for kind, operation in zip(BOTH, (weight, bias), strict=True)
    )


def final_norm(theirs: str) -> tuple[Rule, ...]:
    """Returns the rules of the norm after the last block."""
    return pairs("final_norm", theirs)


def _times(factor: int, name: str) -> Any:
    """Returns a function that gives a multiple of a number in config.json, or None where there is no number."""

    def of(raw: Mapping[str, Any]) -> int | None:
        return factor * raw[name] if isinstance(raw.get(name), int) else None

    return of


def four_times(name: str, also: str = "") -> Custom:
    """Returns the rule that an MLP is four times as wide as the hidden states, whose width is key `name`."""

    def read(draft: Draft) -> None:
        width = _times(4, name)(draft.raw) or (_times(4, also)(draft.raw) if also else None)
        if width is not None:
            draft.put("ffn_hidden_size", width)

    return Custom(read, lambda config: {})


# GPT-1 and GPT-2 keep weights as [in, out], and queries, keys and values in thirds.
_H = "transformer.h.{layer}."
_THIRDS = packed(f"{_H}attn.c_attn", chain(Join(), Transpose()), Join())
_GPT_LAYER = (
    *pairs(f"{OURS}attention_norm", f"{_H}ln_1"),
    *_THIRDS,
    *pairs(f"{OURS}attention.o_proj", f"{_H}attn.c_proj", Transpose()),
    *pairs(f"{OURS}mlp_norm", f"{_H}ln_2"),
    *pairs(f"{OURS}mlp.up_proj", f"{_H}mlp.c_fc", Transpose()),
    *pairs(f"{OURS}mlp.down_proj", f"{_H}mlp.c_proj", Transpose()),
)
_HEAD = Rule("lm_head.weight", "lm_head.weight")
_GPT_SIZES: tuple[ConfigKey, ...] = (
    MappedKey("vocab_size", "vocab_size"),
    MappedKey("n_embd", "hidden_size"),
    MappedKey("n_layer", "num_layers"),
    MappedKey("n_head", ("num_heads", "num_kv_heads")),
    MappedKey("layer_norm_epsilon", "norm.eps", absent=1e-5, number=float),
    MappedKey("initializer_range", "init_std", absent=0.02, number=float),
    MappedKey("tie_word_embeddings", "tie_embeddings", absent=True),
)
_GPT_DROPOUT = ("attn_pdrop", "resid_pdrop", "embd_pdrop")
# Masks, which old files have as buffers.
_GPT_MASKS = (r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",)


def _scale(config: ModelConfig) -> float | None:
    """Returns the factor on scores, None where it is the usual one."""
    scale, usual = config.attention.scale, config.dim_per_head**-0.5
    return None if scale is None or abs(scale - usual) < 1e-9 else scale


def _inner(config: ModelConfig) -> int | None:
    return None if config.ffn_hidden_size == 4 * config.hidden_size else config.ffn_hidden_size


GPT2 = Family(
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    rules=(
        Rule("embedding.weight", "transformer.wte.weight"),
        Rule("position_embedding.weight", "transformer.wpe.weight"),
        *_GPT_LAYER,
        *final_norm("transformer.ln_f"),
        _HEAD,
    ),
    keys=(
        *_GPT_SIZES,
        MappedKey("n_positions", "position.max_positions", absent=1024),
        MappedKey("n_inner", "ffn_hidden_size", absent=_times(4, "n_embd"), get=_inner),
        MappedKey(
            "activation_function",
            "mlp.kind",
            absent="gelu_new",
            values={"gelu_new": "gelu_tanh", **GELUS, **RELU},
        ),
        MappedKey("scale_attn_weights", "attention.scale", absent=True, values={True: None, False: 1.0}, get=_scale),
        MappedKey("scale_attn_by_inverse_layer_idx", "attention.scale_by_layer", absent=False),
        Fixed("add_cross_attention", False),
        USE_CACHE,
    ),
    fixed={**LAYER_NORM, **BIASES, **LEARNED},
    ignored=_GPT_MASKS,
    kept_keys=(*_GPT_DROPOUT, "reorder_and_upcast_attn"),
    prefix="transformer.",
    positions=("n_positions", 1024),
)

GPT1 = Family(
    architecture="OpenAIGPTLMHeadModel",
    model_type="openai-gpt",
    rules=(
        Rule("embedding.weight", "transformer.tokens_embed.weight"),
        Rule("position_embedding.weight", "transformer.positions_embed.weight"),
        *_GPT_LAYER,
        _HEAD,
    ),
    keys=(
        *_GPT_SIZES,
        MappedKey("n_positions", "position.max_positions", absent=512),
        four_times("n_embd"),
        # This class calls the approximation of GELU by tanh "gelu".
        MappedKey("afn", "mlp.kind", absent="gelu", values={"gelu": "gelu_tanh", **RELU}),
    ),
    fixed={**LAYER_NORM, **BIASES, **LEARNED, "norm.final": False, "residual.kind": "post"},
    ignored=_GPT_MASKS,
    kept_keys=_GPT_DROPOUT,
    prefix="transformer.",
    positions=("n_positions", 512),
)


def _read_projections(draft: Draft) -> None:
    hidden = draft.raw.get("hidden_size")
    if (width := draft.raw.get("word_embed_proj_dim")) not in (None, hidden):
        draft.problems.append(
            f"config.json: word_embed_proj_dim = {width!r} is not hidden_size = {hidden!r}, and Trivium has no "
            "projections between embeddings and hidden states of other widths (OPT-350m); import another size of OPT"
        )


_OPT = "model.decoder."
_OPT_LAYER = f"{_OPT}layers.{{layer}}."
OPT = Family(
    architecture="OPTForCausalLM",
    model_type="opt",
    rules=(
        Rule("embedding.weight", f"{_OPT}embed_tokens.weight"),
        # The first row belongs to no position, and the second to padding.
        Rule("position_embedding.weight", f"{_OPT}embed_positions.weight", RowOffset(2)),
        *pairs(f"{OURS}attention_norm", f"{_OPT_LAYER}self_attn_layer_norm"),
        *(
            rule
            for name in "qkv"
            for rule in pairs(f"{OURS}attention.{name}_proj", f"{_OPT_LAYER}self_attn.{name}_proj")
        ),
        *pairs(f"{OURS}attention.o_proj", f"{_OPT_LAYER}self_attn.out_proj"),
        *pairs(f"{OURS}mlp_norm", f"{_OPT_LAYER}final_layer_norm"),
        *pairs(f"{OURS}mlp.up_proj", f"{_OPT_LAYER}fc1"),
        *pairs(f"{OURS}mlp.down_proj", f"{_OPT_LAYER}fc2"),
        *final_norm(f"{_OPT}final_layer_norm"),
        _HEAD,
    ),
    keys=(
        MappedKey("vocab_size", "vocab_size"),
        MappedKey("hidden_size", "hidden_size"),
        MappedKey("num_hidden_layers", "num_layers"),
        MappedKey("num_attention_heads", ("num_heads", "num_kv_heads")),
        MappedKey("ffn_dim", "ffn_hidden_size", absent=3072),
        MappedKey("max_position_embeddings", "position.max_positions", absent=2048),
        # ReLU is OPT's, the exact GELU that of Galactica, which is of this class.
        MappedKey("activation_function", "mlp.kind", absent="relu", values={**RELU, "gelu": "gelu"}),
        MappedKey("enable_bias", tuple(BIASES), absent=True),
        MappedKey("do_layer_norm_before", "residual.kind", absent=True, values={True: "pre", False: "post"}),
        Custom(
            lambda draft: draft.put(
                "norm.final",
                bool(draft.value("do_layer_norm_before", True)) and not draft.value("_remove_final_layer_norm", False),
            ),
            lambda config: {"_remove_final_layer_norm": config.residual.kind == "pre" and not config.norm.final},
        ),
        Custom(_read_projections, lambda config: {"word_embed_proj_dim": config.hidden_size}),
        Fixed("layer_norm_elementwise_affine", True),
        MappedKey("init_std", "init_std", absent=0.02, number=float),
        MappedKey("tie_word_embeddings", "tie_embeddings", absent=True),
        USE_CACHE,
    ),
    fixed={**LAYER_NORM, **LEARNED, "norm.eps": 1e-5},
    kept_keys=("dropout", "attention_dropout", "activation_dropout", "layerdrop"),
)


@dataclass(frozen=True)
class NeoXRope(Rope):
    """The keys of rotary positions under GPT-NeoX's own names, `rotary_pct` and `rotary_emb_base`, and the usual ones.

    transformers rotates as many whole elements as the share gives, so the share that is read is that of whole elements.
    """

    def read(self, draft: Draft) -> None:
        raw = dict(draft.raw)
        for name, old in (("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct")):
            if raw.get(name) is None and raw.get(old) is not None:
                raw[name] = raw[old]
        own = replace(draft, raw=raw)
        super().read(own)
        draft.incomplete |= own.incomplete
        hidden, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
        fraction = draft.fields.get("position", {}).get("fraction", 1.0)
        if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden >= heads:
            size = hidden // heads
            if (turned := int(size * fraction)) != size * fraction and turned > 0:
                draft.put("position.fraction", share_of(turned, size))

    def write(self, config: ModelConfig) -> dict[str, Any]:
        position = config.position
        return super().write(config) | {"rotary_pct": position.fraction, "rotary_emb_base": position.theta}


_NEOX = "gpt_neox.layers.{layer}."
_HALVES_BY_HEAD: Chain = chain(Rotary("halves", first=2), HeadByHead())
GPT_NEOX = Family(
    architecture="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    rules=(
        Rule("embedding.weight", "gpt_neox.embed_in.weight"),
        *pairs(f"{OURS}attention_norm", f"{_NEOX}input_layernorm"),
        *packed(f"{_NEOX}attention.query_key_value", _HALVES_BY_HEAD, _HALVES_BY_HEAD),
        *pairs(f"{OURS}attention.o_proj", f"{_NEOX}attention.dense"),
        *pairs(f"{OURS}mlp_norm", f"{_NEOX}post_attention_layernorm"),
        *pairs(f"{OURS}mlp.up_proj", f"{_NEOX}mlp.dense_h_to_4h"),
        *pairs(f"{OURS}mlp.down_proj", f"{_NEOX}mlp.dense_4h_to_h"),
        *final_norm("gpt_neox.final_layer_norm"),
        Rule("lm_head.weight", "embed_out.weight"),
    ),
    keys=(
        MappedKey("vocab_size", "vocab_size"),
        MappedKey("hidden_size", "hidden_size"),
        MappedKey("num_hidden_layers", "num_layers"),
        MappedKey("num_attention_heads", ("num_heads", "num_kv_heads")),
        MappedKey("intermediate_size", "ffn_hidden_size", absent=24576),
        MappedKey("hidden_act", "mlp.kind", absent="gelu", values={**GELUS, **RELU}),
        MappedKey("layer_norm_eps", "norm.eps", absent=1e-5, number=float),
        MappedKey("use_parallel_residual", "residual.kind", absent=True, values={True: "parallel", False: "pre"}),
        MappedKey("attention_bias", ("attention.qkv_bias", "attention.output_bias"), absent=True),
        NeoXRope(fraction=0.25, whole=False),
        MappedKey("initializer_range", "init_std", absent=0.02, number=float),
        MappedKey("tie_word_embeddings", "tie_embeddings", absent=False),
        USE_CACHE,
    ),
    fixed={**LAYER_NORM, "mlp.bias": True},
    ignored=(r"(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    kept_keys=("attention_dropout", "hidden_dropout"),
    prefix="gpt_neox.",
    converted=("position.layout",),
)


def _read_exactness(draft: Draft) -> None:
    """Refuses BLOOM's `slow_but_exact`, which computes a projection in parts and leaves its bias out."""
    if draft.value("slow_but_exact", False) and draft.value("pretraining_tp", 1) != 1:
        draft.refuse("slow_but_exact", True, "False, or pretraining_tp = 1")


_BLOOM = "transformer.h.{layer}."
BLOOM = Family(
    architecture="BloomForCausalLM",
    model_type="bloom",
    rules=(
        Rule("embedding.weight", "transformer.word_embeddings.weight"),
        *pairs("embedding_norm", "transformer.word_embeddings_layernorm"),
        *pairs(f"{OURS}attention_norm", f"{_BLOOM}input_layernorm"),
        *packed(f"{_BLOOM}self_attention.query_key_value", HeadByHead(), HeadByHead()),
        *pairs(f"{OURS}attention.o_proj", f"{_BLOOM}self_attention.dense"),
        *pairs(f"{OURS}mlp_norm", f"{_BLOOM}post_attention_layernorm"),
        *pairs(f"{OURS}mlp.up_proj", f"{_BLOOM}mlp.dense_h_to_4h"),
        *pairs(f"{OURS}mlp.down_proj", f"{_BLOOM}mlp.dense_4h_to_h"),
        *final_norm("transformer.ln_f"),
        _HEAD,
    ),
    keys=(
        MappedKey("vocab_size", "vocab_size"),
        # The published files have the old names.
        MappedKey("hidden_size", "hidden_size", also=("n_embed",)),
        MappedKey("n_layer", "num_layers", also=("num_hidden_layers",)),
        MappedKey("n_head", ("num_heads", "num_kv_heads"), also=("num_attention_heads",)),
        four_times("hidden_size", also="n_embed"),
        MappedKey("layer_norm_epsilon", "norm.eps", absent=1e-5, number=float),
        MappedKey("apply_residual_connection_post_layernorm", "residual.from_norm", absent=False),
        MappedKey("initializer_range", "init_std", absent=0.02, number=float),
        MappedKey("tie_word_embeddings", "tie_embeddings", absent=True),
        Custom(_read_exactness, lambda config: {"slow_but_exact": False}),
        USE_CACHE,
    ),
    fixed={**LAYER_NORM, **BIASES, "norm.embedding": True, "position.kind": "alibi", "mlp.kind": "gelu_tanh"},
    kept_keys=("attention_dropout", "hidden_dropout", "pretraining_tp"),
    prefix="transformer.",
    positions=("seq_length", 2048),
)

# OPT comes before GPT-2, which can express it too, with ReLU.
FAMILIES = (OPT, GPT2, GPT1, GPT_NEOX, BLOOM)
