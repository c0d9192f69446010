"""The reward for a pattern: a form that the completion must have, or a part of it that must be the answer."""

import re
from typing import Any

from posttrain.rewards.exact_answer import text_of


def regex(prompt: Any, completion: str, answer: Any, metadata: Any, pattern: str, ignore_case: bool = False) -> float:
    """Returns 1 if the completion has the form of the pattern, or says the answer in the pattern's group, else 0.

    Without a group, the whole completion must match, without regard to white space around it, as in DeepSeek-R1's
    reward for its form (2025, section 2.2.2). With a group, the first group of the last match is compared with the
    answer, as lm-evaluation-harness does for GSM8K. A dot matches line ends too.
    """
    compiled = re.compile(pattern, re.DOTALL | (re.IGNORECASE if ignore_case else 0))
    if not compiled.groups:
        return float(compiled.fullmatch(completion.strip()) is not None)
    said, right = None, text_of(answer)
    for match in compiled.finditer(completion):
        said = match[1]
    if said is None:
        return 0.0
    said = said.strip()
    return float(said.casefold() == right.casefold() if ignore_case else said == right)
