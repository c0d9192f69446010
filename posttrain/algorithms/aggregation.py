"""From losses per token to the one number of a global step, whatever the micro-batches and the ranks.

The trainer divides the weighted sum of a global step's token losses by the sum of the weights: never an
average of averages. What remains to choose is each token's weight, and one factor for the whole step.
"""

from enum import StrEnum


class Aggregation(StrEnum):
    """What every completion's loss is divided by."""

    TOKEN_MEAN = "token_mean"  # all tokens of the step weigh alike (DAPO, arXiv 2503.14476)
    SEQUENCE_MEAN = "sequence_mean"  # the mean of each completion's own mean (GRPO, arXiv 2402.03300)
    FIXED_LENGTH = "fixed_length"  # sum / (completions * longest allowed): no length bias (Dr.GRPO, 2503.20783)


def token_weight(length: int, aggregation: Aggregation) -> float:
    """The weight of each token of a completion of `length` tokens, the closing one included."""
    return 1.0 / length if aggregation == Aggregation.SEQUENCE_MEAN else 1.0


def step_factor(tokens: int, completions: int, max_length: int, aggregation: Aggregation) -> float:
    """What the step's weighted mean is multiplied by. `tokens` and `completions` count the whole global step;
    `max_length` is the longest completion allowed, in tokens.
    """
    if aggregation != Aggregation.FIXED_LENGTH or completions == 0:
        return 1.0
    return tokens / (completions * max_length)
