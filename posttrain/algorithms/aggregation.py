"""From losses per token to the one number of a global step, safe under micro-batches and data parallelism.

Averages of averages depend on how a batch was cut. So a micro-batch contributes a numerator and a
denominator; both are summed over the whole global step, and only then divided.
"""

from enum import StrEnum

from torch import Tensor


class Aggregation(StrEnum):
    """What every token's loss is divided by."""

    TOKEN_MEAN = "token_mean"  # all valid tokens of the step alike (DAPO)
    SEQUENCE_MEAN = "sequence_mean"  # the mean of each sequence's mean (the first GRPO paper)
    FIXED_LENGTH = "fixed_length"  # sum / (sequences * longest allowed): no length bias (Dr.GRPO)


def loss_terms(
    losses_BS: Tensor, mask_BS: Tensor, aggregation: Aggregation, max_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """(numerator, denominator) of a micro-batch that holds one sequence a row; both scalars.

    The step's loss is the sum of the numerators over the sum of the denominators. A row without a valid
    token is no sequence. `max_length` (tokens) is needed by `fixed_length` alone.
    """
    kept_BS = losses_BS * mask_BS  # callers keep losses finite under the mask: 0 * inf would be nan
    tokens_B = mask_BS.sum(1)
    sequences = (tokens_B > 0).sum()
    match Aggregation(aggregation):
        case Aggregation.TOKEN_MEAN:
            return kept_BS.sum(), tokens_B.sum()
        case Aggregation.SEQUENCE_MEAN:
            return (kept_BS.sum(1) / tokens_B.clamp(min=1)).sum(), sequences
        case Aggregation.FIXED_LENGTH:
            if max_length is None:
                raise ValueError("aggregation fixed_length needs max_length, the longest completion allowed")
            return kept_BS.sum(), sequences * max_length
