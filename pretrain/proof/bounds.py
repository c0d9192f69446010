"""Bounds on how far rounding alone can take two layouts apart, derived from the model's shape and not tuned.

Rounding errors have either sign and are nearly independent, so the errors of n operations in a row add up like a random
walk: relative to the size of the terms they grow like sqrt(n) u, with u the unit roundoff (Higham and Mary 2019, "A new
approach to probabilistic rounding error analysis"). The worst case, n u, is hardly ever seen. Errors are Frobenius
norms of whole tensors, which average over elements. Two runs are compared, and each has an error of its own:

    bound = 2 u sqrt(n)

The number n is the *depth* of a tensor: all roundings on the longest path to it. A dot product of K terms counts as K
in fp32 and fp64. In bf16 it counts as one, since products are added up in fp32 and only the result is rounded to bf16.

The gradient of a norm's weight is a sum over all tokens, and with QK-norm over all heads, of few elements each. Each
term has an error of its own, and where terms cancel, the sum is small and its error is not: it is to the sum as the
root of the terms' sum of squares is to it. Terms of random signs cancel to just that, so the factor is about one. It is
above one where terms pull against each other: up to 2.3 for the norm of the keys in a model with one key-value head.
The reference measures the factor, and it multiplies the bound.

Some models amplify rounding: a norm over few elements, or terms that cancel, up to a gradient that is zero in exact
arithmetic. There the derived bound is too small for one rank's own rounding. So the reference computes its first step
twice, in its own precision and in fp64 (in fp32 where its own is fp64), and a tensor's bound is at least MARGIN times
the error that this shows. It shows one error of many that rounding can make: of hundred models drawn at random, one had
a gradient of few elements whose error was 11.7 times as large in a layout. A gradient that is rounding alone, without a
correct digit, has a size that is chance too; it may be MARGIN times as large again (18 times was seen).
"""

import math
from typing import TYPE_CHECKING

from configs.model import ModelConfig
from configs.train import OptimizerConfig, PretrainConfig

if TYPE_CHECKING:
    import torch

# Folder of a reference's first step in another precision, and how many times the error that it shows is allowed.
COMPANION, MARGIN = "companion", 16.0
UNIT_ROUNDOFF = {"fp64": 2.0**-53, "fp32": 2.0**-24, "bf16": 2.0**-9}


def companion_of(precision: str) -> str:
    """Precision in which the reference's first step is computed again: fp64, and fp32 for fp64 itself."""
    return "fp32" if precision == "fp64" else "fp64"


class Bounds:
    """Bounds of a model's activations and gradients, for batches of `tokens` tokens in rows of `seq_length`."""

    def __init__(self, model: ModelConfig, seq_length: int, tokens: int, precision: str):
        hidden = model.hidden_size
        head = [hidden, hidden, model.head_size]  # final norm, logits, softmax
        head += [1, 1, 1] * (model.head.softcap is not None) + [hidden] * model.head.normalized
        start = [1] * model.scale_embedding + [1] * (model.position.kind == "learned") + [hidden] * model.norm.embedding
        self.precision, self._num_layers = precision, model.num_layers + model.head.mtp_depth
        parts = (_attention(model, seq_length) + _feed_forward(model), head, start)
        self._layer, self._head, self._start = (len(part) if precision == "bf16" else sum(part) for part in parts)
        self._tokens = 1 if precision == "bf16" else tokens  # in bf16 gradients are accumulated in fp32 too

    @classmethod
    def of(cls, config: PretrainConfig, precision: str) -> "Bounds":
        train = config.train
        return cls(config.model, train.seq_length, train.global_batch_size * train.seq_length, precision)

    def forward(self, layer: int) -> float:
        """Bound of the output of layer `layer`; -1 is the embedding."""
        return self._of(1 + (layer >= 0) * self._start + (layer + 1) * self._layer)

    def loss(self) -> float:
        return self._of(self._loss_depth())

    def backward(self, layer: int) -> float:
        """Bound of the loss's gradient with respect to the output of layer `layer`."""
        return self._of(self._backward_depth(layer))

    def gradient(self, layer: int) -> float:
        """Bound of the loss's gradient with respect to a weight of layer `layer`, which is a sum over all tokens."""
        return self._of(self._gradient_depth(layer))

    def derivation(self) -> str:
        """Returns a sentence that says, with the numbers, how the bounds of a table were derived."""
        power = math.log2(UNIT_ROUNDOFF[self.precision])
        return (
            f"Allowed is 2 u sqrt(n), u = 2^{power:.0f} ({self.precision}), n roundings on the longest path: "
            f"{self._loss_depth():,} to the loss, {self._gradient_depth(0):,} to layer 0's gradients; weights: that "
            "error through Adam's first step."
        )

    def _loss_depth(self) -> int:
        return 1 + self._start + self._num_layers * self._layer + self._head + self._tokens

    def _gradient_depth(self, layer: int) -> int:
        return self._backward_depth(layer - 1) + self._tokens

    def _backward_depth(self, layer: int) -> int:
        """Counts every product of the forward pass twice, since it has two products in the backward pass."""
        after = 2 * self._head + 2 * (self._num_layers - 1 - layer) * self._layer + 2 * (layer < 0) * self._start
        return self._loss_depth() + after

    def _of(self, depth: int) -> float:
        return 2 * UNIT_ROUNDOFF[self.precision] * math.sqrt(depth)


def _attention(model: ModelConfig, seq_length: int) -> list[int]:
    """Lists the roundings of attention in a layer that has all of the model's parts, a number of terms for each."""
    hidden, heads, attention = model.hidden_size, model.num_heads * model.dim_per_head, model.attention
    # Norm, projections, rotation, scores, their softmax, their average over the sequence, output, residual.
    terms = [hidden, hidden, 2, model.dim_per_head, seq_length, seq_length, heads, 1]
    if attention.qk_norm != "none":
        terms += [heads if attention.qk_norm == "projection" else model.dim_per_head]
    if delta := attention.delta:  # convolution, length of keys, the sums of a state over the sequence, norm and gate
        terms += [delta.kernel_size, delta.key_head_dim, seq_length, delta.key_head_dim, delta.value_head_dim, 1, 1]
    if latent := attention.latent:  # norms of the small vectors, and projections from them to heads
        terms += [max(latent.q_rank or 0, latent.kv_rank)] * 2
    ones = (
        attention.qkv_bias,
        attention.output_bias,
        attention.scale is not None or attention.scale_by_layer,
        attention.temperature is not None,
        attention.sinks,
        attention.output_gate,
        model.position.kind == "alibi",
        model.residual.kind == "deepnorm",
    )
    terms += [1] * sum(ones) + [1, 1, 1] * (attention.softcap is not None)  # of a cap: quotient, tangent, product
    return terms + [hidden] * (model.residual.kind == "sandwich")


def _feed_forward(model: ModelConfig) -> list[int]:
    """Lists the roundings of an MLP or mixture of experts, a number of terms for each."""
    hidden, moe = model.hidden_size, model.moe
    ffn = max(
        max(layer.expert_size, layer.shared_size) if layer.moe else layer.ffn_hidden_size for layer in model.layers
    )
    # Norm, gate or up, activation, product of the two, down, residual.
    terms = [hidden, hidden, 1, 1, ffn, 1]
    terms += [1, 1] * model.mlp.bias + [1] * (model.residual.kind == "deepnorm")
    terms += [hidden] * (model.residual.kind == "sandwich")
    if moe:  # the router and its softmax, then the weights and the sum of a token's experts
        terms += [hidden, moe.num_experts, 1, moe.top_k] + [1] * moe.router_bias + [hidden, 1] * moe.shared_gate
    return terms


def adam_step_bound(gradient: "torch.Tensor", error: float, optimizer: OptimizerConfig, lr: float) -> "torch.Tensor":
    """Bounds, per element, the difference between two first steps of Adam whose gradients have relative error `error`.

    Adam's first step from zero moments is lr g / (|g| + eps). Its slope, eps / (|g| + eps)^2, is large where g is no
    larger than rounding noise: there the sign of the noise decides, and steps may differ by 2 lr. `gradient` is the
    clipped gradient. The noise of an element is taken as `error` times the root mean square of the tensor.
    """
    import torch

    noise = error * gradient.square().mean().sqrt()
    slope = optimizer.eps / (gradient.abs() + optimizer.eps).square()
    # Where noise is not small against |g| + eps the step may change its sign, which the slope does not show.
    reach = torch.where(noise < (gradient.abs() + optimizer.eps) / 4, 2 * slope * noise, 2.0)
    return lr * reach.clamp(max=2.0)
