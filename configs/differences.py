"""What differs between two configs, or two plain descriptions of anything: key by key, in words."""

from collections.abc import Mapping
from typing import Any

Changes = dict[str, tuple[Any, Any]]  # by dotted key: before, after; None where there was or is no such key


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Changes:
    """Keys of nested dicts whose values are not the same."""
    old, new = flat(before), flat(after)
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested dicts by dotted key, without those that are None or empty dicts."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found


def words(found: Changes) -> list[str]:
    """`optimizer.lr 0.001 -> 0.01` of each."""
    return [f"{key} {_said(before)} -> {_said(after)}" for key, (before, after) in found.items()]


def _said(value: Any) -> str:
    return "unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
