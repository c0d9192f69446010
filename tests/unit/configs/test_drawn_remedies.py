"""Remedies in messages about configs drawn at random: each is parsed out of its message, applied, and mends that."""

import copy
import random
import re
import types
import typing
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from configs.kinds import schema_of
from configs.loader import ConfigError, validate
from configs.model import ModelConfig
from tests.remedies import changed, put, ways
from tests.training_configs import BASES

Leaf = tuple[tuple[str, ...], Any]  # a key's path, and the type of its values
NUMBERS: dict[Any, list[Any]] = {
    int: [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 64],
    float: [0.0, 0.1, 0.3, 0.5, 0.68, 0.9, 1.0, 1.5, 8.0],
}
TEXTS = ["a", "b/c", "", "http://h:1", "/a", "a:b", "#(.*)"]
PYDANTIC = re.compile(r"input should|unknown key|is missing|string should|give it \d|none of the types|a section, not")
SEVERAL = re.compile(r"; [a-z_.]+: ")  # faults of several sections in one message
SIZES = {"vocab_size": 64, "num_layers": 4, "hidden_size": 176, "ffn_hidden_size": 32, "num_heads": 4}
HEADS = {"nope_head_dim": 4, "rope_head_dim": 4, "v_head_dim": 4}
DELTA = {"num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 4, "value_head_dim": 4}
SCALING = {"factor": 2.0, "original_length": 8}
PARTS: list[dict[str, Any]] = [
    {},
    {"moe": {"num_experts": 4}},
    {"attention": {"latent": {"kv_rank": 8, **HEADS}}, "num_kv_heads": 4},
    {"attention": {"delta": DELTA}},
    {"layer_pattern": ["x"], "kinds": {"x": {}}},
    {"head": {"kind": "scalar"}},
    {"head": {"mtp_depth": 1}},
    {"position": {"kind": "learned", "max_positions": 8}},
    {"position": {"scaling": {"kind": "longrope", **SCALING}}},
]


def leaves(schema: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """Yields every key of a schema; the names below a table of sections are `x`."""
    for name, field in schema.model_fields.items():
        yield from _leaves(field.annotation, (*above, name))


def _leaves(kind: Any, path: tuple[str, ...]) -> Iterator[Leaf]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield from leaves(kind, path)
    elif origin in (typing.Union, types.UnionType):
        for one in arguments:
            yield from () if one is type(None) else _leaves(one, path)
    elif origin is dict:
        yield from _leaves(arguments[1], (*path, "x"))
    else:
        yield path, kind


def value(draw: random.Random, kind: Any) -> Any:
    """Draws a value of a key's type, legal or not."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is bool:
        return draw.random() < 0.5
    if kind in NUMBERS:
        return draw.choice(NUMBERS[kind])
    if origin is typing.Literal:
        return draw.choice(arguments)
    if origin is tuple:
        listed = [arguments[0]] * draw.choice([0, 1, 2, 2]) if arguments[-1] is Ellipsis else arguments
        return [value(draw, one) for one in listed]
    return draw.choice(TEXTS)


def refusal(schema: type[BaseModel], tree: dict[str, Any]) -> str:
    try:
        validate(schema, tree)
    except ConfigError as error:
        return str(error).removeprefix("config: ")
    return ""


def without_values(message: str) -> str:
    return re.sub(r"'[^']*'|\[[^\]]*\]|\d[\d.e-]*", "#", message)


def followed(schema: type[BaseModel], bases: list[dict[str, Any]], draws: int, own: str = "") -> set[str]:
    """Draws configs, follows every way that a message about one offers, and returns the messages without values.

    After each the config is accepted, or the next message is another one and does not change the same keys again.
    """
    draw, said = random.Random(7), set[str]()
    sections: dict[tuple[str, ...], list[Leaf]] = defaultdict(list)
    for leaf in leaves(schema):
        sections[leaf[0][:-1]].append(leaf)
    for _ in range(draws):
        tree = copy.deepcopy(draw.choice(bases))
        for section in draw.sample(list(sections), draw.choice([1, 1, 2])):
            for path, kind in draw.sample(sections[section], min(len(sections[section]), draw.choice([1, 2, 3]))):
                put(tree, path, value(draw, kind))
        message = refusal(schema, tree)
        if not message or PYDANTIC.search(message) or SEVERAL.search(message):
            continue
        for way in ways(message):
            said.add(without_values(message))
            stripped = {key.removeprefix(own): value for key, value in way.items()}
            after = refusal(schema, changed(tree, stripped, list(schema.model_fields), message))
            again = [key for other in ways(after) for key in other if key in way]
            if after and after.partition(": ")[0] != message.partition(": ")[0]:
                continue  # another section has a fault, which may be about a key of the same name
            assert not again and without_values(after) != without_values(message), f"{message}\n{way}, then:\n{after}"
    return said


def test_what_messages_about_a_model_offer_mends_it() -> None:
    bases = [SIZES | {"num_kv_heads": 2} | part for part in PARTS]
    assert len(followed(ModelConfig, bases, 1500, "model.")) > 15


@pytest.mark.parametrize(("kind", "least"), [(kind, {"launch": 0, "export": 0}.get(kind, 4)) for kind in BASES])
def test_what_messages_about_a_config_offer_mends_it(kind: str, least: int) -> None:
    said = followed(schema_of(kind), [BASES[kind]], 200)
    assert len(said) >= least
