"""Names of Trivium's parameters and of their Hugging Face counterparts, as one table for export and import.

Dense models are LlamaForCausalLM, mixtures of experts MixtralForCausalLM. The names are those of the files on
disk; transformers fuses Mixtral's experts in memory when it loads them. No tensor is transposed or permuted:
both sides keep linear weights as [out, in] and rotate half the head dimension (RoPE as in transformers'
LLaMA). Shape letters: V vocabulary, H hidden, F ffn hidden, Q query heads x head dim, K key-value heads x
head dim, E experts.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from configs.model import ModelConfig


@dataclass(frozen=True)
class TensorRule:
    """Name of a Trivium tensor (`ours`) and in the file (`theirs`); with `{expert}`, ours stacks theirs by expert."""

    ours: str
    theirs: str
    shape: str


@dataclass(frozen=True)
class Family:
    """A transformers architecture, and the names of Trivium's parameters in its checkpoints."""

    architecture: str
    model_type: str
    rules: tuple[TensorRule, ...]


_EMBEDDING = TensorRule("embedding.weight", "model.embed_tokens.weight", "VH")
_HEAD = TensorRule("lm_head.weight", "lm_head.weight", "VH")
_FINAL_NORM = TensorRule("final_norm.weight", "model.norm.weight", "H")
_ATTENTION = (
    TensorRule("layers.{layer}.attention_norm.weight", "model.layers.{layer}.input_layernorm.weight", "H"),
    TensorRule("layers.{layer}.attention.q_proj.weight", "model.layers.{layer}.self_attn.q_proj.weight", "QH"),
    TensorRule("layers.{layer}.attention.k_proj.weight", "model.layers.{layer}.self_attn.k_proj.weight", "KH"),
    TensorRule("layers.{layer}.attention.v_proj.weight", "model.layers.{layer}.self_attn.v_proj.weight", "KH"),
    TensorRule("layers.{layer}.attention.o_proj.weight", "model.layers.{layer}.self_attn.o_proj.weight", "HQ"),
    TensorRule("layers.{layer}.mlp_norm.weight", "model.layers.{layer}.post_attention_layernorm.weight", "H"),
)
_MLP = (
    TensorRule("layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.gate_proj.weight", "FH"),
    TensorRule("layers.{layer}.mlp.up_proj.weight", "model.layers.{layer}.mlp.up_proj.weight", "FH"),
    TensorRule("layers.{layer}.mlp.down_proj.weight", "model.layers.{layer}.mlp.down_proj.weight", "HF"),
)
_SPARSE = "model.layers.{layer}.block_sparse_moe"
_MOE = (
    TensorRule("layers.{layer}.moe.router.weight", _SPARSE + ".gate.weight", "EH"),
    TensorRule("layers.{layer}.moe.experts.gate_proj", _SPARSE + ".experts.{expert}.w1.weight", "EFH"),
    TensorRule("layers.{layer}.moe.experts.up_proj", _SPARSE + ".experts.{expert}.w3.weight", "EFH"),
    TensorRule("layers.{layer}.moe.experts.down_proj", _SPARSE + ".experts.{expert}.w2.weight", "EHF"),
)

LLAMA = Family("LlamaForCausalLM", "llama", (_EMBEDDING, *_ATTENTION, *_MLP, _FINAL_NORM, _HEAD))
MIXTRAL = Family("MixtralForCausalLM", "mixtral", (_EMBEDDING, *_ATTENTION, *_MOE, _FINAL_NORM, _HEAD))
FAMILIES = (LLAMA, MIXTRAL)


@dataclass(frozen=True)
class Entry:
    """A `TensorRule` applied to one layer: Trivium's name and shape, and the file's names, one for each expert."""

    ours: str
    shape: tuple[int, ...]
    theirs: tuple[str, ...]
    stacked: bool

    @property
    def their_shape(self) -> tuple[int, ...]:
        """Shape of each tensor in the file."""
        return self.shape[1:] if self.stacked else self.shape


# Settings of [model.moe] that Mixtral's router implements; with others the exported model would differ.
_MIXTRAL_ROUTER = {
    "num_shared_experts": 0,
    "gating": "softmax",
    "renormalize": True,
    "routed_scaling": 1.0,
    "num_groups": 1,
    "bias_update_rate": 0.0,
}


def family_of(config: ModelConfig) -> Family:
    """Returns the family of a model. Raises ValueError naming a config key that the family cannot express."""
    family = MIXTRAL if config.moe else LLAMA
    keys: list[tuple[str, Any, Any]] = [("attention.qk_norm", config.attention.qk_norm, "none")]
    if config.moe:
        keys += [(f"moe.{name}", getattr(config.moe, name), only) for name, only in _MIXTRAL_ROUTER.items()]
    for key, ours, theirs in keys:
        if ours != theirs:
            raise ValueError(
                f"model.{key} = {ours!r} cannot be exported: {family.architecture}, the Hugging Face architecture "
                f"that is written, has {theirs!r}; train the model with that value to export it"
            )
    return family


def entries(config: ModelConfig) -> list[Entry]:
    """Returns an entry for every parameter of the model, from the embedding to the output head."""
    sizes = {
        "V": config.vocab_size,
        "H": config.hidden_size,
        "F": config.expert_size,
        "Q": config.num_heads * config.dim_per_head,
        "K": config.num_kv_heads * config.dim_per_head,
        "E": config.moe.num_experts if config.moe else 0,
    }
    rules = family_of(config).rules
    before = [rule for rule in rules if rule is _EMBEDDING]
    after = [rule for rule in rules if rule is _FINAL_NORM or (rule is _HEAD and not config.tie_embeddings)]
    per_layer = [rule for rule in rules if "{layer}" in rule.ours]

    def apply(rule: TensorRule, layer: int | None = None) -> Entry:
        stacked = "{expert}" in rule.theirs
        experts = range(sizes["E"] if stacked else 1)
        return Entry(
            ours=rule.ours.format(layer=layer),
            shape=tuple(sizes[letter] for letter in rule.shape),
            theirs=tuple(rule.theirs.format(layer=layer, expert=expert) for expert in experts),
            stacked=stacked,
        )

    layers = [apply(rule, layer) for layer in range(config.num_layers) for rule in per_layer]
    return [*map(apply, before), *layers, *map(apply, after)]


def check_weights(weights: dict[str, torch.Tensor], config: ModelConfig) -> None:
    """Raises ValueError naming the first tensor that is missing, unknown or of a wrong shape."""
    expected = {entry.ours: entry.shape for entry in entries(config)}
    for name, shape in expected.items():
        if name not in weights:
            raise ValueError(f"tensor {name} is missing from the weights, but the model config has it")
        if tuple(weights[name].shape) != shape:
            raise ValueError(f"tensor {name} has shape {tuple(weights[name].shape)}, but {shape} by the model config")
    for name in weights:
        if name not in expected:
            raise ValueError(f"tensor {name} is in the weights but not in the model that the config describes")


def to_hf(weights: dict[str, torch.Tensor], config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name in the file, tensor) for every tensor of the Hugging Face checkpoint, as views of `weights`."""
    check_weights(weights, config)
    for entry in entries(config):
        tensor = weights[entry.ours]
        yield from zip(entry.theirs, tensor if entry.stacked else [tensor], strict=True)


def from_hf(
    read: Callable[[str], torch.Tensor], names: Iterable[str], config: ModelConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (Trivium's name, tensor) for every parameter.

    `read` returns one tensor of the checkpoint by name, and `names` are all of them. Raises ValueError naming a tensor
    that is missing, has a wrong shape or is not part of the family.
    """
    names, used = set(names), set()
    for entry in entries(config):
        parts = []
        for name in entry.theirs:
            if name not in names:
                raise ValueError(f"tensor {name} is missing from the checkpoint, but config.json has it")
            part = read(name)
            if tuple(part.shape) != entry.their_shape:
                raise ValueError(f"tensor {name} has shape {tuple(part.shape)}, but {entry.their_shape} by config.json")
            used.add(name)
            parts.append(part)
        yield entry.ours, torch.stack(parts) if entry.stacked else parts[0]
    # transformers before 4.31 stored the rotary frequencies, which follow from rope_theta.
    left = sorted(name for name in names - used if not name.endswith("rotary_emb.inv_freq"))
    if config.tie_embeddings and _HEAD.theirs in left:
        if not torch.equal(read(_HEAD.theirs), read(_EMBEDDING.theirs)):
            raise ValueError(
                f"tie_word_embeddings = true, but {_HEAD.theirs} differs from {_EMBEDDING.theirs}; "
                "set tie_word_embeddings = false in config.json if the head is its own"
            )
        left.remove(_HEAD.theirs)
    if left:
        raise ValueError(
            f"tensor {left[0]} and {len(left) - 1} others are not part of {family_of(config).architecture}"
        )
