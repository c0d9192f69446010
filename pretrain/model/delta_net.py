"""Gated delta nets (Yang et al. 2024, arXiv 2412.06464): layers that keep what they read in a state of one size.

Such a layer stands where other layers have attention. Queries, keys and values pass through a short convolution and a
SiLU, and the gated delta rule (`delta_rule`) mixes tokens within documents; the outputs of each head are normed,
multiplied by a SiLU gate, and projected. The form is Qwen3-Next's. Shape letters: see `decoder.py` and, within heads,
`delta_rule.py`. Under tensor parallel the heads are this rank's.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from configs.model import LayerConfig
from pretrain.model import delta_rule
from pretrain.model.context import ForwardContext
from pretrain.model.delta_rule import RuleInputs
from pretrain.model.kv_cache import DeltaStates, KVCache
from pretrain.model.layer_context import LayerContext
from pretrain.model.layers import RMSNorm, recomputed
from pretrain.model.slices import Marks, TensorSplit, mark
from pretrain.model.tensor_parallel import ColumnLinear, Region, RowLinear, columns

# ([T, B, key heads, features], documents [T, B] or None) to [T, B, key heads, values]
MixTokens = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
_LOG_RATES = (0.01, 16.0)  # the first rates of decay are drawn evenly between these, and their logarithms are weights


class GatedDeltaNet(nn.Module):
    """A gated delta net; takes and gives hidden states [S, B, H].

    Between the projections a token has for each key head one vector of features, in this order: query, key, the values
    of the value heads that share them, and of each value head two numbers, of which one becomes β and the other α.
    """

    def __init__(self, config: LayerConfig, context: LayerContext):
        super().__init__()
        delta, hidden = config.attention.delta, config.hidden_size
        assert delta is not None
        self.delta, self.layer, self.key_heads = delta, config.index, delta.num_key_heads // context.tp_size
        self.recompute = False  # True: the backward pass computes the mixing of tokens again
        # Context parallel puts its exchange of sequence for heads around this.
        self.mix: MixTokens = self.mix_here
        self.head_part = context.cp_rank, context.cp_size  # of this rank's heads, those that it has in `mix_here`
        self.largest_logit: torch.Tensor | None = None  # there are no scores
        self.region = Region(context)
        size_k, size_v = delta.num_key_heads * delta.key_head_dim, delta.num_value_heads * delta.value_head_dim
        self.q_proj = ColumnLinear(hidden, size_k, context)
        self.k_proj = ColumnLinear(hidden, size_k, context)
        self.v_proj = ColumnLinear(hidden, size_v, context, std_factor=config.inner_std_factor)
        self.beta_proj = ColumnLinear(hidden, delta.num_value_heads, context)
        self.decay_proj = ColumnLinear(hidden, delta.num_value_heads, context)
        self.output_gate_proj = ColumnLinear(hidden, size_v, context)

        def of_heads(size: int, *more: int, marks: Marks) -> nn.Parameter:
            shape = size // context.tp_size, *more
            parameter = nn.Parameter(torch.empty(shape, dtype=context.dtype, device=context.device))
            mark(parameter, replace(marks, split=TensorSplit(0, size) if context.tp_size > 1 else None))
            return parameter

        of_convolution = Marks(std=delta.kernel_size**-0.5)
        self.q_conv, self.k_conv, self.v_conv = (
            of_heads(size, delta.kernel_size, marks=of_convolution) for size in (size_k, size_k, size_v)
        )
        self.log_rates = of_heads(delta.num_value_heads, marks=Marks(log_of=_LOG_RATES, decays=False))
        self.decay_bias = of_heads(delta.num_value_heads, marks=Marks(constant=1.0, decays=False))
        self.head_norm = RMSNorm(delta.value_head_dim, config.norm.eps, context, partial="heads")
        self.o_proj = RowLinear(size_v, hidden, context, std_factor=config.output_std_factor)

    def forward(self, x_SBH: torch.Tensor, context: ForwardContext, cache: KVCache | None = None) -> torch.Tensor:
        inner = self.q_proj, self.k_proj, self.v_proj, self.beta_proj, self.decay_proj
        *parts, gate = columns(x_SBH, self.region, *inner, self.output_gate_proj)
        features = torch.cat([self._by_key_head(part) for part in parts], -1)
        if cache is None:
            y = self.mix(features, context.documents_TB)
        else:
            y = self._continued(features, context.valid_SB, cache)
        y = self.head_norm(_wide(y.unflatten(-1, (-1, self.delta.value_head_dim)))).flatten(2)
        return self.o_proj((y * F.silu(_wide(gate))).to(gate.dtype))

    def mix_here(self, features: torch.Tensor, documents_TB: torch.Tensor | None) -> torch.Tensor:
        """Mixes the tokens of whole rows, by this rank's heads: [T, B, K, features] to [T, B, K, R * V]."""
        weights = self._weights()
        if self.recompute and torch.is_grad_enabled():
            return recomputed(self._mixed, features, documents_TB, *weights)
        return self._mixed(features, documents_TB, *weights)

    def _mixed(self, features: torch.Tensor, documents_TB: torch.Tensor | None, *weights: torch.Tensor) -> torch.Tensor:
        convolution, *of_decay = weights
        channels, rest = features.split((convolution.shape[1], 2 * self.values_per_key), -1)
        made = delta_rule.convolved(_wide(channels), convolution, documents_TB)
        outputs, _ = delta_rule.by_chunks(self._inputs(made, rest, *of_decay), documents_TB)
        return outputs.flatten(3).to(features.dtype)

    def _inputs(
        self, channels: torch.Tensor, rest: torch.Tensor, rates: torch.Tensor, biases: torch.Tensor
    ) -> RuleInputs:
        """Makes the inputs of the delta rule from what the convolution gives and the two numbers of each value head."""
        size, count = self.delta.key_head_dim, self.values_per_key
        q, k, v = F.silu(channels).split((size, size, count * self.delta.value_head_dim), -1)
        beta, decay = rest.to(channels.dtype).split((count, count), -1)
        log_decay = -rates * F.softplus(decay + biases)
        return RuleInputs(q, k, v.unflatten(-1, (count, -1)), log_decay, beta.sigmoid())

    def _continued(self, features: torch.Tensor, valid_SB: torch.Tensor | None, cache: KVCache) -> torch.Tensor:
        """Starts rows, whose padding changes no state, or continues each by one token; keeps their states."""
        states: DeltaStates = cache.delta_states(self.layer)
        convolution, *of_decay = self._weights()
        channels, rest = features.split((convolution.shape[1], 2 * self.values_per_key), -1)
        if cache.continues:
            seen = states.shifted(channels[0])  # [W, B, K, channels]
            made = torch.einsum("wbkc,kcw->bkc", _wide(seen), convolution)[None]
            outputs, state = delta_rule.step(self._inputs(made, rest, *of_decay), states.state[: made.shape[1]])
        else:
            made = delta_rule.convolved(_wide(channels), convolution, None)
            inputs = self._inputs(made, rest, *of_decay)
            if valid_SB is not None:
                valid = valid_SB[..., None, None]
                inputs = RuleInputs(inputs.q, inputs.k, inputs.v, inputs.log_decay * valid, inputs.beta * valid)
            outputs, state = delta_rule.by_chunks(inputs)
            states.start(channels, valid_SB)
        states.write(state)
        return outputs.flatten(3).to(features.dtype)

    def _weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the convolution [K, channels, W], rates of decay [K, R] and their biases of the heads at hand."""
        convolution = torch.cat([self._by_key_head(w.t()) for w in (self.q_conv, self.k_conv, self.v_conv)], -1)
        rates, biases = (_wide(self._by_key_head(w)) for w in (self.log_rates, self.decay_bias))
        part, parts = self.head_part
        of_all = _wide(convolution.permute(1, 2, 0)), rates.exp(), biases
        convolution, rates, biases = (weight.chunk(parts)[part] for weight in of_all)
        return convolution, rates, biases

    def _by_key_head(self, x: torch.Tensor) -> torch.Tensor:
        """Splits what this rank's heads have, in the last dimension, by key heads: [..., K * n] to [..., K, n]."""
        return x.unflatten(-1, (self.key_heads, -1))

    @property
    def values_per_key(self) -> int:
        """The number of value heads that share the query and key of one head."""
        return self.delta.num_value_heads // self.delta.num_key_heads


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Returns a tensor in fp32, or fp64 if it has that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
