"""The decoder: embedding, pre-norm blocks of attention and MLP (or MoE), final norm, output head (LLaMA, Mixtral).

A `Decoder` holds the layers of one pipeline stage and knows them by their global index, so parameter names are the
same with and without pipeline. Its arguments say which layers it holds (`StageSpec`) and over which process groups
the work of a layer is split (`LayerContext`); it knows no ranks. Shape letters: see `attention.py`.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from configs.model import ModelConfig
from pretrain.model.attention import Attention, ForwardContext
from pretrain.model.dropout import Dropout
from pretrain.model.head_loss import HeadLoss
from pretrain.model.kv_cache import KVCache
from pretrain.model.layer_context import LayerContext
from pretrain.model.linear import ColumnLinear, Embedding, Region
from pretrain.model.mlp import MLP
from pretrain.model.moe import MoE
from pretrain.model.norm import RMSNorm
from pretrain.model.recompute import recomputed


@dataclass(frozen=True)
class StageSpec:
    """The part of the model that one pipeline stage holds: layers, the embedding if first, norm and head if last."""

    layers: range
    is_first: bool = True
    is_last: bool = True

    @classmethod
    def whole(cls, config: ModelConfig) -> "StageSpec":
        return cls(range(config.num_layers))


class Block(nn.Module):
    """One layer: attention and then an MLP or MoE, each after a norm and inside a residual connection."""

    def __init__(self, config: ModelConfig, layer: int, context: LayerContext):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, context.dtype, context.device)
        self.attention = Attention(config, layer, context)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, context.dtype, context.device)
        if config.moe:
            self.moe = MoE(config, context)
        else:
            self.mlp = MLP(config.hidden_size, config.ffn_hidden_size, context)
        self.is_moe = config.moe is not None
        self.attention_dropout = Dropout(f"layers.{layer}.attention", context)
        self.mlp_dropout = Dropout(f"layers.{layer}.mlp", context)

    def forward(self, x_SBH: torch.Tensor, context: ForwardContext, cache: KVCache | None = None) -> torch.Tensor:
        attended = self.attention(self.attention_norm(x_SBH), context, cache)
        x_SBH = x_SBH + self.attention_dropout(attended, context.samples)
        normed = self.mlp_norm(x_SBH)
        y_SBH = self.moe(normed, context.valid_SB) if self.is_moe else self.mlp(normed)
        return x_SBH + self.mlp_dropout(y_SBH, context.samples)


class Decoder(nn.Module):
    """One pipeline stage of the model. `forward` takes [B, S] tokens; the last stage gives logits [B, S, V/tp].

    The head is the widest product of the model. A caller who needs logits at some positions only passes `wanted` [N],
    indices b * S + s, and gets logits [N, V/tp].

    Between stages hidden states are [S, B, H], or with sequence parallel [S/tp, B, H]; a stage gets them through
    `set_input_tensor`, the interface of megatron-core's schedules.
    """

    def __init__(
        self,
        config: ModelConfig,
        stage: StageSpec | None = None,
        context: LayerContext | None = None,
    ):
        super().__init__()
        context = context or LayerContext()
        self.model_config, self.stage = config, stage or StageSpec.whole(config)
        self.region = Region(context)
        if self.stage.is_first:
            self.embedding = Embedding(config.vocab_size, config.hidden_size, context)
            self.embedding_dropout = Dropout("embedding", context)
        self.layers = nn.ModuleDict({str(i): Block(config, i, context) for i in self.stage.layers})  # global index
        if self.stage.is_last:
            self.final_norm = RMSNorm(config.hidden_size, config.norm_eps, context.dtype, context.device)
            if not self.tied_here:
                # With tied embeddings over several stages this is the last stage's copy of `embedding.weight`.
                self.lm_head = ColumnLinear(config.hidden_size, config.vocab_size, context)
        self.input_tensor: torch.Tensor | None = None
        self.recompute_blocks = False

    def set_recompute(self, recompute: Literal["none", "selective", "full"]) -> None:
        """Chooses which activations the backward pass computes again and does not store (Korthikanti et al. 2022)."""
        self.recompute_blocks = recompute == "full"
        for block in self.blocks.values():
            block.attention.recompute = recompute == "selective"

    @property
    def tied_here(self) -> bool:
        """Whether the output head uses the embedding weight of this same stage."""
        return self.model_config.tie_embeddings and self.stage.is_first and self.stage.is_last

    @property
    def blocks(self) -> dict[int, Block]:
        """The blocks of this stage by global layer index."""
        return {int(name): cast(Block, block) for name, block in self.layers.items()}

    @property
    def moe_layers(self) -> dict[int, MoE]:
        return {layer: block.moe for layer, block in self.blocks.items() if block.is_moe}

    def global_name(self, name: str) -> str:
        """Returns a parameter's name in checkpoints and init; a tied head goes by the name of the embedding."""
        return "embedding.weight" if name == "lm_head.weight" and self.model_config.tie_embeddings else name

    def named_global_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(self.global_name(name), parameter) for name, parameter in self.named_parameters()]

    def named_balance(self) -> dict[str, torch.Tensor]:
        """Tensors by global name that are saved with the weights but are no parameters (`Balance.state`)."""
        return {
            f"layers.{layer}.moe.balance.{name}": tensor
            for layer, moe in self.moe_layers.items()
            for name, tensor in moe.balance.state().items()
        }

    def set_input_tensor(self, tensor: Any) -> None:
        """Takes the previous stage's output; the pipeline schedules call this before `forward`."""
        self.input_tensor = tensor[0] if isinstance(tensor, list) else tensor

    def forward(
        self,
        tokens_BS: torch.Tensor,
        positions_BS: torch.Tensor,
        segments_BS: torch.Tensor | None = None,
        cache: KVCache | None = None,
        wanted: torch.Tensor | None = None,
        context: ForwardContext | None = None,
        loss: HeadLoss | None = None,
    ) -> torch.Tensor:
        """Computes hidden states [S, B, H], or on the last stage logits, or with `loss` the loss of the micro-batch.

        `segments_BS` numbers the documents of a row, and attention stays within a document; -1 marks padding, and None
        means one document a row. A `context` made before says both, and what else layers share; training passes one, so
        that the chunks of a pipeline rank use the same. Under context parallel S is this rank's part of a row.
        """
        if context is None:
            context = ForwardContext.of(self.model_config, positions_BS, segments_BS, cache)
        if self.stage.is_first:
            x_SBH = self.embedding_dropout(self.embedding(tokens_BS), context.samples)
        else:
            assert self.input_tensor is not None, "a later pipeline stage got no input"
            x_SBH = self.input_tensor
        for block in self.blocks.values():
            if self.recompute_blocks and torch.is_grad_enabled():
                x_SBH = recomputed(block, x_SBH, context)
            else:
                x_SBH = block(x_SBH, context, cache)
        if not self.stage.is_last:
            return x_SBH
        x = self.region.enter(self.final_norm(x_SBH)).transpose(0, 1)
        if wanted is not None:
            x = x.flatten(0, 1).index_select(0, wanted)
        if loss is not None:
            weight = self.embedding.weight if self.tied_here else self.lm_head.weight
            return loss(x, weight, self.model_config.vocab_size, self.region.group)
        return F.linear(x, self.embedding.weight) if self.tied_here else self.lm_head(x)

    def new_cache(self, rows: int, max_length: int) -> KVCache:
        """Makes an empty cache for generation by one rank that holds the whole model."""
        weight = self.embedding.weight
        return KVCache(self.model_config, rows, max_length, weight.dtype, weight.device)
