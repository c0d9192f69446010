"""How far two layouts may be apart in floating point: derived from the model's shape, not tuned.

A rounding error is signed and nearly independent of the others, so n of them on the way to a number are a random walk:
relative to the sizes of what was added up, the error grows like sqrt(n) u, with u the unit roundoff (Higham and Mary
2019, "A new approach to probabilistic rounding error analysis"); the worst case, n u, is next to never seen. Errors
are measured as Frobenius norms of whole tensors, which average over elements, and two runs are compared, each with an
error of its own:

    bound = 2 u sqrt(n)

What n counts is the *depth* of a tensor: all roundings on the longest path to it. In fp32 and fp64 a dot product of K
terms has K of them. In bf16 products are added up in fp32 and only the result is rounded, so it has one.
"""

import math
from typing import TYPE_CHECKING

from configs.train import ModelConfig, OptimizerConfig, PretrainConfig

if TYPE_CHECKING:
    import torch

UNIT_ROUNDOFF = {"fp64": 2.0**-53, "fp32": 2.0**-24, "bf16": 2.0**-9}


class Bounds:
    """Of a model's activations and gradients, for batches of `tokens` tokens in rows of `seq_length`."""

    def __init__(self, model: ModelConfig, seq_length: int, tokens: int, precision: str):
        hidden, heads = model.hidden_size, model.num_heads * model.dim_per_head
        ffn = model.expert_size * max(1, model.moe.num_shared_experts if model.moe else 0)  # shared experts are one MLP
        # Norm, projections, rotation, scores, their softmax, their average over the sequence, output, residual.
        attention = [hidden, hidden, 2, model.dim_per_head, seq_length, seq_length, heads, 1]
        # Norm, gate or up, activation, product of the two, down, residual.
        mlp = [hidden, hidden, 1, 1, ffn, 1]
        if model.qk_norm:
            attention += [model.dim_per_head]
        if model.moe:  # the router and its softmax, then the weights and the sum of a token's experts
            mlp += [hidden, model.moe.num_experts, 1, model.moe.top_k]
        head = [hidden, hidden, model.vocab_size]  # final norm, logits, softmax
        self.precision, self._num_layers = precision, model.num_layers
        self._layer, self._head = (len(part) if precision == "bf16" else sum(part) for part in (attention + mlp, head))
        self._tokens = 1 if precision == "bf16" else tokens  # in bf16 gradients are accumulated in fp32 too

    @classmethod
    def of(cls, config: PretrainConfig, precision: str) -> "Bounds":
        train = config.train
        return cls(config.model, train.seq_length, train.global_batch_size * train.seq_length, precision)

    def forward(self, layer: int) -> float:
        """Of what layer `layer` gives; -1 is the embedding."""
        return self._of(1 + (layer + 1) * self._layer)

    def loss(self) -> float:
        return self._of(self._loss_depth())

    def backward(self, layer: int) -> float:
        """Of the loss's gradient by what layer `layer` gives."""
        return self._of(self._backward_depth(layer))

    def gradient(self, layer: int) -> float:
        """Of the loss's gradient by a weight of layer `layer`, a sum over all tokens."""
        return self._of(self._gradient_depth(layer))

    def derivation(self) -> str:
        """In one sentence, with the numbers, where the bounds of a table come from."""
        power = math.log2(UNIT_ROUNDOFF[self.precision])
        return (
            f"Allowed is 2 u sqrt(n), u = 2^{power:.0f} ({self.precision}), n roundings on the longest path: "
            f"{self._loss_depth():,} to the loss, {self._gradient_depth(0):,} to layer 0's gradients; weights: that "
            "error through Adam's first step."
        )

    def _loss_depth(self) -> int:
        return 1 + self._num_layers * self._layer + self._head + self._tokens

    def _gradient_depth(self, layer: int) -> int:
        return self._backward_depth(layer - 1) + self._tokens

    def _backward_depth(self, layer: int) -> int:
        """Every product of the forward pass has two in the backward pass."""
        return self._loss_depth() + 2 * self._head + 2 * (self._num_layers - 1 - layer) * self._layer

    def _of(self, depth: int) -> float:
        return 2 * UNIT_ROUNDOFF[self.precision] * math.sqrt(depth)


def adam_step_bound(gradient: "torch.Tensor", error: float, optimizer: OptimizerConfig, lr: float) -> "torch.Tensor":
    """How far the weights of two first steps of Adam may be apart, per element, if gradients are by `error` (relative).

    From zero moments the step is lr g / (|g| + eps). Its slope, eps / (|g| + eps)^2, is large where g is no larger
    than rounding noise: there the sign of the noise decides, and steps may differ by 2 lr. `gradient` is the clipped
    one; the noise of an element is taken as `error` times the tensor's rms.
    """
    import torch

    noise = error * gradient.square().mean().sqrt()
    slope = optimizer.eps / (gradient.abs() + optimizer.eps).square()
    # Where noise is not small against |g| + eps the slope says too little of a step that may change its sign.
    reach = torch.where(noise < (gradient.abs() + optimizer.eps) / 4, 2 * slope * noise, 2.0)
    return lr * reach.clamp(max=2.0)
