"""Models that between them have every value of every key of a decoder's parts, and layouts that each of them runs.

Sizes of a model differ from each other, so that no dimension can be taken for another. Sequences have 24 tokens in
documents of uneven lengths, and windows, chunks and scaled positions are shorter.
"""

from typing import Any

SIZES: dict[str, Any] = {"num_layers": 2, "hidden_size": 40, "ffn_hidden_size": 44, "num_heads": 8, "init_std": 0.1}

PART_MODELS: dict[str, dict[str, Any]] = {
    # GPT-2: learned positions, LayerNorm, biases, a tied head; tp divides no vocabulary of 61.
    "learned": {
        **SIZES,
        "vocab_size": 61,
        "num_kv_heads": 8,
        "tie_embeddings": True,
        "attention": {"qkv_bias": True, "output_bias": True, "scale_by_layer": True},
        "position": {"kind": "learned", "max_positions": 27},
        "norm": {"kind": "layer"},
        "mlp": {"kind": "gelu_tanh", "bias": True},
    },
    # BLOOM: slopes of 12 heads, a norm of the embedding, residual connections from norms.
    "alibi": {
        **SIZES,
        "vocab_size": 64,
        "hidden_size": 48,
        "num_heads": 12,
        "num_kv_heads": 2,
        "attention": {"qkv_bias": True, "qk_norm": "head"},
        "position": {"kind": "alibi"},
        "norm": {"kind": "layer", "embedding": True},
        "residual": {"from_norm": True},
        "mlp": {"kind": "gelu", "bias": True},
        "head": {"normalized": True},
    },
    # Gemma 2 and 3: caps, windows in most layers, other wavelengths in the rest, norms on both sides.
    "capped": {
        **SIZES,
        "num_layers": 4,
        "vocab_size": 61,
        "head_dim": 6,
        "num_kv_heads": 1,
        "tie_embeddings": True,
        "scale_embedding": True,
        "attention": {"qk_norm": "head", "scale": 0.6, "softcap": 2.0},
        "position": {"scaling": {"kind": "linear", "factor": 2.0}},
        "norm": {"kind": "rms_plus_one"},
        "residual": {"kind": "sandwich"},
        "mlp": {"kind": "geglu_tanh"},
        "head": {"softcap": 3.0},
        "layer_pattern": ["local", "local", "wide"],
        "kinds": {"local": {"pattern": "sliding", "window": 5, "theta": 100.0, "scaled": False}, "wide": {}},
    },
    # OLMo 2: norms of outputs, and of all heads' queries and keys at once, where ranks share key-value heads.
    "outputs": {
        **SIZES,
        "vocab_size": 64,
        "num_kv_heads": 2,
        "head_dim": 6,
        "attention": {"qkv_bias": True, "qk_norm": "projection"},
        "position": {
            "scaling": {
                "kind": "llama3",
                "factor": 4.0,
                "original_length": 16,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            }
        },
        "residual": {"kind": "outputs"},
        "mlp": {"kind": "geglu"},
    },
    # gpt-oss: sinks, and experts with biases behind a router with one.
    "sinks": {
        **SIZES,
        "vocab_size": 64,
        "num_kv_heads": 4,
        "head_dim": 6,
        "attention": {"qkv_bias": True, "output_bias": True, "sinks": True, "window": 7},
        "position": {"scaling": {"kind": "yarn", "factor": 4.0, "original_length": 8, "truncate": False}},
        "mlp": {"kind": "clamped_swiglu", "bias": True},
        "moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 28, "router_bias": True, "aux_loss_coef": 0.5},
        "layer_pattern": ["local", "wide"],
        "kinds": {"local": {"pattern": "sliding"}, "wide": {}},
    },
    # Llama 4: chunks, layers without positions whose queries grow, one expert a token, in every other layer.
    "chunked": {
        **SIZES,
        "num_layers": 4,
        "vocab_size": 64,
        "num_kv_heads": 4,
        "head_dim": 6,
        "attention": {"qk_norm": "unweighted", "temperature": {"scale": 0.3, "floor": 3}},
        "position": {"layout": "pairs"},
        "moe": {
            "num_experts": 4,
            "top_k": 1,
            "num_shared_experts": 1,
            "shared_ffn_hidden_size": 28,
            "gating": "sigmoid",
            "renormalize": False,
            "weigh": "input",
            "every": 2,
            "first_layer": 1,
            "aux_loss_coef": 0.5,
        },
        "layer_pattern": ["local", "local", "wide"],
        "kinds": {
            "local": {"pattern": "chunked", "window": 5, "temperature": False},
            "wide": {"position": "none", "qk_norm": False},
        },
    },
    # DeepSeek-V2: latent attention with latent queries, and a gate on shared experts.
    "latent": {
        **SIZES,
        "vocab_size": 64,
        "num_kv_heads": 8,
        "attention": {
            "latent": {"q_rank": 14, "kv_rank": 10, "nope_head_dim": 6, "rope_head_dim": 4, "v_head_dim": 7},
            "output_bias": True,
        },
        "position": {
            "layout": "pairs",
            "scaling": {
                "kind": "yarn",
                "factor": 4.0,
                "original_length": 8,
                "mscale": 1.0,
                "mscale_all_dim": 0.7,
            },
        },
        "moe": {
            "num_experts": 6,
            "top_k": 2,
            "ffn_hidden_size": 12,
            "num_shared_experts": 2,
            "shared_gate": True,
            "dense_layers": [0],
            "aux_loss_coef": 0.5,
        },
    },
    # Qwen3-Next: gated delta nets whose value heads share keys, beside attention with an output gate. Outputs of heads
    # are normed, and are nearly nothing where a query is nearly orthogonal to all keys; with an epsilon of 1e-5 that
    # makes rounding large, and gradients in fp32 differ from those in fp64 by 5e-5.
    "delta": {
        **SIZES,
        "num_layers": 4,
        "vocab_size": 61,
        "num_kv_heads": 2,
        "head_dim": 6,
        "attention": {
            "qkv_bias": True,
            "qk_norm": "head",
            "output_gate": True,
            "delta": {"num_key_heads": 4, "num_value_heads": 12, "key_head_dim": 6, "value_head_dim": 5},
        },
        "position": {"fraction": 2 / 3},
        "norm": {"kind": "rms_plus_one", "eps": 0.01},
        "moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 28, "aux_loss_coef": 0.5},
        "layer_pattern": ["linear", "full", "linear"],
        "kinds": {"linear": {}, "full": {"delta": False}},
    },
    # Latent attention without latent queries, in blocks that compute attention and MLP at once.
    "side_by_side": {
        **SIZES,
        "vocab_size": 61,
        "num_kv_heads": 8,
        "attention": {"latent": {"kv_rank": 10, "nope_head_dim": 4, "rope_head_dim": 6, "v_head_dim": 9}},
        "position": {
            "scaling": {
                "kind": "longrope",
                "factor": 2.0,
                "original_length": 12,
                "short_factor": [1.0, 1.0, 1.5],
                "long_factor": [1.0, 2.0, 3.0],
            }
        },
        "residual": {"kind": "parallel"},
        "mlp": {"kind": "relu", "bias": True},
    },
    # GLM-130B: contexts seen both ways, DeepNorm, and rotation of a half of each head; no norm at the end, and rows of
    # the head of one length.
    "deepnorm": {
        **SIZES,
        "vocab_size": 61,
        "num_kv_heads": 1,
        "head_dim": 8,
        "tie_embeddings": True,
        "attention": {"qk_norm": "projection", "qkv_bias": True, "pattern": "prefix"},
        "position": {
            "fraction": 0.5,
            "layout": "pairs",
            "scaling": {"kind": "dynamic", "factor": 2.0, "original_length": 12},
        },
        "norm": {"kind": "layer", "final": False},
        "residual": {"kind": "deepnorm"},
        "mlp": {"kind": "gelu"},
        "head": {"normalized": True},
    },
    # DeepSeek-V3's multi-token prediction, twice: the last stage looks up tokens too.
    "ahead": {
        **SIZES,
        "vocab_size": 61,
        "num_kv_heads": 2,
        "head_dim": 6,
        "scale_embedding": True,
        "head": {"mtp_depth": 2, "mtp_weight": 2.0},
        "moe": {"num_experts": 4, "ffn_hidden_size": 28, "first_layer": 1, "bias_update_rate": 0.05},
    },
    # A reward model: three values of each token in place of logits.
    "scalar": {
        **SIZES,
        "vocab_size": 61,
        "num_kv_heads": 2,
        "head_dim": 6,
        "head": {"kind": "scalar", "outputs": 3},
    },
    # GPT-1's norms after each sum, without positions.
    "post": {
        **SIZES,
        "vocab_size": 61,
        "num_kv_heads": 2,
        "attention": {"sinks": True, "softcap": 3.0, "pattern": "chunked", "window": 9},
        "position": {"kind": "none"},
        "residual": {"kind": "post"},
        "scale_embedding": True,
    },
}
# `make test` runs these. A part is wrong where its weights are split or summed in a wrong way, which one of them shows.
PART_PAIRS = [
    ("learned", "tp2sp"),
    ("alibi", "tp2sp_cp2"),
    ("capped", "tp2sp_pp2vpp2"),
    ("outputs", "tp4sp"),
    ("sinks", "tp2sp_ep2"),
    ("chunked", "tp2_ep2"),
    ("latent", "tp2sp_cp2"),
    ("delta", "tp2sp_cp2"),
    ("side_by_side", "tp2sp"),
    ("deepnorm", "tp2sp_pp2vpp2"),
    ("post", "tp2sp"),
    ("scalar", "tp2sp_pp2vpp2"),
    ("ahead", "tp2sp_pp2vpp2"),
]
EVERYWHERE = (
    "tp2",
    "tp4",
    "tp2sp",
    "pp2",
    "pp2vpp2",
    "cp2",
    "tp2sp_cp2",
    "zero2",
    "zero3",
    "zero3_offload",
    "cp2zero3",
)
OF_EXPERTS = ("ep2", "tp2_ep2", "tp2sp_ep2", "ep2pp2", "cp2ep2", "ep2dp4_zero2")
MORE_PART_PAIRS = [
    (model, layout)
    for model, config in PART_MODELS.items()
    for layout in (*EVERYWHERE, *(OF_EXPERTS if "moe" in config else ()))
    if (model, layout) not in PART_PAIRS
]
