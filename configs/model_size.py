"""Counts the parameters of a decoder from its config."""

from configs.model import LayerConfig, ModelConfig


def num_parameters(model: ModelConfig, active: bool = False) -> int:
    """Number of parameters; with `active`, only those that one token uses when the model writes.

    The whole embedding is among them, and modules of multi-token prediction are not.
    """
    width, norm = model.hidden_size, norm_size(model.norm.kind, model.hidden_size)
    embeddings = (model.vocab_size + (0 if model.tie_embeddings else model.head_size)) * width
    positions = (model.position.max_positions or 0) * width
    norms = norm * (model.norm.final + model.norm.embedding)
    layers = sum(layer_parameters(layer, active) for layer in model.layers)
    return embeddings + positions + norms + layers + (0 if active else mtp_parameters(model))


def mtp_parameters(model: ModelConfig, active: bool = False) -> int:
    """Number of parameters of the modules of multi-token prediction; with `active`, those that one token trains."""
    joint = 2 * model.hidden_size**2 + 3 * norm_size(model.norm.kind, model.hidden_size)
    return sum(layer_parameters(layer, active) + joint for layer in model.mtp_layers)


def mean_layer_parameters(model: ModelConfig, active: bool = False) -> float:
    """Number of parameters of one block, the mean of all; with `active`, only those that one token uses."""
    return sum(layer_parameters(layer, active) for layer in model.layers) / model.num_layers


def layer_parameters(layer: LayerConfig, active: bool = False) -> int:
    """Number of parameters of one block; with `active`, only those of the experts that one token uses."""
    norms = 4 if layer.residual.kind == "sandwich" else 2
    mlp = _mixture(layer, active) if layer.moe else mlp_parameters(layer, layer.ffn_hidden_size)
    return _attention(layer) + mlp + norms * norm_size(layer.norm.kind, layer.hidden_size)


def mlp_parameters(layer: LayerConfig, ffn_hidden_size: int) -> int:
    """Number of parameters of one MLP of this inner size."""
    inner = 1 + is_gated(layer.mlp.kind)
    biases = inner * ffn_hidden_size + layer.hidden_size if layer.mlp.bias else 0
    return (inner + 1) * layer.hidden_size * ffn_hidden_size + biases


def is_gated(kind: str) -> bool:
    """Whether an MLP of this kind has a gate beside its up projection."""
    return "glu" in kind


def norm_size(kind: str, width: int) -> int:
    """Number of parameters of a norm of vectors of this width."""
    return width * (2 if kind == "layer" else 1)


def _mixture(layer: LayerConfig, active: bool) -> int:
    moe = layer.moe
    assert moe is not None
    experts = (moe.top_k if active else moe.num_experts) * mlp_parameters(layer, layer.expert_size)
    router = moe.num_experts * (layer.hidden_size + moe.router_bias)
    shared = mlp_parameters(layer, layer.shared_size) if layer.shared_size else 0
    return experts + router + shared + layer.hidden_size * moe.shared_gate


def _attention(layer: LayerConfig) -> int:
    attention, width = layer.attention, layer.hidden_size
    if delta := attention.delta:
        keys, values = delta.num_key_heads * delta.key_head_dim, delta.num_value_heads * delta.value_head_dim
        convolution = delta.kernel_size * (2 * keys + values)
        # Projections to queries, keys, values, their gate and to two numbers a head; the output; decay and norm.
        projections = width * (2 * keys + 3 * values + 2 * delta.num_value_heads)
        return projections + convolution + 2 * delta.num_value_heads + delta.value_head_dim
    if latent := attention.latent:
        queries = layer.num_heads * layer.head_dim
        from_hidden = latent.q_rank * (width + queries + 1) if latent.q_rank else width * queries
        keys_values = latent.kv_rank * (layer.num_heads * (latent.nope_head_dim + latent.v_head_dim) + 1)
        down = width * (latent.kv_rank + latent.rope_head_dim)
        output = layer.num_heads * latent.v_head_dim * width
        return from_hidden + down + keys_values + output + width * attention.output_bias
    queries, keys = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    head_norm = norm_size(layer.norm.kind, layer.head_dim)
    norms = {"head": 2 * head_norm, "projection": queries + keys}.get(attention.qk_norm, 0)
    gate = queries * attention.output_gate
    biases = (queries + 2 * keys + gate) * attention.qkv_bias + width * attention.output_bias
    return width * (2 * queries + 2 * keys + gate) + norms + biases + layer.num_heads * attention.sinks
