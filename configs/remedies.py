"""What can be done where values of a config do not fit together: the nearest ones that do, tried and not guessed."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any


class Misfit(Exception):
    """Why values do not fit together. `tried` has values that may mend it, by key; None stands for leaving it out."""

    def __init__(self, problem: str, tried: Mapping[str, Sequence[Any]]) -> None:
        super().__init__(problem)
        self.tried = tried


def could_be(key: str, present: Any, tried: Sequence[Any], fits: Callable[[Any], bool]) -> str:
    """Says which values of `key` would do if it alone were changed, two to either side of the present; "" for none."""
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
    """Says what to change about `misfit`: clauses of `could_be`, or that no key alone helps."""
    clauses = [could_be(key, present(key), tried, partial(fits, key)) for key, tried in misfit.tried.items()]
    if any(clauses):
        return ", or ".join(filter(None, clauses))
    return f"no other value of {' or '.join(misfit.tried)} alone is legal with the rest, so change more than one key"


def divisors(number: int, least: int = 1) -> list[int]:
    """The divisors of `number` that are `least` or more."""
    return [d for d in range(least, number + 1) if number % d == 0]


def multiples(unit: int, near: int) -> list[int]:
    """The multiples of `unit` around `near`."""
    return [unit * k for k in range(max(1, near // unit - 2), near // unit + 4)]
