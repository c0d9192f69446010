"""Reference of all config keys (`trivium config --explain pretrain`), made from the schemas.

It lists every key by its dotted name, with type, bounds, default and the sentence below it in the code, so it is never
out of date.
"""

import difflib
import functools
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from configs.kinds import schema_of
from configs.loader import ConfigError
from configs.section import Section, bare, section_in

NAME = "NAME"  # stands for a name that the user chooses, as in sources.NAME.files
_WORDS = {str: "string", int: "integer", float: "number", bool: "true or false"}
_BOUNDS = {"ge": ">= {}", "gt": "> {}", "le": "<= {}", "lt": "< {}"}
REQUIRED, LEFT_OUT, OPTIONAL, AS = "required", "left out", "optional", "as "  # in place of a default
INDENT = "    "


@dataclass(frozen=True)
class Key:
    """One key or section of the reference. `default` is a TOML value, or begins with REQUIRED, LEFT_OUT, or AS."""

    name: str
    kind: str  # type and bounds; "" for a section
    default: str
    text: str

    def __str__(self) -> str:
        if not self.kind:
            return f"[{self.name}] ({self.default})\n{textwrap.indent(self.text, INDENT)}"
        default = self.default if self.default.startswith((REQUIRED, LEFT_OUT, AS)) else f"default {self.default}"
        return f"{self.name} = {self.kind} ({default})\n{textwrap.indent(self.text, INDENT)}"


def keys_of(schema: type[Section], prefix: str = "", like: str = "") -> Iterator[Key]:
    """Yields every key and section below `schema`, in the order of the code but plain keys before sections.

    If `like` is set, it is the prefix of the section whose values are the defaults of this one's keys.
    """
    sections = []
    for name, field in schema.model_fields.items():
        section, named = section_in(field.annotation)
        if section and not _is_inline(section):
            sections.append((f"{prefix}{name}", field, section, named))
            continue
        key = f"{prefix}{name}.{NAME}" if typing.get_origin(bare(field.annotation)) is dict else f"{prefix}{name}"
        yield Key(key, _kind(field), f"{AS}{like}{name}" if like else _default(field), sentence(field))
    for name, field, section, named in sections:
        whole = f"{name}.{NAME}" if named else name
        default = _default(field)
        text, about = sentence(field), inspect.getdoc(section) or ""
        text = about if about.startswith(text.rstrip(".")) else f"{text}\n{about}"
        yield Key(whole, "", default if default in (REQUIRED, LEFT_OUT) else OPTIONAL, text)
        yield from keys_of(section, f"{whole}.", prefix if issubclass(schema, section) else "")


def explain(name: str, prefix: str = "") -> str:
    """Returns the reference of one kind of config, or the part of it at or below the key `prefix`.

    Raises ConfigError if there is no such key.
    """
    keys = _all_keys(name)
    chosen = _chosen(keys, prefix.split(".")) if prefix else keys
    if not chosen:
        raise ConfigError(f"{name} has no key {prefix!r}; {_nearest(prefix, keys)}")
    return "\n".join(("\n" if key.kind == "" and key is not chosen[0] else "") + str(key) for key in chosen)


def sentence(field: FieldInfo) -> str:
    """Returns a key's description on one line."""
    return " ".join((field.description or "").split())


def toml_value(value: Any) -> str:
    """Formats a value as TOML, on one line."""
    if isinstance(value, dict):
        pairs = ", ".join(f"{key} = {toml_value(inner)}" for key, inner in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, Enum):
        return toml_value(value.value)
    return json.dumps(value, ensure_ascii=False)


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return REQUIRED
    return LEFT_OUT if value is None else OPTIONAL if isinstance(value, Section) else toml_value(value)


def _kind(field: FieldInfo) -> str:
    bounds, length = [], ""
    for constraint in field.metadata:
        bounds += [text.format(getattr(constraint, at)) for at, text in _BOUNDS.items() if hasattr(constraint, at)]
        if hasattr(constraint, "min_length"):
            length = ", not empty" if field.annotation is str else f", {constraint.min_length} or more"
        if getattr(constraint, "pattern", None):
            bounds.append(f"matching {constraint.pattern}")
    return " ".join([_type(bare(field.annotation)), " and ".join(bounds)]).strip() + length


def _type(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(map(toml_value, inner))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type(kind) for kind in inner)
    if origin is dict:
        keys = f", {NAME} one of {', '.join(typing.get_args(inner[0]))}" if typing.get_args(inner[0]) else ""
        return _type(inner[1]) + keys
    if origin in (list, tuple):
        if origin is tuple and inner[-1] is not Ellipsis:
            return f"[{', '.join(map(_type, inner))}]"
        return f"list of {_type(inner[0])}" if inner[0] not in _WORDS else f"list of {_WORDS[inner[0]]}s"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return f"{{ {', '.join(f'{name} = {_kind(field)}' for name, field in annotation.model_fields.items())} }}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " | ".join(toml_value(member.value) for member in annotation)
    return _WORDS[annotation]


def _is_inline(section: type[Section]) -> bool:
    """Whether a section is written as an inline table, as a bound is: { min = 1, max = 2 }."""
    return all(field.default is None and field.annotation == float | None for field in section.model_fields.values())


@functools.cache
def _all_keys(name: str) -> tuple[Key, ...]:
    return tuple(keys_of(schema_of(name)))


def _chosen(keys: Sequence[Key], prefix: Sequence[str]) -> list[Key]:
    """Returns the keys at or below `prefix`; for NAME in a key, `prefix` may have NAME, any name, or nothing."""
    short = [[part for part in key.name.split(".") if part != NAME] for key in keys]
    named = [key.name.split(".") for key in keys]
    for all_parts in (short, named):
        found = [key for key, parts in zip(keys, all_parts, strict=True) if _begins(parts, prefix)]
        # The bounds of a rule (min, max) have no entry of their own; they are part of the rule's line.
        found = found or [
            key
            for key, parts in zip(keys, all_parts, strict=True)
            if len(prefix) > 1 and _begins(parts, prefix[:-1]) and f" {prefix[-1]} = " in key.kind
        ]
        if found:
            return found
    return []


def _begins(parts: Sequence[str], prefix: Sequence[str]) -> bool:
    return len(parts) >= len(prefix) and all(part in (one, NAME) for part, one in zip(parts, prefix, strict=False))


def _nearest(prefix: str, keys: Sequence[Key]) -> str:
    names = [key.name for key in keys]
    same = [name for name in names if name.split(".")[-1] == prefix.split(".")[-1]]
    close = same or difflib.get_close_matches(prefix, names, n=3)
    if close:
        return f"did you mean {' or '.join(close[:3])}?"
    return f"its sections and keys begin with: {', '.join(dict.fromkeys(name.split('.')[0] for name in names))}"
