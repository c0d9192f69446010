"""Rule sets by name and definition, from rules.toml, and several of them made one.

Where two of them bound the same score, the stricter bound holds. What they mean by a word, a stop word or a C4
line has to be the same, or be said beside `use`.
"""

import difflib
import functools
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MEANINGS = ("splitter", "stop_words", "c4")


@functools.cache
def catalogue() -> dict[str, dict[str, Any]]:
    """name@definition -> keys of a rule set."""
    return tomllib.loads(Path(__file__).with_name("rules.toml").read_text(encoding="utf-8"))


def combined(names: Sequence[str], own: dict[str, Any]) -> dict[str, Any]:
    """The keys of all `names` together, then `own` over them, a bound's min and max each by itself.

    Errors: ValueError for an unknown name, or for sets that mean different things by a key that `own` leaves open.
    """
    merged: dict[str, Any] = {}
    said: dict[str, str] = {}
    for name in names:
        if name not in catalogue():
            close = difflib.get_close_matches(name, catalogue(), n=1, cutoff=0.3)
            raise ValueError(
                f"use names the rule set {name!r}, which does not exist"
                + (f"; did you mean {close[0]!r}?" if close else "")
                + f" Known: {', '.join(sorted(catalogue()))}"
            )
        for key, value in catalogue()[name].items():
            if key not in MEANINGS:
                merged[key] = _stricter(merged[key], value) if key in merged else value
            elif key in merged and merged[key] != value and key not in own:
                raise ValueError(
                    f"use = {list(names)} joins {said[key]} and {name}, which differ in {key}: {merged[key]!r} and "
                    f"{value!r}; write {key} = ... beside use to choose, or use sets of one definition"
                )
            else:
                merged[key], said[key] = value, name
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merged[key] | value if both else value
    return merged


def _stricter(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    chosen = one | other
    for side, choose in (("min", max), ("max", min)):
        if side in one and side in other:
            chosen[side] = choose(one[side], other[side])
    return chosen
