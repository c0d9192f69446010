"""The reward for saying the answer and nothing else."""

from typing import Any

from posttrain.rewards.unscorable import Unscorable


def text_of(answer: Any) -> str:
    """Returns the answer as text, without white space around it. Raises Unscorable if it is no text and no number."""
    if answer is None:
        raise Unscorable("the problem has no answer")
    if isinstance(answer, list | dict):
        raise Unscorable(f"the answer is a {type(answer).__name__}, neither a text nor a number")
    return str(answer).strip()


def exact(prompt: Any, completion: str, answer: Any, metadata: Any, ignore_case: bool = False) -> float:
    """Returns 1 if the completion is the answer, without regard to white space around it, else 0.

    It is SQuAD's exact match (Rajpurkar et al. 2016) without its removal of articles and punctuation.
    """
    said, right = completion.strip(), text_of(answer)
    return float(said.casefold() == right.casefold() if ignore_case else said == right)
