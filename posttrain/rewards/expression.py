"""The reward for another expression of an answer's digits: the answer "3*5+7" is as right as "7+5*3"."""

import re
from typing import Any

from posttrain.rewards.unscorable import Unscorable
from posttrain.tasks.countdown import value_of


def expression(prompt: Any, completion: str, answer: Any, metadata: Any) -> float:
    """Returns 1 if the completion has the numbers of the answer, each as often, and the same value, else 0.

    Signs are +, - and *, and there may be parentheses, as in the task countdown.
    """
    try:
        right = value_of(str(answer))
    except ValueError:
        raise Unscorable("the answer is no expression of +, - and *") from None
    try:
        said = value_of(completion.strip())
    except ValueError:
        return 0.0
    return float(said == right and _numbers(completion) == _numbers(str(answer)))


def _numbers(text: str) -> list[str]:
    return sorted(re.findall(r"[0-9]+", text))
