"""The reward for an answer that is equal as mathematics, by the package math-verify."""

from typing import Any

from posttrain.rewards.unscorable import Unscorable

_DELIMITERS = ("$", "\\boxed", "\\(", "\\[")


def mathematics(prompt: Any, completion: str, answer: Any, metadata: Any) -> float:
    """Returns 1 if the last formula or number of the completion equals the answer, else 0.

    The package is Hugging Face's math-verify (github.com/huggingface/Math-Verify). An answer that it cannot read makes
    the attempt unscorable, as in TRL's and open-r1's accuracy reward; a completion that it cannot read is wrong.
    """
    from math_verify import parse, verify

    text = str(answer).strip()
    right = parse(text if any(sign in text for sign in _DELIMITERS) else f"${text}$", parsing_timeout=None)
    if not right:
        raise Unscorable("the answer is no mathematics")
    # Without time limits of its own, which use signals: the process has one.
    return float(verify(right, parse(completion, parsing_timeout=None), timeout_seconds=None))
