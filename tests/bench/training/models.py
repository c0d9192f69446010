"""The shapes that are trained, their batches, and the peers' models with Trivium's initial weights.

Every contender of a contest has the same weights, tokens, labels and optimizer, so their first losses must agree.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from configs.loader import validate
from configs.model import ModelConfig
from data_pipeline.mixture.rows import Row
from pretrain.model import Decoder, init_weights

SEED = 11
LR, BETAS, EPS, WEIGHT_DECAY, CLIP = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
NO_LABEL = -100  # what both peers' losses leave out


@dataclass(frozen=True)
class Size:
    """A model and its batch of `rows` rows of `length` tokens."""

    model: dict[str, Any]
    rows: int
    length: int

    @property
    def config(self) -> ModelConfig:
        return validate(ModelConfig, self.model)


def _dense(vocab_size: int, layers: int, hidden: int, ffn: int, heads: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_heads": heads,
        "num_kv_heads": heads,
    }


def _mixture(dense: dict[str, Any], layers: int) -> dict[str, Any]:
    """Makes a mixture of eight experts of half the size; neither side adds an auxiliary loss."""
    moe = {"num_experts": 8, "top_k": 2, "ffn_hidden_size": dense["ffn_hidden_size"] // 2, "aux_loss_coef": 0.0}
    return {**dense, "num_layers": layers, "moe": moe}


_34M = _dense(8192, 8, 512, 1408, 8)
_5M = _dense(4096, 4, 256, 704, 4)
SIZES = {
    "34M": Size(_34M, 8, 512),
    "120M": Size(_dense(24576, 12, 768, 2048, 12), 2, 512),
    "MoE": Size(_mixture(_34M, 4), 4, 512),
    # As many tokens a step to a parameter as in the others, since what a step costs whatever its batch would show.
    "5M": Size(_5M, 2, 512),
    "small MoE": Size(_mixture(_5M, 2), 2, 512),
    "34M, 8k": Size(_34M, 1, 8192),
}


def rows(size: Size, documents: int) -> list[Row]:
    """Draws the rows of one step, each packed with `documents` documents of equal length."""
    draw, made = np.random.default_rng(SEED), []
    length = size.length // documents
    segments = np.arange(size.length) // length
    positions = np.arange(size.length) % length
    mask = positions < length - 1
    for _ in range(size.rows):
        tokens = draw.integers(0, size.config.vocab_size, size.length)
        labels = np.where(mask, np.roll(tokens, -1), 0)
        made.append(Row(tokens, labels, mask, positions, segments, source=0))
    return made


def weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Draws Trivium's initial weights, by global name."""
    decoder = Decoder(config)
    init_weights(decoder, SEED)
    return {name: parameter.detach() for name, parameter in decoder.named_global_parameters()}


class PlainBlock(nn.Module):
    """One layer as a user would write it in PyTorch: the projections of attention and those of SwiGLU are joined."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden, ffn = config.hidden_size, config.ffn_hidden_size
        self.heads, self.eps = config.num_heads, config.norm.eps
        self.attention_norm, self.mlp_norm = nn.RMSNorm(hidden, config.norm.eps), nn.RMSNorm(hidden, config.norm.eps)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.gate_up, self.down = nn.Linear(hidden, 2 * ffn, bias=False), nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = _rotated(qkv[0], cos, sin), _rotated(qkv[1], cos, sin), qkv[2]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Plain(nn.Module):
    """A LLaMA in plain PyTorch; `forward` gives the loss, so that compiling it compiles the loss too."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm.eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @classmethod
    def build(cls, config: ModelConfig) -> "Plain":
        model, drawn = cls(config), weights(config)
        with torch.no_grad():
            model.embedding.weight.copy_(drawn["embedding.weight"])
            model.head.weight.copy_(drawn["lm_head.weight"])
            for i, block in enumerate(model.blocks):
                joined = {"attention": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
                parts = {
                    part: torch.cat([drawn[f"layers.{i}.{part}.{name}.weight"] for name in names])
                    for part, names in joined.items()
                }
                block.qkv.weight.copy_(parts["attention"])
                block.gate_up.weight.copy_(parts["mlp"])
                block.out.weight.copy_(drawn[f"layers.{i}.attention.o_proj.weight"])
                block.down.weight.copy_(drawn[f"layers.{i}.mlp.down_proj.weight"])
        return model

    def forward(
        self, tokens: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        dim = self.config.dim_per_head
        frequencies = self.config.position.theta ** (-torch.arange(0, dim, 2, device=tokens.device) / dim)
        angles = positions[:, None, :, None].float() * frequencies
        x = self.embedding(tokens)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin, mask)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL)


def transformers_model(config: ModelConfig, length: int) -> nn.Module:
    """Builds transformers' LlamaForCausalLM or MixtralForCausalLM with Trivium's weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from export.hf_config import to_hf_config

    theirs = to_hf_config(config, length, "float32", 0, 1, None)
    theirs = AutoConfig.for_model(theirs.pop("model_type"), **{**theirs, "use_cache": False})
    model = AutoModelForCausalLM.from_config(theirs, attn_implementation="sdpa", dtype=torch.float32)
    names = {name: _their_name(name) for name in weights(config)}
    drawn, state = weights(config), {}
    for name, tensor in drawn.items():
        if name.endswith("experts.up_proj"):
            continue  # it goes with gate_proj
        if name.endswith("experts.gate_proj"):
            tensor = torch.cat((tensor, drawn[name.replace("gate_proj", "up_proj")]), 1)
        state[names[name]] = tensor
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing and not unexpected, f"weights of another shape: {missing}, {unexpected}"
    return model


def _their_name(name: str) -> str:
    """Translates a name of Trivium's to transformers' in memory, where a layer's experts are joined."""
    for ours, theirs in (
        ("embedding.", "embed_tokens."),
        ("attention_norm", "input_layernorm"),
        ("mlp_norm", "post_attention_layernorm"),
        ("attention.", "self_attn."),
        ("final_norm", "norm"),
        ("moe.router", "mlp.gate"),
        ("moe.experts.gate_proj", "mlp.experts.gate_up_proj"),
        ("moe.experts.down_proj", "mlp.experts.down_proj"),
    ):
        name = name.replace(ours, theirs)
    return name if name.startswith("lm_head") else f"model.{name}"
