"""The facts that all layers share in the forward pass of one micro-batch; made once, and never changed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F

from configs.model import LayerConfig, ModelConfig
from configs.model_parts import PositionConfig
from pretrain.model.batch import Batch
from pretrain.model.documents import Documents
from pretrain.model.kv_cache import KVCache, Tables
from pretrain.model.rotary import depends_on_length, rotary_angles


@dataclass(frozen=True)
class VirtualTokens:
    """Trained virtual tokens before every document, which have positions 0 to `count` - 1.

    They are keys and values of each layer, or with `in_rows` vectors that pass through the layers in front of the rows.
    Since attention is causal, what the layers make of them is the same for every document of a row.
    """

    count: int = 0
    in_rows: bool = False

    def positions(self, positions_BS: torch.Tensor, begins: bool) -> torch.Tensor:
        """Shifts positions by the number of virtual tokens, and adds theirs where they lead a pass that `begins`."""
        if not self.count:
            return positions_BS
        own = torch.arange(self.count, device=positions_BS.device).expand(len(positions_BS), -1)
        shifted = positions_BS + self.count
        return torch.cat((own, shifted), 1) if self.in_rows and begins else shifted


NO_TOKENS = VirtualTokens()


@dataclass(frozen=True)
class ForwardContext:
    """Everything that all layers share in the forward pass of one micro-batch, the chunks of a pipeline included.

    `rotary` has cos and sin [S, B, 1, rotated elements] by the kind of a layer, of the kinds that rotate. `documents`
    are the parts of rows that attention stays in, None where every row is one document; under context parallel they
    are those of whole rows, and `documents_TB` numbers them by token, for gated delta nets, where a model has such.
    `valid_SB` is False for padding; None means that there is none. `samples` [B], on the
    host, are the numbers of the rows in the training run, from which dropout draws its masks. `virtual` are virtual
    tokens, and `prepended` is how many of them are in front of the rows of this pass. `experts` has, by the index of a
    layer, the experts [S, B, k] that its tokens go to where the router shall not choose, see `Batch.experts`;
    `replayed_SBK` are those of the layer that `of_layer` is for.
    """

    positions_SB: torch.Tensor
    rotary: Tables
    documents: Documents | None = None
    documents_TB: torch.Tensor | None = None
    valid_SB: torch.Tensor | None = None
    samples: torch.Tensor | None = None
    virtual: VirtualTokens = NO_TOKENS
    prepended: int = 0
    experts: Mapping[int, torch.Tensor] = field(default_factory=dict)
    replayed_SBK: torch.Tensor | None = None

    def of_layer(self, index: int) -> "ForwardContext":
        """Returns what one layer gets. Its index is no part of that, or compiled code would be made for each layer."""
        return replace(self, replayed_SBK=self.experts[index]) if index in self.experts else self

    @classmethod
    def of_batch(cls, config: ModelConfig, batch: Batch, virtual: VirtualTokens = NO_TOKENS) -> "ForwardContext":
        """Makes the context of a training batch; documents are those of whole rows, even if it has a part of each."""
        samples = None if batch.samples is None else torch.tensor(batch.samples)
        positions = virtual.positions(batch.positions, begins=True)
        valid, prepended = batch.segments >= 0, virtual.count if virtual.in_rows else 0
        # All documents of a row share its virtual tokens, which count as a document of their own.
        lengths = F.pad(batch.lengths + virtual.count, (prepended, 0), value=virtual.count)
        tables = _tables(config, positions, lengths)
        valid_SB = F.pad(valid, (prepended, 0), value=True).t()
        experts: dict[int, torch.Tensor] = {}
        if batch.experts is not None:
            by_layer = F.pad(batch.experts.long().permute(2, 1, 0, 3), (0, 0, 0, 0, prepended, 0), value=-1)
            layers = [layer.index for layer in config.layers if layer.moe]
            experts = dict(zip(layers, by_layer, strict=True))
        numbers = batch.documents.numbers(len(batch.tokens)) if config.has_deltas else None
        return cls(positions.t(), tables, batch.documents, numbers, valid_SB, samples, virtual, prepended, experts)

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        positions_BS: torch.Tensor,
        segments_BS: torch.Tensor | None = None,
        cache: KVCache | None = None,
        virtual: VirtualTokens = NO_TOKENS,
        contexts_B: torch.Tensor | None = None,
    ) -> "ForwardContext":
        """Makes the context of whole rows; -1 in `segments_BS` is padding, and None means one document a row.

        `contexts_B` says how many of the first tokens of each row attend to one another in both directions, in layers
        with the pattern `prefix`. By default none do, but where rows of a cache are started, all do.
        """
        begins = cache is None or positions_BS.shape[1] > 1
        positions_BS, prepended = virtual.positions(positions_BS, begins), virtual.count * (virtual.in_rows and begins)
        valid_SB = None if segments_BS is None else F.pad(segments_BS >= 0, (prepended, 0), value=True).t()
        documents = None
        if segments_BS is not None and (cache is None or config.has_contexts):
            documents = Documents.of(segments_BS)
            if config.has_contexts and cache is not None:
                contexts_B = (segments_BS >= 0).sum(1)
            if config.has_contexts and contexts_B is not None:
                slots = torch.arange(segments_BS.shape[1])
                documents = documents.with_contexts(slots >= contexts_B.cpu()[:, None] - 1)
        lengths = partial(_lengths, positions_BS, documents, valid_SB, virtual.count, prepended)
        if cache is not None:
            cache.begin(positions_BS, documents)
            tables = _cached_tables(config, positions_BS, cache, lengths)
        else:
            tables = _tables(config, positions_BS, lengths())
        numbers = documents.numbers(len(positions_BS)) if documents is not None and config.has_deltas else None
        return cls(positions_BS.t(), tables, documents, numbers, valid_SB, None, virtual, prepended)


def _lengths(
    positions_BS: torch.Tensor, documents: Documents | None, valid_SB: torch.Tensor | None, count: int, prepended: int
) -> torch.Tensor:
    """Returns [B, S], the length of the document that each token is in, with `count` virtual tokens before it.

    Where `documents` is None, a row is one document, which may go on in it, and padding.
    """
    if documents is not None:
        lengths_BS = documents.lengths().view(len(positions_BS), -1) + count
    else:
        ends = positions_BS + 1 if valid_SB is None else (positions_BS + 1) * valid_SB.t()
        lengths_BS = ends.amax(1, keepdim=True).expand(-1, positions_BS.shape[1] - prepended)
    return F.pad(lengths_BS, (prepended, 0), value=count)


def _tables(config: ModelConfig, positions_BS: torch.Tensor, lengths_BS: torch.Tensor) -> Tables:
    """Computes the rotary tables of every kind of layer; kinds that rotate alike share theirs."""
    tables: Tables = {}
    made: dict[PositionConfig, tuple[torch.Tensor, torch.Tensor]] = {}
    for layer in {layer.kind: layer for layer in config.layers}.values():
        if layer.position.kind != "rotary":
            continue
        if layer.position not in made:
            made[layer.position] = rotary_angles(positions_BS, layer.position, rotated_size(layer), lengths_BS)
        tables[layer.kind] = made[layer.position]
    return tables


def _cached_tables(
    config: ModelConfig, positions_BS: torch.Tensor, cache: KVCache, lengths: Callable[[], torch.Tensor]
) -> Tables:
    """Looks rotary tables up among those of all slots, where one token continues each row; else computes them."""
    if not cache.continues or any(depends_on_length(layer.position) for layer in config.layers):
        return _tables(config, positions_BS, lengths())
    if not cache.tables:
        slots = torch.arange(cache.slots, device=positions_BS.device)[None]
        cache.tables = _tables(config, slots, slots)
    own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # kinds of layers that rotate alike share theirs
    for tables in cache.tables.values():
        if id(tables) not in own:
            cos, sin = (table.index_select(0, positions_BS[:, 0]).transpose(0, 1) for table in tables)
            own[id(tables)] = cos, sin
    return {kind: own[id(tables)] for kind, tables in cache.tables.items()}


def rotated_size(layer: LayerConfig) -> int:
    """Number of elements of a head that positions rotate."""
    if latent := layer.attention.latent:
        return latent.rope_head_dim
    return round(layer.head_dim * layer.position.fraction)
