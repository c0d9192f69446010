"""The input of one forward pass: tokens, labels, and the weights of their losses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from pretrain.model.documents import Documents
from pretrain.model.multi_token import Ahead


@dataclass(frozen=True)
class Batch:
    """One micro-batch, [B, S] where nothing else is said; `data_pipeline.mixture.rows.Row` explains the values.

    `loss_mask` is float: RL weighs tokens with it. `extra` has what a loss function needs beside labels, by name, such
    as the advantages of RL; each is [B, S]. `ahead` is for modules of multi-token prediction, where they are trained.
    `experts`, int16 [B, S, L, k], are the experts that tokens go to in each of the L layers with a mixture; where they
    are -1, and where there are none, the layer's router chooses.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    sources: torch.Tensor  # [B]
    trained: torch.Tensor  # [N] indices b * S + s where loss_mask is not 0: logits are computed there alone
    documents: Documents  # of whole rows, also where S is only a part of them (context parallel)
    lengths: torch.Tensor  # of the whole document that each token is in
    samples: tuple[int, ...] | None = None  # the rows' numbers in the run
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)
    ahead: tuple[Ahead, ...] = ()
    experts: torch.Tensor | None = None

    def weightless(self) -> "Batch":
        """Returns a batch of the same tokens whose losses all have weight zero."""
        return replace(self, loss_mask=torch.zeros_like(self.loss_mask), trained=self.trained[:0])

    def with_contexts(self) -> "Batch":
        """Returns a batch of whole rows whose documents know their contexts, by the loss mask."""
        return replace(self, documents=self.documents.with_contexts(self.loss_mask))

    def with_ahead(self, depth: int) -> "Batch":
        """Returns a batch of whole rows with the inputs and labels of `depth` modules of multi-token prediction."""
        rows = self.tokens, self.labels, self.loss_mask, self.segments
        return replace(self, ahead=tuple(Ahead.of(*rows, offset=i + 1) for i in range(depth)))

    def of_module(self, index: int) -> "Batch":
        """Returns the batch with the labels of a module of multi-token prediction in place of the model's."""
        own = self.ahead[index]
        return replace(self, labels=own.labels, loss_mask=own.loss_mask, trained=own.trained, extra={}, ahead=())

    def to(self, device: torch.device) -> "Batch":
        moved = self._mapped(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(self, **moved, documents=self.documents.to(device))

    def pin_memory(self) -> "Batch":
        """Copies the batch into host memory that a GPU can read by itself, so that `to` does not wait."""
        return replace(self, **self._mapped(torch.Tensor.pin_memory), documents=self.documents.pin_memory())

    def _mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        """Returns the fields that are or hold tensors, with `change` applied to each tensor."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in own.items() if torch.is_tensor(value)}
        changed["ahead"] = tuple(part.mapped(change) for part in self.ahead)
        return changed | {"extra": {name: change(tensor) for name, tensor in self.extra.items()}}
