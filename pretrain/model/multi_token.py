"""Multi-token prediction: what its modules read and predict (DeepSeek-V3, arXiv 2412.19437, section 2.2).

Module k sees at each token the hidden state of the module before it, and the embedding of the token k tokens ahead; it
predicts the token after that one. The modules are blocks of `decoder.py`, and share the embedding and the output head.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ahead:
    """The part of a micro-batch for one module, [B, S] where nothing else is said.

    A token whose target lies in another document, or after the end of the row, is not valid: it is trained on nothing,
    and no token that is trained on sees it.
    """

    tokens: torch.Tensor  # the token k tokens ahead, and 0 after the end of the row
    labels: torch.Tensor  # the token after that one
    loss_mask: torch.Tensor  # that of the token k tokens ahead where valid, else 0
    valid: torch.Tensor  # whether the token k tokens ahead is of the same document
    trained: torch.Tensor  # [N] indices b * S + s where loss_mask is not 0

    @classmethod
    def of(
        cls, tokens: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor, segments: torch.Tensor, offset: int
    ) -> "Ahead":
        """Shifts whole rows [B, S] to the left by `offset` tokens; -1 in `segments` is padding."""
        there = torch.zeros_like(segments, dtype=torch.bool)
        there[:, :-offset] = (segments[:, offset:] == segments[:, :-offset]) & (segments[:, :-offset] >= 0)

        def ahead(x: torch.Tensor) -> torch.Tensor:
            shifted = torch.zeros_like(x)
            shifted[:, :-offset] = x[:, offset:]
            return shifted

        mask = ahead(loss_mask) * there
        return cls(ahead(tokens), ahead(labels), mask, there, mask.flatten().nonzero()[:, 0])

    def part(self, cut: Callable[[torch.Tensor], torch.Tensor]) -> "Ahead":
        """Returns the part of the rows that this rank has under context parallel, as `cut` takes it from a tensor."""
        mask = cut(self.loss_mask)
        trained = mask.flatten().nonzero()[:, 0]
        return Ahead(cut(self.tokens), cut(self.labels), mask, cut(self.valid), trained)

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Ahead":
        """Returns this object with `change` applied to each of its tensors."""
        return Ahead(**{name: change(tensor) for name, tensor in vars(self).items()})
