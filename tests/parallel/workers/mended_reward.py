"""A reward function of a user that fails on what a model writes until it is mended: until a certain file is there."""

from pathlib import Path
from typing import Any


def score(prompt: str, completion: str, answer: str, metadata: dict[str, Any]) -> float:
    """Returns 1 for the answer, on which it is tried at the start; for others, until it is mended, NaN or an error."""
    if completion != answer and not Path(metadata["mended"]).exists():
        return float("nan") if metadata["number"] % 2 else float(metadata["no such key"])
    return float(completion == answer)
