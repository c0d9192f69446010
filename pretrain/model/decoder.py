"""The decoder: embedding, blocks of attention and MLP (or MoE), final norm, output head.

A family is a choice of parts, which `configs.model` lists and `config.layer(i)` gives to block i. A `Decoder` holds the
layers of one pipeline stage and knows them by their global index, so parameter names are the same with and without
pipeline. Its arguments say which layers it holds (`StageSpec`) and over which process groups the work of a layer is
split (`LayerContext`); it knows no ranks.

Shape letters here and in the rest of `model/`: S sequence, B batch, H hidden, V vocabulary, N query heads, K key-value
heads, D head dimension, T the whole sequence where S is a part of it, E experts. Activations between layers are
[S, B, H], the layout of megatron-core's pipeline.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from configs.model import LayerConfig, ModelConfig
from pretrain.model.attention import attention_of
from pretrain.model.context import NO_TOKENS, ForwardContext
from pretrain.model.head_loss import HeadLoss
from pretrain.model.kv_cache import KVCache
from pretrain.model.layer_context import LayerContext
from pretrain.model.layers import MLP, Dropout, norm_of, recomputed
from pretrain.model.moe import MoE
from pretrain.model.moe.router import Router
from pretrain.model.products import linear
from pretrain.model.slices import Marks, mark
from pretrain.model.tensor_parallel import ColumnLinear, Embedding, Region, WholeLinear
from pretrain.model.value_head import ValueHead


@dataclass(frozen=True)
class StageSpec:
    """The part of the model that one pipeline stage holds: layers, the embedding if first, norm and head if last."""

    layers: range
    is_first: bool = True
    is_last: bool = True

    @classmethod
    def whole(cls, config: ModelConfig) -> "StageSpec":
        return cls(range(config.num_layers))


class Decoder(nn.Module):
    """One pipeline stage of the model. `forward` takes [B, S] tokens; the last stage gives logits [B, S, V/tp].

    The head is the widest product of the model. A caller who needs logits at some positions only passes `wanted` [N],
    indices b * S + s, and gets logits [N, V/tp]. A scalar head gives K values in place of V/tp logits.

    Between stages hidden states are [S, B, H], or with sequence parallel [S/tp, B, H]; a stage gets them through
    `set_input_tensor`, the interface of megatron-core's schedules.
    """

    def __init__(self, config: ModelConfig, stage: StageSpec | None = None, context: LayerContext | None = None):
        super().__init__()
        context = context or LayerContext()
        self.model_config, self.stage = config, stage or StageSpec.whole(config)
        self.region = Region(context)
        if self.stage.is_first or (self.stage.is_last and config.head.mtp_depth):
            self.embedding = Embedding(config.vocab_size, config.hidden_size, context)
        if self.stage.is_first:
            self.embedding_dropout = Dropout("embedding", context)
            if config.position.max_positions:
                self.position_embedding = PositionEmbedding(config.position.max_positions, config.hidden_size, context)
            if config.norm.embedding:
                self.embedding_norm = norm_of(config.norm, config.hidden_size, context)
        layers = {str(i): Block(config.layer(i), context) for i in self.stage.layers}
        if self.stage.is_last:
            layers |= {str(layer.index): MTPBlock(layer, context) for layer in config.mtp_layers}
        self.layers = nn.ModuleDict(layers)  # by global index
        if self.stage.is_last:
            norm = norm_of(config.norm, config.hidden_size, context) if config.norm.final else nn.Identity()
            self.final_norm: nn.Module = norm
            if not config.has_logits:
                self.value_head = ValueHead(config.hidden_size, config.head.outputs, context)
            elif not self.tied_here:
                # With tied embeddings over several stages this is the last stage's copy of `embedding.weight`.
                self.lm_head = ColumnLinear(config.hidden_size, config.vocab_size, context)
        self.input_tensor: torch.Tensor | None = None
        self.recompute_blocks = False
        self.is_partly_frozen = False
        self.virtual = NO_TOKENS
        self.adapter = nn.ModuleDict()  # "prompt": vectors of virtual tokens; "prefix": what all layers' prefixes share

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

        A model with a scalar head gives values in place of logits.

        `segments_BS` numbers the documents of a row, and attention stays within a document; -1 marks padding, and None
        means one document a row. A `context` made before says both, and what else layers share; training passes one, so
        that the chunks of a pipeline rank use the same. Under context parallel S is this rank's part of a row.
        """
        if context is None:
            context = ForwardContext.of(self.model_config, positions_BS, segments_BS, cache, self.virtual)
        x_SBH = self._embedded(tokens_BS, context) if self.stage.is_first else self._received()
        blocks = self.blocks
        for layer in self.stage.layers:
            block, context_of_block = blocks[layer], context.of_layer(layer)
            if self.recompute_blocks and torch.is_grad_enabled():
                x_SBH = recomputed(block, x_SBH, context_of_block)
            else:
                x_SBH = block(x_SBH, context_of_block, cache)
        if not self.stage.is_last:
            return x_SBH
        if context.prepended:
            x_SBH = x_SBH[context.prepended :]
        x_SBH = self.final_norm(x_SBH)
        if not self.model_config.has_logits:
            values = self.value_head(_at(wanted, self.region.gather(x_SBH)))
            return values if loss is None else loss.of_values(values)
        x = _at(wanted, self.region.enter(x_SBH))
        if loss is None:
            return self._logits(x)
        return self._with_modules(self._loss(x, loss), x_SBH, loss, context)

    def _with_modules(
        self, total: torch.Tensor, x_SBH: torch.Tensor, loss: HeadLoss, context: ForwardContext
    ) -> torch.Tensor:
        """Adds the losses of the modules of multi-token prediction, the first of which sees the final hidden states."""
        modules = zip(self.model_config.mtp_layers, loss.batch.ahead, loss.modules, strict=False)
        for config, ahead, loss_of_module in modules:
            block, e_SBH = self.blocks[config.index], self._scaled(self.embedding(ahead.tokens))
            context = replace(context, valid_SB=ahead.valid.t())
            if self.recompute_blocks and torch.is_grad_enabled():
                x_SBH = recomputed(block, x_SBH, context, None, e_SBH)
            else:
                x_SBH = block(x_SBH, context, None, e_SBH)
            total = total + self._loss(_at(ahead.trained, self.region.enter(x_SBH)), loss_of_module)
        return total

    def _scaled(self, x_SBH: torch.Tensor) -> torch.Tensor:
        if not self.model_config.scale_embedding:
            return x_SBH
        # The factor is rounded to the model's precision, as Gemma was trained.
        return x_SBH * torch.tensor(math.sqrt(self.model_config.hidden_size), dtype=x_SBH.dtype)

    def _embedded(self, tokens_BS: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        config, x_SBH = self.model_config, self.embedding(tokens_BS)
        if context.prepended:
            x_SBH = torch.cat((self.adapter["prompt"](x_SBH.shape[1]), x_SBH))
        x_SBH = self._scaled(x_SBH)
        if config.position.max_positions:
            x_SBH = x_SBH + self.position_embedding(context.positions_SB)
        if config.norm.embedding:
            x_SBH = self.embedding_norm(x_SBH)
        x_SBH = self.embedding_dropout(x_SBH, context.samples)
        if self.is_partly_frozen and torch.is_grad_enabled() and not x_SBH.requires_grad:
            x_SBH.requires_grad_()  # a pipeline passes gradients through every stage, also where nothing is trained
        return x_SBH

    def _received(self) -> torch.Tensor:
        assert self.input_tensor is not None, "a later pipeline stage got no input"
        return self.input_tensor

    def _loss(self, x: torch.Tensor, loss: HeadLoss) -> torch.Tensor:
        config = self.model_config
        return loss(x, self._head_weight(), config.vocab_size, self.region.group, config.head.softcap)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        head, tied = self.model_config.head, self.tied_here
        logits = linear(x, self._head_weight()) if tied or head.normalized else self.lm_head(x)
        return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)

    def _head_weight(self) -> torch.Tensor:
        weight = self.embedding.weight if self.tied_here else self.lm_head.weight
        return F.normalize(weight) if self.model_config.head.normalized else weight

    def set_input_tensor(self, tensor: Any) -> None:
        """Takes the previous stage's output; the pipeline schedules call this before `forward`."""
        self.input_tensor = tensor[0] if isinstance(tensor, list) else tensor

    def set_recompute(self, recompute: Literal["none", "selective", "full"]) -> None:
        """Chooses which activations the backward pass computes again and does not store (Korthikanti et al. 2022)."""
        self.recompute_blocks = recompute == "full"
        for block in self.blocks.values():
            block.attention.recompute = recompute == "selective"

    def new_cache(self, rows: int, max_length: int) -> KVCache:
        """Makes an empty cache for generation by one rank that holds the whole model."""
        weight = self.embedding.weight
        return KVCache(self.model_config, rows, max_length, weight.dtype, weight.device, self.virtual.count)

    @property
    def tied_here(self) -> bool:
        """Tells whether the output head uses the embedding weight of this same stage."""
        return self.model_config.tie_embeddings and self.stage.is_last and hasattr(self, "embedding")

    @property
    def has_embedding_copy(self) -> bool:
        """Tells whether the last of several stages has a copy of the embedding."""
        return self.model_config.tie_embeddings or self.model_config.head.mtp_depth > 0

    @property
    def embedding_copy(self) -> nn.Parameter | None:
        """The copy of the embedding on the last of several stages: for multi-token prediction, or as a tied head."""
        if self.stage.is_first or not self.stage.is_last or not self.has_embedding_copy:
            return None
        return self.embedding.weight if hasattr(self, "embedding") else self.lm_head.weight

    @property
    def blocks(self) -> dict[int, "Block"]:
        """The blocks of this stage by global layer index."""
        return {int(name): cast(Block, block) for name, block in self.layers.items()}

    @property
    def moe_layers(self) -> dict[int, MoE]:
        return {layer: block.moe for layer, block in self.blocks.items() if block.is_moe}

    @property
    def routers(self) -> list[Router]:
        """The routers of this stage's layers in their order, without those of multi-token prediction."""
        return [self.blocks[i].moe.router for i in self.stage.layers if self.blocks[i].is_moe]

    @property
    def input_modules(self) -> list[nn.Module]:
        """The modules before the first block, in the order of their use; most are on the first stage alone."""
        names = ("embedding", "position_embedding", "embedding_norm") if self.stage.is_first else ()
        return [*(getattr(self, name) for name in names if hasattr(self, name)), *self.adapter.values()]

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


class Block(nn.Module):
    """One layer: attention and an MLP or MoE, with norms and residual connections as its kind has them."""

    def __init__(self, config: LayerConfig, context: LayerContext):
        super().__init__()
        self.config, self.residual = config, RESIDUALS[config.residual.kind]
        self.is_moe = config.moe is not None

        def norm() -> nn.Module:
            return norm_of(config.norm, config.hidden_size, context)

        has_outputs = config.residual.kind in ("sandwich", "outputs")
        if config.residual.kind != "outputs":
            self.attention_norm = norm()
        self.attention = attention_of(config, context)
        if has_outputs:
            self.attention_output_norm = norm()
        if config.residual.kind != "outputs":
            self.mlp_norm = norm()
        if self.is_moe:
            self.moe = MoE(config, context)
        else:
            self.mlp = MLP(config, config.ffn_hidden_size, context)
        if has_outputs:
            self.mlp_output_norm = norm()
        self.attention_dropout = Dropout(f"layers.{config.index}.attention", context)
        self.mlp_dropout = Dropout(f"layers.{config.index}.mlp", context)
        self.adapter_dropouts: list[Any] = []  # they get the numbers of the rows that this block is called with
        self.adapter = nn.ModuleDict()  # bottleneck adapters by what they follow, "attention" or "mlp"

    def forward(self, x_SBH: torch.Tensor, context: ForwardContext, cache: KVCache | None = None) -> torch.Tensor:
        for dropout in self.adapter_dropouts:
            dropout.samples = context.samples

        def attend(x: torch.Tensor) -> torch.Tensor:
            y = self.attention(x, context, cache)
            return self.adapter["attention"](y) if "attention" in self.adapter else y

        def feed_forward(x: torch.Tensor) -> torch.Tensor:
            y = self.moe(x, context.valid_SB, context.replayed_SBK) if self.is_moe else self.mlp(x)
            return self.adapter["mlp"](y) if "mlp" in self.adapter else y

        def drop_attention(x: torch.Tensor) -> torch.Tensor:
            return self.attention_dropout(x, context.samples)

        def drop_mlp(x: torch.Tensor) -> torch.Tensor:
            return self.mlp_dropout(x, context.samples)

        return self.residual(self, x_SBH, attend, feed_forward, drop_attention, drop_mlp)


class MTPBlock(Block):
    """A module of multi-token prediction (DeepSeek-V3, section 2.2): a block over hidden states and later tokens.

    Takes hidden states and the embeddings of the tokens to come, both [S, B, H], and gives normed hidden states, which
    the output head and the next module see.
    """

    def __init__(self, config: LayerConfig, context: LayerContext):
        super().__init__(config, context)
        self.embedding_norm, self.hidden_norm, self.output_norm = (
            norm_of(config.norm, config.hidden_size, context) for _ in range(3)
        )
        self.joint_proj = WholeLinear(2 * config.hidden_size, config.hidden_size, context)

    def forward(
        self,
        x_SBH: torch.Tensor,
        context: ForwardContext,
        cache: KVCache | None = None,
        embedded_SBH: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert embedded_SBH is not None, "a module of multi-token prediction sees later tokens"
        both = torch.cat((self.embedding_norm(embedded_SBH), self.hidden_norm(x_SBH)), dim=-1)
        return self.output_norm(super().forward(self.joint_proj(both), context, cache))


Map = Callable[[torch.Tensor], torch.Tensor]


def _pre(block: Block, x: torch.Tensor, attend: Map, feed_forward: Map, drop_1: Map, drop_2: Map) -> torch.Tensor:
    """Computes a block with norms before attention and MLP (GPT-2); `from_norm`: residuals start after them (BLOOM)."""
    normed = block.attention_norm(x)
    x = (normed if block.config.residual.from_norm else x) + drop_1(attend(normed))
    normed = block.mlp_norm(x)
    return (normed if block.config.residual.from_norm else x) + drop_2(feed_forward(normed))


def _post(block: Block, x: torch.Tensor, attend: Map, feed_forward: Map, drop_1: Map, drop_2: Map) -> torch.Tensor:
    """Computes a block with norms after each residual sum (Vaswani et al. 2017; GPT-1)."""
    x = block.attention_norm(x + drop_1(attend(x)))
    return block.mlp_norm(x + drop_2(feed_forward(x)))


def _sandwich(block: Block, x: torch.Tensor, attend: Map, feed_forward: Map, drop_1: Map, drop_2: Map) -> torch.Tensor:
    """Computes a block with norms before and after attention and MLP (Gemma 2, GLM-4-0414)."""
    x = x + drop_1(block.attention_output_norm(attend(block.attention_norm(x))))
    return x + drop_2(block.mlp_output_norm(feed_forward(block.mlp_norm(x))))


def _outputs(block: Block, x: torch.Tensor, attend: Map, feed_forward: Map, drop_1: Map, drop_2: Map) -> torch.Tensor:
    """Computes a block that norms the outputs of attention and MLP, and nothing else (OLMo 2)."""
    x = x + drop_1(block.attention_output_norm(attend(x)))
    return x + drop_2(block.mlp_output_norm(feed_forward(x)))


def _deepnorm(block: Block, x: torch.Tensor, attend: Map, feed_forward: Map, drop_1: Map, drop_2: Map) -> torch.Tensor:
    """Computes a block that adds to scaled normed states (DeepNorm, Wang et al. 2022, in GLM-130B's form)."""
    alpha = math.sqrt(2 * block.config.num_layers)
    normed = block.attention_norm(x)
    normed = block.mlp_norm(alpha * normed + drop_1(attend(normed)))
    return alpha * normed + drop_2(feed_forward(normed))


def _parallel(block: Block, x: torch.Tensor, attend: Map, feed_forward: Map, drop_1: Map, drop_2: Map) -> torch.Tensor:
    """Computes a block in which attention and MLP see the same states, each after its own norm (GPT-NeoX)."""
    return x + drop_1(attend(block.attention_norm(x))) + drop_2(feed_forward(block.mlp_norm(x)))


RESIDUALS: dict[str, Callable[..., torch.Tensor]] = {
    "pre": _pre,
    "post": _post,
    "sandwich": _sandwich,
    "outputs": _outputs,
    "deepnorm": _deepnorm,
    "parallel": _parallel,
}


def _at(wanted: torch.Tensor | None, x_SBH: torch.Tensor) -> torch.Tensor:
    """Returns hidden states as [B, S, H], or where only some positions are wanted, theirs as [N, H]."""
    x_BSH = x_SBH.transpose(0, 1)
    return x_BSH if wanted is None else x_BSH.flatten(0, 1).index_select(0, wanted)


class PositionEmbedding(nn.Module):
    """A learned vector for each of the first positions of a document (GPT); every rank holds all of them."""

    def __init__(self, max_positions: int, hidden_size: int, context: LayerContext):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_positions, hidden_size, dtype=context.dtype, device=context.device))
        mark(self.weight, Marks(partial="sequence"))
        self.tp_part = (context.tp_rank, context.tp_size) if context.sp else (0, 1)

    def forward(self, positions_SB: torch.Tensor) -> torch.Tensor:
        """Looks up vectors [S, B, H], with sequence parallel of this rank's part of the sequence."""
        rank, parts = self.tp_part
        return F.embedding(positions_SB.chunk(parts)[rank], self.weight)
