"""Strict base class of all config sections: unknown keys, wrong types and later changes are errors."""

import re
import types
import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

LONGEST_NAME = 100  # bytes; a file's name may have 255, and stages add to these names


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


def check_name(kind: str, name: str, becomes: str = "a folder", taken: Sequence[str] = ()) -> None:
    """Raises ValueError for a name that cannot be that of a folder, or is one of `taken`, which others have.

    `kind` ("source", for example) and `becomes`, which says what is named after it, are words for the message.
    """
    if not is_name(name):
        raise ValueError(f"{kind} name {name!r} becomes {becomes}: use letters, digits and _ only")
    if (size := len(name.encode())) > LONGEST_NAME:
        raise ValueError(
            f"{kind} name {name[:16]!r}... becomes {becomes}, and has {size} bytes: use {LONGEST_NAME} at most"
        )
    if name in taken:
        raise ValueError(
            f"{kind} name {name!r} becomes {becomes}, and a data run keeps other things in the folders "
            f"{', '.join(taken)}: choose another name, such as {name}_texts"
        )


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
