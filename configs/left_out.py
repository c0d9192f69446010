"""The value none, which leaves out a key that another part of the config sets, since TOML has no null.

`model.moe=none` makes a published mixture of experts dense, and `lines=none` takes back a section of the file. Keys
that may be any text, or have a choice named none, keep it as their value.
"""

import types
import typing
from enum import Enum
from typing import Any

from pydantic import BaseModel

from configs.section import section_in

NONE = "none"


def may_be_none(annotation: Any) -> bool:
    """Whether the value none leaves out a key of this type: the type allows None, and none means nothing else in it."""
    kinds = typing.get_args(annotation) if typing.get_origin(annotation) in (types.UnionType, typing.Union) else ()
    return type(None) in kinds and not any(map(_is_text, kinds))


def without_none(schema: type[BaseModel], tree: dict[str, Any]) -> dict[str, Any]:
    """Returns a config of this schema without the keys, and the named sections, that are none."""
    kept: dict[str, Any] = {}
    for key, value in tree.items():
        field = schema.model_fields.get(key)
        if field is None:
            kept[key] = value
            continue
        section, is_named = section_in(field.annotation)
        if value == NONE and may_be_none(field.annotation):
            continue
        if section is not None and isinstance(value, dict):
            if is_named:
                parts = {name: part for name, part in value.items() if part != NONE}
                value = {
                    n: without_none(section, part) if isinstance(part, dict) else part for n, part in parts.items()
                }
            else:
                value = without_none(section, value)
        kept[key] = value
    return kept


def _is_text(kind: Any) -> bool:
    if typing.get_origin(kind) is typing.Literal:
        return NONE in typing.get_args(kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return NONE in [member.value for member in kind]
    return kind is str
