"""Baichuan 1 and 2 in plain torch, by the names of their files, as the published code and papers describe them."""

import math

import torch
import torch.nn.functional as F

Tensors = dict[str, torch.Tensor]
EPS = 1e-6


def logits(tensors: Tensors, heads: int, alibi: bool, normalized: bool, tokens: torch.Tensor) -> torch.Tensor:
    """Returns the logits [B, S, V] of whole rows."""
    count = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))
    x = tensors["model.embed_tokens.weight"][tokens]
    for layer in range(count):
        part = {name.removeprefix(f"model.layers.{layer}."): tensor for name, tensor in tensors.items()}
        x = x + _attention(part, _norm(x, part["input_layernorm.weight"]), heads, alibi)
        x = x + _mlp(part, _norm(x, part["post_attention_layernorm.weight"]))
    head = tensors["lm_head.weight"]
    if normalized:
        head = head / head.norm(dim=1, keepdim=True)
    return _norm(x, tensors["model.norm.weight"]) @ head.T


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def _mlp(part: Tensors, x: torch.Tensor) -> torch.Tensor:
    inner = F.silu(x @ part["mlp.gate_proj.weight"].T) * (x @ part["mlp.up_proj.weight"].T)
    return inner @ part["mlp.down_proj.weight"].T


def _attention(part: Tensors, x: torch.Tensor, heads: int, alibi: bool) -> torch.Tensor:
    length, hidden = x.shape[1:]
    packed = (x @ part["self_attn.W_pack.weight"].T).unflatten(-1, (3, heads, hidden // heads))
    q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))  # [B, N, S, D]
    if not alibi:
        q, k = _rotated(q), _rotated(k)
    scores = q @ k.transpose(2, 3) / math.sqrt(hidden // heads)
    if alibi:
        distance = torch.arange(length)[None] - torch.arange(length)[:, None]
        scores = scores + torch.tensor(_slopes(heads))[:, None, None] * distance
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ part["self_attn.o_proj.weight"].T


def _slopes(heads: int) -> list[float]:
    """Returns ALiBi's slopes by the recursion of its authors' code."""
    if (power := math.log2(heads)).is_integer():
        start = 2 ** (-(2 ** -(power - 3)))
        return [start ** (i + 1) for i in range(heads)]
    closest = 2 ** math.floor(power)
    return _slopes(closest) + _slopes(2 * closest)[0::2][: heads - closest]


def _rotated(x: torch.Tensor) -> torch.Tensor:
    length, size = x.shape[2:]
    angles = torch.arange(length)[:, None] / 10000.0 ** (torch.arange(0, size, 2) / size)
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
