"""The reward for saying the answer and nothing else."""

from typing import Any

from posttrain.rewards.unscorable import Unscorable


def exact(prompt: Any, completion: str, answer: Any, metadata: Any, ignore_case: bool = False) -> float:
    """Returns 1 if the completion is the answer, without regard to white space around it, else 0.

    It is SQuAD's exact match (Rajpurkar et al. 2016) without its removal of articles and punctuation.
    """
    if answer is None:
        raise Unscorable("the problem has no answer")
    said, right = completion.strip(), str(answer).strip()
    return float(said.casefold() == right.casefold() if ignore_case else said == right)
