"""The input of one forward pass: tokens, labels, and the weights of their losses."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from pretrain.model.documents import Documents


@dataclass(frozen=True)
class Batch:
    """One micro-batch, [B, S] where nothing else is said; `data_pipeline.mixture.rows.Row` explains the values.

    `loss_mask` is float: RL weighs tokens with it. `advantages` and `logprobs` are RL's, else None.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    sources: torch.Tensor  # [B]
    trained: torch.Tensor  # [N] indices b * S + s where loss_mask is not 0: logits are computed there alone
    documents: Documents  # of whole rows, also where S is only a part of them (context parallel)
    samples: tuple[int, ...] | None = None  # the rows' numbers in the run
    advantages: torch.Tensor | None = None
    logprobs: torch.Tensor | None = None

    def weightless(self) -> "Batch":
        """Returns a batch of the same tokens whose losses all have weight zero."""
        return replace(self, loss_mask=torch.zeros_like(self.loss_mask), trained=self.trained[:0])

    def to(self, device: torch.device) -> "Batch":
        moved: dict[str, Any] = {k: tensor.to(device, non_blocking=True) for k, tensor in self._tensors().items()}
        return replace(self, **moved, documents=self.documents.to(device))

    def pin_memory(self) -> "Batch":
        """Copies the batch into host memory that a GPU can read by itself, so that `to` does not wait."""
        pinned: dict[str, Any] = {name: tensor.pin_memory() for name, tensor in self._tensors().items()}
        return replace(self, **pinned, documents=self.documents.pin_memory())

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if torch.is_tensor(getattr(self, f.name))}
