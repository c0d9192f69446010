"""Held-out accuracy of a reward model, and whether its confidence can be believed (calibration).

Decisions are sorted into bins by their confidence. A model is calibrated if, in each bin, the share of right decisions
is the mean confidence. The expected calibration error is the mean distance of the two over all decisions (Naeini et
al. 2015; Guo et al. 2017).
"""

from collections.abc import Sequence

import torch

from data_pipeline.mixture.rows import Row
from posttrain.reward_model.reward_losses import JudgedLoss
from pretrain.heldout_loss import batches_of_rank
from pretrain.model.batch import Batch
from pretrain.parallel.engine import Engine

BINS = 5
SUMS = ("share", "confidence", "accuracy")  # of a bin


class BinnedLoss:
    """Loss that also logs how well confidence matches success.

    For each bin of confidence it logs the share of the decisions that fall into it, their mean confidence, and how
    many of them are right."""

    temperature = 1.0
    is_linear = False

    def __init__(self, loss: JudgedLoss):
        self.loss = loss
        self.metrics = (*loss.metrics, *(f"{name}_{number}" for name in SUMS for number in range(BINS)))

    def __call__(self, values: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss_BS, metrics = self.loss(values, batch)
        confidence_N, right_N = self.loss.decisions(values.detach(), batch)
        least = self.loss.least_confidence
        bin_N = ((confidence_N - least) / (1 - least) * BINS).long().clamp(0, BINS - 1)
        for number in range(BINS):
            inside_N = (bin_N == number).to(confidence_N.dtype)
            of_bin = {"share": inside_N, "confidence": inside_N * confidence_N, "accuracy": inside_N * right_N}
            for name in SUMS:
                nowhere = confidence_N.new_zeros(batch.labels.numel())
                spread = nowhere.index_copy(0, batch.trained, of_bin[name])
                metrics[f"{name}_{number}"] = spread.view_as(batch.labels)
        return loss_BS, metrics


class HeldoutJudgement:
    """Evaluator of held-out rows: loss, accuracy, expected calibration error, and a line for each bin of confidence."""

    def __init__(self, name: str, rows: Sequence[Row], loss: JudgedLoss):
        self.name, self.rows, self.loss = name, rows, BinnedLoss(loss)

    def __call__(self, engine: Engine) -> dict[str, dict[str, float]]:
        batches = batches_of_rank(self.rows, engine)
        if not batches:
            return {}
        sums = engine.evaluate(batches, self.loss)
        found = sums.metrics
        bins = [{name: found[f"{name}_{number}"] for name in SUMS} for number in range(BINS)]
        error = sum(abs(one["confidence"] - one["accuracy"]) for one in bins)
        own = {name: found[name] for name in self.loss.loss.metrics}
        result = {self.name: {"loss": sums.mean_loss, **own, "calibration_error": error}}
        least = self.loss.loss.least_confidence
        for number, one in enumerate(bins):
            low, high = (least + (1 - least) * edge / BINS for edge in (number, number + 1))
            if one["share"]:
                means = {"accuracy": one["accuracy"] / one["share"], "confidence": one["confidence"] / one["share"]}
                result[f"confidence {low:.2f} to {high:.2f}"] = {**means, "share": one["share"]}
        return result
