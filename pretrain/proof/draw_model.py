"""Draws the model of a draw of `pretrain.proof.fuzz`: its sizes, and the kind of each of its parts.

Most draws have a few parts that differ from LLaMA's, so that a failure is easily shrunk, and all pairs of parts come.
"""

import random
from collections.abc import Iterator
from typing import Any


def draw_model(r: random.Random, seq_length: int) -> dict[str, Any]:
    """Returns the section [model]; not all that it draws is legal."""
    heads = r.choice((2, 3, 4, 6, 8))
    model: dict[str, Any] = {
        "vocab_size": r.choice((9, 13, 16, 31, 61, 64, 96)),  # padded where tp does not divide it
        "num_layers": r.choice((1, 2, 2, 3, 4, 5, 6)),
        "hidden_size": heads * r.choice((2, 4, 6, 8)),
        "ffn_hidden_size": r.choice((8, 12, 24, 48)),
        "num_heads": heads,
        "num_kv_heads": r.choice([kv for kv in range(1, heads + 1) if heads % kv == 0]),
        "tie_embeddings": r.random() < 0.4,
        "scale_embedding": r.random() < 0.2,
        "init_std": r.choice((0.02, 0.1)),
        "attention": _attention(r),
        "position": _position(r, seq_length),
        "norm": {
            "kind": r.choice(("rms", "rms", "rms_plus_one", "layer")),
            "eps": r.choice((1e-5, 1e-6)),
            "final": r.random() < 0.9,
            "embedding": r.random() < 0.15,
        },
    }
    if r.random() < 0.4:
        kinds = ("pre", "post", "sandwich", "outputs", "deepnorm", "parallel")
        model["residual"] = {"kind": r.choice(kinds), "from_norm": r.random() < 0.2}
    if r.random() < 0.4:
        mlps = ("swiglu", "geglu", "geglu_tanh", "clamped_swiglu", "gelu", "gelu_tanh", "relu")
        model["mlp"] = {"kind": r.choice(mlps), "bias": r.random() < 0.5}
    if r.random() < 0.3:
        model["head"] = {"softcap": r.choice((None, 2.0)), "normalized": r.random() < 0.5}
        if model["head"] == {"softcap": None, "normalized": False}:  # a head without logits in place of the plain one
            model["head"] = {"kind": "scalar", "outputs": r.choice((1, 3))}
            model["tie_embeddings"] = False
    if r.random() < 0.3:
        model["head_dim"] = r.choice((2, 4, 8))
    if r.random() < 0.15:
        _make_latent(r, model)
    elif r.random() < 0.3:
        _draw_kinds(r, model)
    if r.random() < 0.8:
        model["moe"] = _moe(r, model["num_layers"])
    _draw_later_parts(random.Random(repr(model)), model)
    return model


def _draw_later_parts(r: random.Random, model: dict[str, Any]) -> None:
    """Adds newer parts to a drawn model by their own generator, so that a seed keeps drawing the same older parts."""
    if r.random() < 0.25 and model.get("head", {}).get("kind") != "scalar":
        further = {"mtp_depth": r.choice((1, 1, 2)), "mtp_weight": r.choice((0.3, 1.0))}
        model["head"] = {**model.get("head", {}), **further}
    elif r.random() < 0.2:
        model["attention"]["pattern"] = "prefix"
    if r.random() < 0.2 and "latent" not in model["attention"]:
        model["attention"]["output_gate"] = True
    if r.random() < 0.25:
        _draw_delta(r, model)


def _attention(r: random.Random) -> dict[str, Any]:
    attention: dict[str, Any] = {
        "qk_norm": r.choice(("head", "head", "projection", "unweighted", "none", "none", "none", "none")),
        "pattern": r.choice(("causal", "causal", "causal", "sliding", "chunked")),
    }
    if attention["pattern"] != "causal":
        attention["window"] = r.choice((1, 3, 7))
    for key, value, share in (
        ("qkv_bias", True, 0.3),
        ("output_bias", True, 0.2),
        ("scale", 0.3, 0.2),
        ("scale_by_layer", True, 0.1),
        ("softcap", 1.0, 0.15),
        ("sinks", True, 0.2),
    ):
        if r.random() < share:
            attention[key] = value
    if r.random() < 0.15:
        attention["temperature"] = {"scale": r.choice((0.1, 0.5)), "floor": r.choice((2, 5))}
    return attention


def _position(r: random.Random, seq_length: int) -> dict[str, Any]:
    position: dict[str, Any] = {"kind": r.choice(("rotary",) * 7 + ("learned", "alibi", "none"))}
    if position["kind"] == "learned":
        position["max_positions"] = seq_length + r.choice((0, 5))
    if position["kind"] != "rotary":
        return position
    position |= {"theta": r.choice((10000.0, 100.0)), "layout": r.choice(("halves", "halves", "pairs"))}
    if r.random() < 0.2:
        position["fraction"] = 0.5
    if r.random() < 0.3:
        position["scaling"] = _scaling(r)
    return position


def _scaling(r: random.Random) -> dict[str, Any]:
    kind = r.choice(("linear", "dynamic", "llama3", "yarn", "longrope"))
    scaling: dict[str, Any] = {"kind": kind, "factor": r.choice((2.0, 4.0))}
    if kind != "linear":
        scaling["original_length"] = r.choice((4, 8, 16))
    if kind == "llama3":
        scaling |= {"low_freq_factor": r.choice((0.5, 1.0)), "high_freq_factor": r.choice((2.0, 4.0))}
    if kind == "yarn":
        scaling |= {
            "beta_fast": r.choice((None, 8.0)),
            "beta_slow": r.choice((None, 0.5)),
            "truncate": r.random() < 0.5,
        }
        scaling |= r.choice(({}, {"mscale": 1.0, "mscale_all_dim": 0.7}))
    if kind in ("yarn", "longrope"):
        scaling["attention_factor"] = r.choice((None, 1.2))
    if kind == "longrope":  # a number for each of the few frequencies of a tiny head; others are refused
        size = r.choice((1, 2, 2, 4))
        scaling |= {"short_factor": [1.0, 1.5, 1.5, 2.0][:size], "long_factor": [1.0, 2.0, 3.0, 4.0][:size]}
    return scaling


def _make_latent(r: random.Random, model: dict[str, Any]) -> None:
    """Gives a model latent attention, and removes the keys that latent attention does not have."""
    model["num_kv_heads"] = model["num_heads"]
    model.pop("head_dim", None)
    attention = model["attention"]
    for key in ("qkv_bias", "qk_norm", "sinks", "temperature"):
        attention.pop(key, None)
    attention["latent"] = {
        "q_rank": r.choice((None, 6)),
        "kv_rank": r.choice((4, 7)),
        "nope_head_dim": r.choice((2, 4, 5)),
        "rope_head_dim": r.choice((2, 4)),
        "v_head_dim": r.choice((3, 4)),
        "norm_eps": r.choice((1e-5, 1e-6)),
    }
    if model["position"]["kind"] != "rotary":
        model["position"] = {}
    model["position"].pop("fraction", None)


def _draw_kinds(r: random.Random, model: dict[str, Any]) -> None:
    kinds: dict[str, Any] = {
        "near": {"pattern": r.choice(("sliding", "chunked")), "window": r.choice((2, 5)), "temperature": False},
        "wide": {"pattern": "causal", "qk_norm": r.random() < 0.5},
    }
    if model["position"]["kind"] == "rotary":
        kinds["near"] |= {"theta": r.choice((100.0, 1000.0)), "scaled": r.random() < 0.5}
        kinds["wide"]["position"] = r.choice(("rotary", "none"))
    pattern = r.choice((["near", "wide"], ["wide", "near"], ["near", "near", "wide"]))
    if len(pattern) <= model["num_layers"]:
        model |= {"layer_pattern": pattern, "kinds": kinds}


def _moe(r: random.Random, num_layers: int) -> dict[str, Any]:
    experts = r.choice((2, 3, 4, 6, 8))
    groups = r.choice([n for n in range(1, experts + 1) if experts % n == 0])
    moe: dict[str, Any] = {
        "num_experts": experts,
        "top_k": r.randint(1, min(4, experts)),
        "num_shared_experts": r.choice((0, 0, 1, 2)),
        "gating": r.choice(("softmax", "sigmoid")),
        "renormalize": r.random() < 0.5,
        "routed_scaling": r.choice((1.0, 2.5)),
        "num_groups": groups,
        "top_groups": r.randint(1, groups),
        "group_score": r.choice(("max", "top2")),
        "aux_loss": r.choice(("sequence", "micro_batch", "global_batch")),
        "aux_loss_coef": r.choice((0.0, 0.01, 0.5)),
        "z_loss_coef": r.choice((0.0, 0.1)),
        "bias_update_rate": r.choice((0.0, 0.05)),
    }
    if r.random() < 0.5:
        moe["ffn_hidden_size"] = r.choice((8, 12, 22))
    if r.random() < 0.25:
        moe["capacity_factor"] = r.choice((0.5, 1.0, 1.5))
    if r.random() < 0.3:
        moe["router_bias"] = True
    if moe["top_k"] == 1 and r.random() < 0.5:
        moe["weigh"] = "input"
    if moe["num_shared_experts"]:
        moe |= {"shared_gate": r.random() < 0.4} | r.choice(({}, {"shared_ffn_hidden_size": r.choice((8, 16))}))
    if num_layers > 1 and r.random() < 0.3:
        moe |= r.choice(({"first_layer": 1}, {"every": 2}, {"dense_layers": [r.randrange(num_layers)]}))
    return moe


def _draw_delta(r: random.Random, model: dict[str, Any]) -> None:
    """Gives a model gated delta nets, in all layers, or in those of one kind."""
    heads = r.choice((1, 2, 2, 4, 4, 6))
    model["attention"]["delta"] = {
        "num_key_heads": heads,
        "num_value_heads": heads * r.choice((1, 2, 3)),
        "key_head_dim": r.choice((2, 3, 6)),
        "value_head_dim": r.choice((2, 5)),
        "kernel_size": r.choice((2, 4)),
    }
    if "kinds" in model:
        kept = r.choice(sorted(model["kinds"]))
        model["kinds"] = {**model["kinds"], kept: {**model["kinds"][kept], "delta": False}}
    elif model["num_layers"] > 1 and r.random() < 0.8:
        pattern = r.choice((["linear", "full"], ["full", "linear"]))
        model |= {"layer_pattern": pattern, "kinds": {"linear": {}, "full": {"delta": False}}}


SECTIONS = ("attention", "position", "norm", "residual", "mlp", "head")


def simpler_models(model: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields models that are simpler by one thing each: a section, a key of one, or a whole feature."""
    for name in ("moe", "head_dim", "tie_embeddings", "scale_embedding", *SECTIONS):
        yield _without(model, name)
    yield _without(_without(model, "layer_pattern"), "kinds")
    for name in SECTIONS:
        for key in model.get(name, {}):
            yield {**model, name: _without(model[name], key)}
    moe = model.get("moe", {})
    for key in moe:
        if key not in ("num_experts", "top_k"):
            yield {**model, "moe": _without(moe, key)}
    if moe:
        yield {**model, "moe": {**moe, "top_k": 1}}
        yield {**model, "moe": {**moe, "num_experts": 2}}


def _without(section: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key != name}
