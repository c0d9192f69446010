"""GPT-3 and GLM-130B, for which transformers has no class, against plain torch as their papers describe them.

The parts are those of the presets, and only sizes are small. Names of weights are Trivium's, since no files exist in
the format of Hugging Face. Baichuan and Qwen, whose files exist, are in tests/unit/export/conversion.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from configs import presets
from configs.loader import validate
from configs.model import ModelConfig
from pretrain.model import Decoder
from pretrain.model.context import ForwardContext

SIZES = {"vocab_size": 61, "num_layers": 4, "hidden_size": 30, "ffn_hidden_size": 46, "num_heads": 5, "num_kv_heads": 5}
HEADS, LENGTH, CONTEXT, BAND = 5, 23, 9, 4
Tensors = dict[str, torch.Tensor]


def norm(part: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * part[f"{name}.weight"] + part[f"{name}.bias"]
    )


def linear(part: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ part[f"{name}.weight"].T + part[f"{name}.bias"]


def attention(part: Tensors, x: torch.Tensor, seen: torch.Tensor, turned: bool) -> torch.Tensor:
    """Computes attention of every token of [S, H] to those that a row of `seen` [S, S] names."""
    q, k, v = (linear(part, f"attention.{n}_proj", x).unflatten(-1, (HEADS, -1)).transpose(0, 1) for n in "qkv")
    if turned:
        q, k = rotated(q), rotated(k)
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, float("-inf"))
    return linear(part, "attention.o_proj", (scores.softmax(-1) @ v).transpose(0, 1).flatten(1))


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Multiplies pairs of elements, as complex numbers, by unit numbers whose angles grow with the position."""
    size = x.shape[-1]
    angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(size // 2) * 2 / size)
    turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], -1)


def gpt_3(layer: int, part: Tensors, x: torch.Tensor) -> torch.Tensor:
    """Computes a layer of GPT-3 (Brown et al. 2020, section 2.1): GPT-2's, dense in turn with attention in a band."""
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    seen = (distance >= 0) & ((distance < BAND) | (layer % 2 == 0))
    x = x + attention(part, norm(part, "attention_norm", x), seen, turned=False)
    inner = linear(part, "mlp.up_proj", norm(part, "mlp_norm", x))
    inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    return x + linear(part, "mlp.down_proj", inner)


def glm_130b(layer: int, part: Tensors, x: torch.Tensor) -> torch.Tensor:
    """Computes a layer of GLM-130B (Zeng et al. 2022, section 2.1, appendix): DeepNorm, GEGLU, two-way contexts."""
    alpha = (2 * SIZES["num_layers"]) ** 0.5
    index = torch.arange(LENGTH)
    seen = (index <= index[:, None]) | (index < CONTEXT)
    x = norm(part, "attention_norm", x)
    x = norm(part, "mlp_norm", alpha * x + attention(part, x, seen, turned=True))
    gate = linear(part, "mlp.gate_proj", x)
    gate = gate * (1 + torch.erf(gate / math.sqrt(2))) / 2
    return alpha * x + linear(part, "mlp.down_proj", gate * linear(part, "mlp.up_proj", x))


def plain_logits(family: Any, weights: Tensors, tokens: torch.Tensor) -> torch.Tensor:
    x = weights["embedding.weight"][tokens]
    if "position_embedding.weight" in weights:
        x = x + weights["position_embedding.weight"][:LENGTH]
    for layer in range(SIZES["num_layers"]):
        part = {name.removeprefix(f"layers.{layer}."): tensor for name, tensor in weights.items()}
        x = family(layer, part, x)
    return norm(weights, "final_norm", x) @ weights["embedding.weight"].T


@pytest.mark.parametrize(("preset", "family"), [("gpt3-175b", gpt_3), ("glm-130b", glm_130b)])
def test_logits_and_gradients_are_those_of_the_paper(preset: str, family: Any) -> None:
    tree = presets.filled_in({"model": {"preset": preset}})["model"] | SIZES
    if preset == "gpt3-175b":
        tree["kinds"] = {"dense": {}, "banded": {"pattern": "sliding", "window": BAND}}
        tree["position"] |= {"max_positions": 29}
    decoder = Decoder(validate(ModelConfig, tree)).double()
    torch.manual_seed(3)
    for name, parameter in decoder.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm.weight" in name else 0.0, 0.3)
    tokens, positions = torch.randint(0, 61, (1, LENGTH)), torch.arange(LENGTH)[None]
    made = ForwardContext.of(
        decoder.model_config, positions, torch.zeros_like(tokens), contexts_B=torch.tensor([CONTEXT])
    )
    ours = decoder(tokens, positions, context=made)[0]
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in decoder.named_parameters()}
    wanted = plain_logits(family, weights, tokens[0])
    # In fp64; rotary tables are in fp32.
    assert (ours - wanted).abs().max() < 1e-5 * wanted.abs().max()
    for side in (ours, wanted):
        F.cross_entropy(side[CONTEXT - 1 : -1], tokens[0, CONTEXT:]).backward()
    for name, parameter in decoder.named_parameters():
        theirs = weights[name].grad
        assert theirs is not None and parameter.grad is not None, name
        # That of a bias of keys is nothing but rounding.
        assert (parameter.grad - theirs).norm() < 1e-5 * (theirs.norm() + 1e-3), name
