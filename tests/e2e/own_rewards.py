"""Rewards of a user's own: functions of prompt, completion, answer and metadata."""

from typing import Any


def only_right(prompt: Any, completion: str, answer: Any, metadata: Any) -> float | None:
    """Returns 1 for the answer, and nothing for anything else."""
    return 1.0 if completion == answer else None


def right_or_wrong(prompt: Any, completion: str, answer: Any, metadata: Any) -> float:
    """Returns 1 for the answer, and 0 for anything else."""
    return float(completion == answer)
