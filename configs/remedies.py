"""Suggestions for config values that do not fit together: the nearest values that do, each tested."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

SEVERAL_KEYS = "change more than one key"


class Misfit(Exception):
    """A reason why values do not fit together. `tried` has values to try for each key; None leaves the key out."""

    def __init__(self, problem: str, tried: Mapping[str, Sequence[Any]]) -> None:
        super().__init__(problem)
        self.tried = tried


def could_be(key: str, present: Any, tried: Sequence[Any], fits: Callable[[Any], bool]) -> str:
    """Returns a clause naming values of `key` that fit if it alone changes, at most two on either side of the present.

    It is "" if no value in `tried` fits.
    """
    legal = [value for value in tried if value != present and fits(value)]
    if not legal:
        return ""
    if legal == [None]:
        return f"leave out {key}"
    if isinstance(legal[0], bool):
        return f"{key} could be {str(legal[0]).lower()}"
    near = sorted(legal)
    if present is not None:
        near = [value for value in near if value < present][-2:] + [value for value in near if value > present][:2]
    return f"{key} could be {' or '.join(map(str, near[:4]))}"


def remedies(misfit: Misfit, present: Callable[[str], Any], fits: Callable[[str, Any], bool]) -> str:
    """Returns what to change to mend `misfit`: the clauses of `could_be`, or that changing one key is not enough."""
    clauses = [could_be(key, present(key), tried, partial(fits, key)) for key, tried in misfit.tried.items()]
    if any(clauses):
        return ", or ".join(filter(None, clauses))
    return f"no other value of {' or '.join(misfit.tried)} alone fits the rest, so {SEVERAL_KEYS}"


def divisors(number: int, least: int = 1) -> list[int]:
    """Returns the divisors of `number` that are at least `least`."""
    return [d for d in range(least, number + 1) if number % d == 0]


def multiples(unit: int, near: int) -> list[int]:
    """Returns up to six positive multiples of `unit` around `near`."""
    return [unit * k for k in range(max(1, near // unit - 2), near // unit + 4)]
