"""Differences between two configs, or other nested dicts, key by key."""

from collections.abc import Mapping
from typing import Any

Changes = dict[str, tuple[Any, Any]]  # dotted key -> (before, after); None for a missing key


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Changes:
    """Returns the keys of two nested dicts whose values differ, with both values."""
    old, new = flat(before), flat(after)
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of a nested dict by dotted key, without None and empty dicts."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found


def words(found: Changes) -> list[str]:
    """Formats each change as in `optimizer.lr 0.001 -> 0.01`."""
    return [f"{key} {_said(before)} -> {_said(after)}" for key, (before, after) in found.items()]


def _said(value: Any) -> str:
    return "unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
