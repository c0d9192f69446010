"""How far two layouts may be apart in floating point: derived from the model's shape, not tuned.

A dot product of K terms rounds K times. Rounding errors are signed and nearly independent, so the relative error of
the sum grows like sqrt(K) u, with u the unit roundoff (Higham and Mary 2019, "A new approach to probabilistic rounding
error analysis"); its worst case K u is next to never seen. Along a chain of products the errors add up, so a tensor's
*depth* is the sum of sqrt(K) over the products on the longest path to it. Errors are measured as Frobenius norms of
whole tensors, which average over elements, and two runs are compared, each with an error of its own:

    bound = 2 u depth
"""

import math

import torch

from configs.train import ModelConfig, OptimizerConfig

UNIT_ROUNDOFF = {"fp32": 2.0**-24, "bf16": 2.0**-9}


class Depth:
    """Depths of a model's activations and gradients, for batches of `tokens` tokens in rows of `seq_length`."""

    def __init__(self, model: ModelConfig, seq_length: int, tokens: int):
        hidden, root = math.sqrt(model.hidden_size), math.sqrt
        # Norm and projections, scores and their average over the sequence, output projection.
        attention = 2 * hidden + root(model.dim_per_head) + root(seq_length)
        attention += root(model.num_heads * model.dim_per_head)
        # Norm, gate and up, down; with experts the router before them and the sum over a token's experts after.
        mlp = 2 * hidden + root(model.ffn_hidden_size)
        if model.moe:
            mlp += hidden + root(model.moe.num_experts) + root(model.moe.top_k)
        self._layer, self._layers = attention + mlp, model.num_layers
        self._head = 2 * hidden + root(model.vocab_size)  # final norm, logits, softmax
        self._tokens = root(tokens)

    def forward(self, layer: int) -> float:
        """Of what layer `layer` gives; -1 is the embedding."""
        return 1 + (layer + 1) * self._layer

    @property
    def loss(self) -> float:
        return self.forward(self._layers - 1) + self._head + self._tokens

    def backward(self, layer: int) -> float:
        """Of the loss's gradient by what layer `layer` gives. Each product has two in the backward pass."""
        return self.loss + 2 * self._head + 2 * (self._layers - 1 - layer) * self._layer

    def gradient(self, layer: int) -> float:
        """Of the loss's gradient by a weight of layer `layer`, a sum over all tokens."""
        return self.backward(layer - 1) + self._tokens


def bound(depth: float, precision: str) -> float:
    return 2 * UNIT_ROUNDOFF[precision] * depth


def adam_step_bound(gradient: torch.Tensor, error: float, optimizer: OptimizerConfig, lr: float) -> torch.Tensor:
    """How far the weights of two first steps of Adam may be apart, per element, if gradients are by `error` (relative).

    From zero moments the step is lr g / (|g| + eps). Its slope, eps / (|g| + eps)^2, is large where g is no larger
    than rounding noise: there the sign of the noise decides, and steps may differ by 2 lr. `gradient` is the clipped
    one; the noise of an element is taken as `error` times the tensor's rms.
    """
    noise = error * gradient.square().mean().sqrt()
    slope = optimizer.eps / (gradient.abs() + optimizer.eps).square()
    # Where noise is not small against |g| + eps the slope says too little of a step that may change its sign.
    reach = torch.where(noise < (gradient.abs() + optimizer.eps) / 4, 2 * slope * noise, 2.0)
    return lr * reach.clamp(max=2.0)
