"""The reward of the package reasoning-gym, whose datasets each have a scorer."""

import re
from typing import Any

from posttrain.rewards.unscorable import Unscorable


def gym(prompt: Any, completion: str, answer: Any, metadata: Any) -> float:
    """Returns the score, 0 to 1, that reasoning-gym gives to a completion, or to what it has in <answer> tags.

    The package is github.com/open-thought/reasoning-gym. A record is one of its entries as JSON: question, answer, and
    metadata with the name of its dataset under source_dataset; the prompt may be the question or messages.
    """
    from reasoning_gym import get_score_answer_fn

    facts = metadata.get("metadata", metadata)
    name = facts.get("source_dataset") if isinstance(facts, dict) else None
    if not name:
        raise Unscorable("no source_dataset in the record's metadata")
    try:
        scorer = get_score_answer_fn(name)
    except ValueError:
        raise Unscorable(f"reasoning-gym has no dataset {str(name)[:40]!r}") from None
    said = re.findall(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    entry = {"question": question, "answer": answer, "metadata": facts}
    return float(scorer(answer=(said[-1] if said else completion).strip(), entry=entry))
