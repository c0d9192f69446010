"""The reward for one language: the share of a completion's letters that are of one script.

It is a measure of DeepSeek-R1's reward for language consistency (2025, section 2.3.2), which counts words of the wanted
language; languages of one script, such as English and French, are not told apart.
"""

from typing import Any

from posttrain.rejection.text_measures import script_share


def script(prompt: Any, completion: str, answer: Any, metadata: Any) -> float:
    """Returns the share of the letters that are of the commonest script; 1 for a text without letters."""
    return script_share(completion)
