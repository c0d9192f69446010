"""Names and shapes of a decoder's tensors from its config alone, in the order embedding, layers, head.

Shape letters: V vocabulary, O outputs of a scalar head, P learned positions, H hidden, F inner size of an MLP or
expert, S of the shared experts, E experts, N query heads, D elements of a head, Q query heads x D, K key-value heads x
D. For gated delta nets: q key heads x elements of a key, v value heads x elements of a value, n value heads, d elements
of a value, w tokens of the convolution. For latent attention: A query rank, C key-value rank, R that and the rotated
elements, U query heads x (elements without position + those of a value), W query heads x the elements of a value.
"""

from collections.abc import Iterator

from configs.model import LayerConfig, ModelConfig
from configs.model_size import is_gated

Shape = tuple[int, ...]


def parameters(config: ModelConfig) -> dict[str, Shape]:
    """Returns the shape of every tensor of the model by name, with the bias that balances experts among them."""
    sizes = {
        "V": config.vocab_size,
        "H": config.hidden_size,
        "P": config.position.max_positions or 0,
        "O": config.head.outputs,
    }
    found = {"embedding.weight": "VH"}
    if config.position.kind == "learned":
        found["position_embedding.weight"] = "PH"
    if config.norm.embedding:
        found |= _norm("embedding_norm", config.norm.kind)
    result = _sized(found, sizes)
    for layer in config.layers:
        result |= {f"layers.{layer.index}.{name}": shape for name, shape in layer_parameters(layer).items()}
    for layer in config.mtp_layers:
        own = _sized(_module(layer), {"H": config.hidden_size, "2": 2 * config.hidden_size})
        result |= {f"layers.{layer.index}.{name}": shape for name, shape in (own | layer_parameters(layer)).items()}
    found = _norm("final_norm", config.norm.kind) if config.norm.final else {}
    if not config.has_logits:
        found["value_head.weight"] = "OH"
    elif not config.tie_embeddings:
        found["lm_head.weight"] = "VH"
    return result | _sized(found, sizes)


def layer_parameters(layer: LayerConfig) -> dict[str, Shape]:
    """Returns the shape of every tensor of one block by its name within the block."""
    outputs, inputs = layer.residual.kind in ("sandwich", "outputs"), layer.residual.kind != "outputs"
    found: dict[str, str] = {}
    if inputs:
        found |= _norm("attention_norm", layer.norm.kind)
    own = layer.attention
    found |= dict(_delta(layer) if own.delta else _latent(layer) if own.latent else _attention(layer))
    if outputs:
        found |= _norm("attention_output_norm", layer.norm.kind)
    if inputs:
        found |= _norm("mlp_norm", layer.norm.kind)
    found |= dict(_mixture(layer) if layer.moe else _mlp("mlp", layer, "F"))
    if outputs:
        found |= _norm("mlp_output_norm", layer.norm.kind)
    return _sized(found, _sizes(layer))


def _module(layer: LayerConfig) -> dict[str, str]:
    """Returns the shapes of the tensors that a module of multi-token prediction has beside its block."""
    norms = (_norm(f"{name}_norm", layer.norm.kind) for name in ("embedding", "hidden", "output"))
    return {name: shape for norm in norms for name, shape in norm.items()} | {"joint_proj.weight": "H2"}


def _sizes(layer: LayerConfig) -> dict[str, int]:
    heads, latent, delta = layer.num_heads, layer.attention.latent, layer.attention.delta
    sizes = {
        "H": layer.hidden_size,
        "F": layer.expert_size if layer.moe else layer.ffn_hidden_size,
        "S": layer.shared_size,
        "E": layer.moe.num_experts if layer.moe else 0,
        "N": heads,
        "D": layer.head_dim,
        "Q": heads * layer.head_dim,
        "K": layer.num_kv_heads * layer.head_dim,
        "1": 1,
    }
    if latent:
        sizes |= {
            "A": latent.q_rank or 0,
            "C": latent.kv_rank,
            "R": latent.kv_rank + latent.rope_head_dim,
            "U": heads * (latent.nope_head_dim + latent.v_head_dim),
            "W": heads * latent.v_head_dim,
        }
    if delta:
        sizes |= {
            "q": delta.num_key_heads * delta.key_head_dim,
            "v": delta.num_value_heads * delta.value_head_dim,
            "n": delta.num_value_heads,
            "d": delta.value_head_dim,
            "w": delta.kernel_size,
        }
    return sizes


def _sized(found: dict[str, str], sizes: dict[str, int]) -> dict[str, Shape]:
    return {name: tuple(sizes[letter] for letter in letters) for name, letters in found.items()}


def _norm(name: str, kind: str) -> dict[str, str]:
    return {f"{name}.weight": "H"} | ({f"{name}.bias": "H"} if kind == "layer" else {})


def _attention(layer: LayerConfig) -> Iterator[tuple[str, str]]:
    attention = layer.attention
    gate = [("output_gate", "Q")] if attention.output_gate else []
    for name, rows in [("q", "Q"), ("k", "K"), ("v", "K"), *gate]:
        yield f"attention.{name}_proj.weight", rows + "H"
        if attention.qkv_bias:
            yield f"attention.{name}_proj.bias", rows
    yield "attention.o_proj.weight", "HQ"
    if attention.output_bias:
        yield "attention.o_proj.bias", "H"
    if attention.qk_norm in ("head", "projection"):
        for name, rows in (("q", "Q"), ("k", "K")):
            yield f"attention.{name}_norm.weight", "D" if attention.qk_norm == "head" else rows
    if attention.sinks:
        yield "attention.sinks", "N"


def _latent(layer: LayerConfig) -> Iterator[tuple[str, str]]:
    latent = layer.attention.latent
    assert latent is not None
    if latent.q_rank:
        yield "attention.q_down_proj.weight", "AH"
        yield "attention.q_latent_norm.weight", "A"
        yield "attention.q_up_proj.weight", "QA"
    else:
        yield "attention.q_proj.weight", "QH"
    yield "attention.kv_down_proj.weight", "RH"
    yield "attention.kv_latent_norm.weight", "C"
    yield "attention.kv_up_proj.weight", "UC"
    yield "attention.o_proj.weight", "HW"
    if layer.attention.output_bias:
        yield "attention.o_proj.bias", "H"


def _delta(layer: LayerConfig) -> Iterator[tuple[str, str]]:
    for name in "qkv":
        yield f"attention.{name}_conv", ("v" if name == "v" else "q") + "w"
    yield "attention.log_rates", "n"
    yield "attention.decay_bias", "n"
    projections = (("q", "q"), ("k", "q"), ("v", "v"), ("beta", "n"), ("decay", "n"), ("output_gate", "v"))
    for name, rows in projections:
        yield f"attention.{name}_proj.weight", rows + "H"
    yield "attention.head_norm.weight", "d"
    yield "attention.o_proj.weight", "Hv"


def _mlp(prefix: str, layer: LayerConfig, size: str) -> Iterator[tuple[str, str]]:
    projections = [("gate", size + "H")] if is_gated(layer.mlp.kind) else []
    for name, shape in [*projections, ("up", size + "H"), ("down", "H" + size)]:
        yield f"{prefix}.{name}_proj.weight", shape
        if layer.mlp.bias:
            yield f"{prefix}.{name}_proj.bias", shape[0]


def _mixture(layer: LayerConfig) -> Iterator[tuple[str, str]]:
    moe = layer.moe
    assert moe is not None
    yield "moe.router.weight", "EH"
    if moe.router_bias:
        yield "moe.router.bias", "E"
    if moe.bias_update_rate:
        yield "moe.balance.bias", "E"
    projections = [("gate", "EFH")] if is_gated(layer.mlp.kind) else []
    for name, shape in [*projections, ("up", "EFH"), ("down", "EHF")]:
        yield f"moe.experts.{name}_proj", shape
        if layer.mlp.bias:
            yield f"moe.experts.{name}_bias", shape[:2]
    if layer.shared_size:
        yield from _mlp("moe.shared", layer, "S")
    if moe.shared_gate:
        yield "moe.shared_gate.weight", "1H"
