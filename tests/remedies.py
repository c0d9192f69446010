"""Parses the remedies out of an error message and applies them literally, to test that each one works."""

import random
import re
from collections.abc import Callable, Iterator, Sequence

import pytest

from configs.loader import ConfigError

RANKS = "the number of ranks"
_KEY = r"((?:[a-z_]+\.)*[a-z_]+)"
Run = Callable[[int, Sequence[str]], None]  # runs a command with (ranks, overrides); raises ConfigError


def remedies(message: str) -> Iterator[tuple[str, str]]:
    """Yields each (key, value) that a message suggests; the value is "" if the key is to be left out."""
    for key, values in re.findall(rf"(the number of ranks|{_KEY[1:-1]}) could be (\w+(?: or \w+)*)", message):
        yield from ((key, value) for value in values.split(" or "))
    for key in re.findall(rf"leave out {_KEY}(?![\w.]| \()", message):
        yield key, ""
    for key, value in re.findall(rf"set {_KEY}=([^\s,;]+)", message):
        yield key, value


def refused(run: Run, ranks: int, overrides: Sequence[str]) -> str:
    """Returns the message with which a command refuses its config, "" if it accepts the config."""
    try:
        run(ranks, overrides)
    except ConfigError as error:
        return str(error)
    return ""


def follow(run: Run, ranks: int, overrides: Sequence[str]) -> int:
    """Applies each remedy of a refused config alone and returns the number of remedies.

    Asserts that after each the config is accepted, or the next message does not suggest the same key again.
    """
    message = refused(run, ranks, overrides)
    suggested = list(remedies(message))
    for key, value in suggested:
        world = int(value) if key == RANKS else ranks
        changed = [one for one in overrides if not one.startswith(f"{key}=")]
        changed += [f"{key}={value}"] if value and key != RANKS else []
        after = refused(run, world, changed)
        assert key not in {other for other, _ in remedies(after)}, f"{message}\n{key} = {value}, and then:\n{after}"
    return len(suggested)


def drawn(draw: random.Random, choices: dict[str, Sequence[object]]) -> list[str]:
    """Returns overrides with a random value for each key; the value None leaves the key out."""
    picked = {key: draw.choice(values) for key, values in choices.items()}
    return [f"{key}={str(value).lower()}" for key, value in picked.items() if value is not None]


def torchrun_environment(patch: pytest.MonkeyPatch, ranks: int) -> None:
    """Sets torchrun's variables of the first of `ranks` ranks."""
    facts = {"RANK": 0, "WORLD_SIZE": ranks, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": 29500}
    for name, value in {**facts, "MASTER_ADDR": "127.0.0.1"}.items():
        patch.setenv(name, str(value))
