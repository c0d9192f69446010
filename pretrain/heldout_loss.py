"""Held-out loss and bits per byte of each source, computed in the layout of the training run."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from data_pipeline.mixture.rows import Plan, Row
from pretrain.data.batch_source import micro_batches
from pretrain.model.batch import Batch
from pretrain.model.losses import NextToken
from pretrain.parallel.engine import Engine


class Evaluator(Protocol):
    """A measurement taken every `eval.every` steps: {source or task: {measure: value}}.

    Collective: all ranks call it and get the same values.
    """

    def __call__(self, engine: Engine) -> dict[str, dict[str, float]]: ...


class HeldoutLoss:
    """Mean next-token loss of each source; with `token_bytes` also bits per byte, comparable between tokenizers.

    Bits per byte = total loss / ln 2 / UTF-8 bytes of the predicted tokens; special tokens are predicted but have no
    bytes. `rows` has each source's held-out rows, `token_bytes` [V] the number of bytes of each token; None, or zeros
    as of a tokenizer that is not lossless, gives no bits per byte.
    """

    def __init__(self, rows: dict[str, Sequence[Row]], token_bytes: np.ndarray | None = None):
        self.names, self.rows = list(rows), rows
        self.token_bytes = token_bytes if token_bytes is not None and token_bytes.any() else None

    @classmethod
    def of_plan(cls, plan: Plan, limit: int) -> "HeldoutLoss":
        """Builds the evaluator of the first `limit` held-out rows of every source of a plan."""
        rows: dict[str, Sequence[Row]] = {
            s: [plan.heldout_row(s, i) for i in range(min(limit, plan.heldout_rows(s)))] for s in plan.sources
        }
        return cls(rows, np.asarray(plan.token_bytes))

    def __call__(self, engine: Engine) -> dict[str, dict[str, float]]:
        rows = [replace(row, source=index) for index, name in enumerate(self.names) for row in self.rows[name]]
        batches = batches_of_rank(rows, engine)
        if not batches:
            return {}
        sums = engine.evaluate(batches, NextToken())
        num_bytes = self._num_bytes()
        result = {}
        for index, name in enumerate(self.names):
            loss, weight = float(sums.loss[index]), float(sums.weight[index])
            if weight:
                result[name] = means(loss, weight, num_bytes.get(name))
        return result

    def _num_bytes(self) -> dict[str, int]:
        if self.token_bytes is None:
            return {}
        return {
            name: int(sum(self.token_bytes[row.labels[row.loss_mask]].sum() for row in self.rows[name]))
            for name in self.names
        }


def batches_of_rank(rows: Sequence[Row], engine: Engine) -> list[Batch]:
    """Returns this rank's micro-batches of held-out rows, as many as every other data-parallel rank's.

    The last micro-batches are filled with rows whose loss mask is all zero.
    """
    if not rows:
        return []
    layout, size = engine.mesh.layout, engine.train_config.micro_batch_size
    blank = replace(rows[0], loss_mask=np.zeros_like(rows[0].loss_mask))
    filled = [*rows, *[blank] * (-len(rows) % (layout.dp * size))]
    share = len(filled) // layout.dp
    first = engine.mesh.dp_rank * share
    return micro_batches(filled[first : first + share], size, first)


def means(loss: float, weight: float, num_bytes: int | None) -> dict[str, float]:
    """Returns the mean of a total loss over predicted tokens, and over their bytes in bits if these are known."""
    result = {"loss": loss / weight}
    if num_bytes is not None:
        result["bits_per_byte"] = loss / math.log(2) / max(1, num_bytes)
    return result
