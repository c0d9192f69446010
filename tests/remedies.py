"""Parses the remedies out of an error message and applies them literally, to test that each one works."""

import copy
import random
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from configs.loader import ConfigError

GONE = object()  # the value of a key that is to be left out
RANKS = "the number of ranks"
_KEY = r"((?:[a-z_]+\.)*[a-z_]+)"
_DOTTED = r"((?:[a-z_0-9]+\.)*[a-z_]+)"
_VALUE = r"(\[[^\]]*\]|'[^']*'|\"[^\"]*\"|[^\s,;]+)"
_NEXT_WAY = r"[;:] |, or | or (?=set |leave |[a-z_.]+=)|, (?=[a-z_.]+=[^;]*, or [a-z_.]+=)"
Run = Callable[[int, Sequence[str]], None]  # runs a command with (ranks, overrides); raises ConfigError


def remedies(message: str) -> Iterator[tuple[str, str]]:
    """Yields each (key, value) that a message suggests; the value is "" if the key is to be left out."""
    for key, values in re.findall(rf"(the number of ranks|{_KEY[1:-1]}) could be (\w+(?: or \w+)*)", message):
        yield from ((key, value) for value in values.split(" or "))
    for key in re.findall(rf"leave out {_KEY}(?![\w.]| \()", message):
        yield key, ""
    for key, value in re.findall(rf"set {_KEY}=([^\s,;]+)", message):
        yield key, value


def ways(message: str) -> list[dict[str, Any]]:
    """Returns each way that one sentence about a config offers: the keys that it sets, with their values, or GONE.

    It reads `set A=1 and B=2`, `leave out A`, `leave A and B out`, `A could be 1 or 2`, and `leave it out` for the key
    that the sentence begins with.
    """
    found: list[dict[str, Any]] = []
    for part in re.split(_NEXT_WAY, message):
        way: dict[str, Any] = {}
        if re.match(rf"(set |{_DOTTED}=)", part) or " and set " in part:
            way |= {key: _toml(value) for key, value in re.findall(rf"(?<![\w.]){_DOTTED}={_VALUE}", part)}
        way |= dict.fromkeys(re.findall(rf"leave out {_DOTTED}(?=$| and )", part), GONE)
        for keys in re.findall(r"leave ([a-z_.0-9]+(?: and [a-z_.0-9]+)*) out", part):
            way |= dict.fromkeys(keys.split(" and "), GONE)
        for key, values in re.findall(rf"{_DOTTED} could be (\S+(?: or \S+)*)", part):
            found += [{key: _toml(value)} for value in values.split(" or ")]
        for word in {"it", "them", "both"} & way.keys():
            del way[word]
            if word == "it" and (
                subject := re.search(rf"(?:^|: ){_DOTTED}(?= = | is | names | has | needs )", message)
            ):
                way[subject[1]] = GONE
        found += [way] if way else []
    return found


def changed(tree: Mapping[str, Any], way: Mapping[str, Any], known: Sequence[str], message: str) -> dict[str, Any]:
    """Returns a config's tree after one of `ways`; keys that are not `known` belong to the section before `message`."""
    edited = copy.deepcopy(dict(tree))
    for key, value in way.items():
        section = re.match(rf"{_DOTTED}: ", message)
        path = key if key.split(".")[0] in known or section is None else f"{section[1]}.{key}"
        put(edited, path.split("."), value)
    return edited


def put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Sets the value at `path`, or deletes it if it is GONE; sections on the way are made."""
    for name in path[:-1]:
        below = tree.get(name)
        tree[name] = below if isinstance(below, dict) else {}
        tree = tree[name]
    if value is GONE:
        tree.pop(path[-1], None)
    else:
        tree[path[-1]] = value


def _toml(text: str) -> Any:
    text = text if "(" in text else text.removesuffix(")")
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


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
