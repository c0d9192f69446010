"""Losses of reward models: Bradley-Terry of pairs, and cross entropy of classes.

Both judge a document at chosen positions, which the loss mask selects. A row holds whole pairs, the chosen side before
the rejected one, so that the selected positions of a micro-batch alternate. Both have the pair's loss; so each pair
counts once in the mean over the global batch, whatever the rows, micro-batches and ranks are.
"""

from typing import Protocol

import torch
import torch.nn.functional as F

from configs.reward_model import RewardSection
from pretrain.model.batch import Batch
from pretrain.model.losses import LossFunction

MARGIN = "margin"  # the name in `Batch.extra` of each pair's margin


def bradley_terry(
    chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor | float = 0.0, centring: float = 0.0
) -> torch.Tensor:
    """Returns -log sigmoid(chosen - rejected - margin) + centring * (chosen + rejected)^2 for each pair of rewards.

    The margin is Touvron et al.'s (2023, Llama 2), the second term Eisenstein et al.'s (2023).
    """
    return -F.logsigmoid(chosen - rejected - margin) + centring * (chosen + rejected).square()


class JudgedLoss(LossFunction, Protocol):
    """A loss whose model makes a decision at each selected position, with a confidence that can be held to account."""

    least_confidence: float  # of a decision: chance

    def decisions(self, values: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the confidence [N] of the decision at each of `batch.trained`, and whether it is right, bool [N]."""
        ...


class PreferenceLoss:
    """Bradley-Terry of the rewards [B, S] on the last tokens of both sides of each pair."""

    metrics: tuple[str, ...] = ("accuracy", "reward_chosen", "reward_rejected")
    temperature = 1.0
    is_linear = False
    least_confidence = 0.5

    def __init__(self, centring: float = 0.0):
        self.centring = centring

    def __call__(self, values_BS: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        chosen_P, rejected_P = _sides(values_BS, batch)
        margin_P, _ = _sides(batch.extra[MARGIN], batch)
        loss_P = bradley_terry(chosen_P, rejected_P, margin_P, self.centring)
        found = {
            "accuracy": (chosen_P > rejected_P).to(values_BS.dtype),
            "reward_chosen": chosen_P.detach(),
            "reward_rejected": rejected_P.detach(),
        }
        return _spread(_twice(loss_P), batch), {name: _spread(_twice(value), batch) for name, value in found.items()}

    def decisions(self, values_BS: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the confidence that the chosen side wins, for both positions of each pair, and whether it does."""
        chosen_P, rejected_P = _sides(values_BS, batch)
        confidence_P = torch.sigmoid((chosen_P - rejected_P).abs())
        return _twice(confidence_P), _twice(chosen_P > rejected_P)


class ClassLoss:
    """Cross entropy of the class, `batch.labels`, at the selected positions; the values are logits [B, S, K]."""

    metrics: tuple[str, ...] = ("accuracy",)
    temperature = 1.0
    is_linear = False

    def __init__(self, classes: int):
        self.least_confidence = 1 / classes

    def __call__(self, values_BSK: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logits_NK, labels_N = self._selected(values_BSK, batch)
        loss_N = F.cross_entropy(logits_NK, labels_N, reduction="none")
        right_N = (logits_NK.argmax(-1) == labels_N).to(values_BSK.dtype)
        return _spread(loss_N, batch), {"accuracy": _spread(right_N, batch)}

    def decisions(self, values_BSK: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the probability of the likeliest class at each selected position, and whether it is right."""
        logits_NK, labels_N = self._selected(values_BSK, batch)
        confidence_N, chosen_N = logits_NK.softmax(-1).max(-1)
        return confidence_N, chosen_N == labels_N

    def _selected(self, values_BSK: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return values_BSK.flatten(0, 1)[batch.trained], batch.labels.flatten()[batch.trained]


def loss_of(section: RewardSection) -> JudgedLoss:
    """Returns the loss that a config names."""
    if section.kind == "preference":
        return PreferenceLoss(section.centring)
    return ClassLoss(len(section.classes))


def _sides(values_BS: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the values [P] of the chosen and of the rejected sides of the batch's pairs."""
    pairs_P2 = values_BS.flatten()[batch.trained].view(-1, 2)
    return pairs_P2[:, 0], pairs_P2[:, 1]


def _twice(of_pair_P: torch.Tensor) -> torch.Tensor:
    """Repeats values of pairs [P] for both positions of each pair [2P]."""
    return of_pair_P.repeat_interleave(2)


def _spread(of_position_N: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Returns [B, S] with the values [N] at the selected positions, and zeros elsewhere."""
    nowhere = of_position_N.new_zeros(batch.labels.numel())
    return nowhere.index_copy(0, batch.trained, of_position_N).view_as(batch.labels)
