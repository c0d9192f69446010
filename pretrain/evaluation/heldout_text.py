"""Loss, perplexity and bits per byte of a plan's held-out text, by source and language, under a whole model.

The numbers of a source are those that `pretrain.heldout_loss.HeldoutLoss` gives in training for the same rows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from data_pipeline.mixture.rows import Plan, Row
from pretrain.data.batch_source import collate
from pretrain.heldout_loss import means
from pretrain.model import Decoder
from pretrain.model.batch import Batch
from pretrain.model.head_loss import HeadLoss

UNKNOWN = "unknown"  # language of a document whose data run identified none


@dataclass
class TextLoss:
    """Total loss of texts in nats, with the number of predicted tokens, of their bytes, and of documents."""

    loss: float = 0.0
    tokens: int = 0
    num_bytes: int = 0
    documents: int = 0

    def __add__(self, other: "TextLoss") -> "TextLoss":
        return TextLoss(
            self.loss + other.loss,
            self.tokens + other.tokens,
            self.num_bytes + other.num_bytes,
            self.documents + other.documents,
        )

    def measures(self) -> dict[str, float]:
        """Returns counts, mean loss, perplexity per token and, unless no token has bytes, bits per byte."""
        found = means(self.loss, self.tokens, self.num_bytes or None)
        perplexity = math.exp(min(found["loss"], 700.0))  # a greater one is no float
        counts = {"documents": self.documents, "tokens": self.tokens, "bytes": self.num_bytes}
        return {**counts, "loss": found.pop("loss"), "perplexity": perplexity, **found}


Tallies = dict[tuple[str, str], TextLoss]  # by source and language


class _PerToken:
    """Cross entropy of the next token that keeps the log-probability of each token of the last batch."""

    metrics: tuple[str, ...] = ()
    temperature = 1.0
    is_linear = True
    logprobs_BS: torch.Tensor

    def __call__(self, logprobs_BS: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.logprobs_BS = logprobs_BS
        return -logprobs_BS, {}


def count_rows(plan: Plan, most: int | None) -> dict[str, int]:
    """Returns the number of held-out rows of each source that are measured, at most `most` of each."""
    have = {source: plan.heldout_rows(source) for source in plan.sources}
    return {source: rows if most is None else min(most, rows) for source, rows in have.items()}


def heldout_text(
    decoder: Decoder,
    plan: Plan,
    most: int | None,
    batch_tokens: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Tallies:
    """Measures the first `most` held-out rows of each source, or all; `progress` is called with the rows of a batch.

    A document that is longer than a row is read in parts, and a part does not see the one before it.
    """
    found: Tallies = {}
    size = max(1, batch_tokens // plan.seq_length)
    for source, count in count_rows(plan, most).items():
        for first in range(0, count, size):
            numbers = range(first, min(first + size, count))
            rows = [plan.heldout_row(source, i) for i in numbers]
            for i, row, logprobs in zip(numbers, rows, token_logprobs(decoder, rows), strict=True):
                for segment, (language, begins) in enumerate(plan.heldout_segments(source, i)):
                    measured = _text_loss(row, logprobs, segment, begins, plan.token_bytes)
                    key = (source, language or UNKNOWN)
                    found[key] = found.get(key, TextLoss()) + measured
            progress(len(rows))
    return found


def token_logprobs(decoder: Decoder, rows: list[Row]) -> np.ndarray:
    """Returns the log-probability of each label [B, S] in fp64, 0 where the loss mask is 0."""
    device = next(decoder.parameters()).device
    batch = collate(rows).to(device)
    kept = _PerToken()
    with torch.inference_mode():
        loss = HeadLoss(batch, kept, 1.0, 1 + int(batch.sources.max()))
        decoder(batch.tokens, batch.positions, batch.segments, wanted=batch.trained, loss=loss)
    return kept.logprobs_BS.double().cpu().numpy()


def _text_loss(row: Row, logprobs_S: np.ndarray, segment: int, begins: bool, token_bytes: np.ndarray) -> TextLoss:
    """Returns the loss of one segment of a row; a document in several segments is counted in the first (`begins`)."""
    chosen = row.loss_mask & (row.segments == segment)
    return TextLoss(
        loss=-float(logprobs_S[chosen].sum()),
        tokens=int(chosen.sum()),
        num_bytes=int(token_bytes[row.labels[chosen]].sum()),
        documents=int(begins),
    )
