"""What a message tells its reader to do, taken out of it and done, word for word."""

import random
import re
from collections.abc import Callable, Iterator, Sequence

import pytest

from configs.loader import ConfigError

RANKS = "the number of ranks"
_KEY = r"((?:[a-z_]+\.)*[a-z_]+)"
Run = Callable[[int, Sequence[str]], None]  # of so many ranks, with overrides; ConfigError or nothing


def remedies(message: str) -> Iterator[tuple[str, str]]:
    """Yields each (key, value) that a message suggests; the value is empty where the key is to be left out."""
    for key, values in re.findall(rf"(the number of ranks|{_KEY[1:-1]}) could be (\w+(?: or \w+)*)", message):
        yield from ((key, value) for value in values.split(" or "))
    for key in re.findall(rf"leave out {_KEY}(?![\w.]| \()", message):
        yield key, ""
    for key, value in re.findall(rf"set {_KEY}=([^\s,;]+)", message):
        yield key, value


def refused(run: Run, ranks: int, overrides: Sequence[str]) -> str:
    """What a command says against its config; "" if it takes it."""
    try:
        run(ranks, overrides)
    except ConfigError as error:
        return str(error)
    return ""


def follow(run: Run, ranks: int, overrides: Sequence[str]) -> int:
    """Does one by one all that the message says about a config, if it is refused. Returns how many things it says.

    After each the config is legal, or the next message is about another key.
    """
    message = refused(run, ranks, overrides)
    told = list(remedies(message))
    for key, value in told:
        world = int(value) if key == RANKS else ranks
        changed = [one for one in overrides if not one.startswith(f"{key}=")]
        changed += [f"{key}={value}"] if value and key != RANKS else []
        after = refused(run, world, changed)
        assert key not in {other for other, _ in remedies(after)}, f"{message}\n{key} = {value}, and then:\n{after}"
    return len(told)


def drawn(draw: random.Random, choices: dict[str, Sequence[object]]) -> list[str]:
    """Overrides, a value drawn for each key; None leaves a key out."""
    picked = {key: draw.choice(values) for key, values in choices.items()}
    return [f"{key}={str(value).lower()}" for key, value in picked.items() if value is not None]


def torchrun_environment(patch: pytest.MonkeyPatch, ranks: int) -> None:
    """The variables of the first of so many ranks."""
    facts = {"RANK": 0, "WORLD_SIZE": ranks, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": 29500}
    for name, value in {**facts, "MASTER_ADDR": "127.0.0.1"}.items():
        patch.setenv(name, str(value))
