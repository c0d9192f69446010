"""Options of generation: how a next token is drawn, with the values that may be given, and how a model is split."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from configs.loader import ConfigError, from_overrides
from configs.section import Section
from configs.train import ParallelConfig

LEAST, MOST = 1e-6, 1e6  # logits divided or multiplied by numbers outside may leave the range of fp32


# What each option may be, and what to give instead of something else.
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "repetition_penalty": (
        lambda value: LEAST <= value <= MOST,
        f"give {LEAST:g} to {MOST:g}: 1 changes nothing, and 1.1 makes repeated tokens a little rarer",
    ),
    "temperature": (
        lambda value: value == 0 or LEAST <= value < math.inf,
        f"give 0, which always takes the likeliest token, or {LEAST:g} or more",
    ),
    "top_k": (lambda value: value >= 0, "give 1 or more, or 0 to keep all tokens"),
    "top_p": (lambda value: 0 < value <= 1, "give more than 0 and at most 1, which keeps all tokens"),
    "min_p": (lambda value: 0 <= value <= 1, "give a share from 0, which keeps all tokens, to 1"),
}


def check(name: str, value: float, spelled: str) -> None:
    """Raises ConfigError if the value of the option `name` is out of range; `spelled` is what the user calls it."""
    is_right, remedy = _RANGES[name]
    if not is_right(value):
        raise ConfigError(f"{spelled} {value:g} is out of range; {remedy}")


@dataclass(frozen=True)
class SamplingConfig:
    """Options of sampling, in the order in which `pretrain.generation.logits_filters.processed` applies them.

    `repetition_penalty` makes the tokens of a text, its prompt included, less likely. `temperature` divides the logits;
    at 0 the likeliest token is always taken, and the options below it count for nothing. `top_k` keeps so many tokens,
    or all at 0; `top_p` keeps the likeliest tokens that together have this share; `min_p` keeps the tokens that have at
    least this share of the likeliest token's probability. Raises ConfigError for a value out of range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            check(field.name, getattr(self, field.name), field.name + " =")


GREEDY = SamplingConfig(temperature=0.0)


class SplitKeys(Section):
    """The keys by which `trivium generate` and `trivium chat` split a model over ranks."""

    parallel: ParallelConfig = ParallelConfig()
    """Degrees of parallelism; `tp`, `ep` and `backend` alone."""


def split_keys(overrides: Sequence[str]) -> ParallelConfig:
    """Returns the degrees in `parallel.tp=2` and the like. Raises ConfigError for one that generation cannot use."""
    parallel = from_overrides(SplitKeys, overrides).parallel
    if other := sorted(parallel.model_fields_set - {"tp", "ep", "backend"}):
        raise ConfigError(
            f"parallel.{other[0]} = {getattr(parallel, other[0])} is for training; generation splits a model over "
            "parallel.tp and parallel.ep alone, whatever layout it was trained in: leave the key out"
        )
    return parallel
