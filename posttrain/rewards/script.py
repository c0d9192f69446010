"""The reward for one language: the share of a completion's letters that are of one script.

It is a measure of DeepSeek-R1's reward for language consistency (2025, section 2.3.2), which counts words of the wanted
language; languages of one script, such as English and French, are not told apart.
"""

import unicodedata
from collections import Counter
from functools import lru_cache
from typing import Any

# Scripts that one language mixes: Japanese and Korean use Chinese characters too.
_EAST_ASIAN = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "IDEOGRAPHIC", "HALFWIDTH", "KANGXI")


def script(prompt: Any, completion: str, answer: Any, metadata: Any) -> float:
    """Returns the share of the letters that are of the commonest script; 1 for a text without letters."""
    return script_share(completion)


def script_share(text: str) -> float:
    """Returns the share of a text's letters that are of its commonest script; 1 for a text without letters."""
    counts = Counter(script for character in text if (script := _script(character)))
    return max(counts.values()) / counts.total() if counts else 1.0


@lru_cache(maxsize=65536)
def _script(character: str) -> str:
    """Returns the first word of a letter's Unicode name, which is its script; "" for a character that is no letter."""
    if not character.isalpha():
        return ""
    script = unicodedata.name(character, "").split(" ")[0]
    return "CJK" if script.startswith(_EAST_ASIAN) else script
