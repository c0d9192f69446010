"""Strict base class of all config sections: unknown keys, wrong types and later changes are errors."""

import re
import types
import typing
from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of a `[section]` of a TOML file. It is frozen, so that a config never changes during a run.

    The string below a key is its description, one sentence that `trivium config --explain` prints.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def is_name(name: str) -> bool:
    """Whether a name is of letters, digits and _ alone, so that it can be a folder, a key and a part of an id."""
    return re.fullmatch(r"\w+", name) is not None


def bare(annotation: Any) -> Any:
    """Returns a type without "or None"."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        rest = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        return rest[0] if len(rest) == 1 else annotation
    return annotation


def section_in(annotation: Any) -> tuple[type[Section] | None, bool]:
    """Returns the section in a field's type (plain, optional, or value of a dict), and whether it is a dict's value."""
    kind = bare(annotation)
    if isinstance(kind, type) and issubclass(kind, Section):
        return kind, False
    if typing.get_origin(kind) is dict:
        return section_in(typing.get_args(kind)[1])[0], True
    return None, False
