"""Keys of config.json, each read into Trivium's `[model]` section and written from it by one table entry.

A `Draft` is a config.json while it is read: it collects the fields of `[model]`, and everything that is wrong.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from configs.model import ModelConfig

REQUIRED: Any = object()  # in place of a value: config.json must have the key
SAME: Any = object()  # in place of a value: null means the same as a key that is absent


class Watched(dict[str, Any]):
    """A config.json that remembers which key was read last, for the message about a value of a wrong kind."""

    last = ""

    def __getitem__(self, key: str) -> Any:
        self.last = key
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.last = key
        return super().get(key, default)


@dataclass
class Draft:
    """A config.json while it is read.

    `fields` becomes the `[model]` section, unless it is `incomplete`; `problems` are sentences.
    """

    raw: Mapping[str, Any]
    architecture: str
    fields: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    incomplete: bool = False

    def put(self, key: str, value: Any) -> None:
        """Sets a dotted key of `[model]`."""
        *parents, leaf = key.split(".")
        node = self.fields
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value

    def value(self, name: str, absent: Any = None, null: Any = SAME) -> Any:
        """Returns a value of config.json, or what transformers takes where it is absent or null."""
        found = self.raw.get(name, SAME)
        if found is None:
            found = null
        if found is SAME:
            found = absent
        return found(self.raw) if callable(found) else found

    def lack(self, name: str, why: str) -> None:
        """Adds the problem that a key is not there, without which no model can be described."""
        self.problems.append(f"config.json: {name} is missing; {why}")
        self.incomplete = True

    def refuse(self, name: str, value: Any, expected: str) -> None:
        """Adds the problem that Trivium cannot compute what this value means."""
        self.problems.append(
            f"config.json: {name} = {value!r} is not supported in {self.architecture}; expected {expected}"
        )


class ConfigKey(Protocol):
    """A part of config.json that is read into `[model]` and written from it."""

    def read(self, draft: Draft) -> None:
        """Fills the draft's `[model]` section from config.json, key by key."""

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Returns the keys of config.json for a model, as near as the family comes to it."""


@dataclass(frozen=True)
class MappedKey:
    """A key of config.json that means the same as keys of `[model]`.

    `absent` is what transformers takes where the key is absent, a value or a function of config.json, and `null` the
    same for a null. `values` translates their values into ours; of several for one of ours the first is written.
    `also` are other names of the key: read where `theirs` is absent, and written too. `get` computes the written value
    from the model where it is no single key.
    """

    theirs: str
    ours: str | tuple[str, ...]
    absent: Any = REQUIRED
    null: Any = SAME
    values: Mapping[Any, Any] | None = None
    also: tuple[str, ...] = ()
    get: Callable[[ModelConfig], Any] | None = None
    number: Callable[[Any], Any] | None = None

    def read(self, draft: Draft) -> None:
        name = next((name for name in (self.theirs, *self.also) if name in draft.raw), self.theirs)
        value = draft.value(name, self.absent, self.null)
        if value is REQUIRED:
            return draft.lack(self.theirs, f"transformers' {draft.architecture} writes it")
        if self.values is not None:
            if isinstance(value, (list, dict)) or value not in self.values:
                return draft.refuse(name, value, " or ".join(map(repr, self.values)))
            value = self.values[value]
        if self.number is not None and isinstance(value, (int, float)):
            value = self.number(value)
        if value is not None:
            for key in (self.ours,) if isinstance(self.ours, str) else self.ours:
                draft.put(key, value)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        if self.get is not None:
            value = self.get(config)
        else:
            value = dig(config, self.ours if isinstance(self.ours, str) else self.ours[0])
        if self.values is not None:
            value = next((theirs for theirs, ours in self.values.items() if ours == value), None)
        return dict.fromkeys((self.theirs, *self.also), value)


@dataclass(frozen=True)
class Fixed:
    """A key of config.json that has one value in every model that Trivium can compute.

    `accepted` are further values that mean the same. With `free`, the key changes nothing that is computed, and any
    value is read. Without `written`, the key is refused at other values and never written.
    """

    theirs: str
    value: Any
    accepted: tuple[Any, ...] = ()
    free: bool = False
    written: bool = True

    def read(self, draft: Draft) -> None:
        value = draft.raw.get(self.theirs, self.value)
        if not self.free and value != self.value and value not in self.accepted:
            draft.refuse(self.theirs, value, repr(self.value))

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.theirs: self.value} if self.written else {}


@dataclass(frozen=True)
class Custom:
    """Keys of config.json that need functions of their own to be read and written."""

    read: Callable[[Draft], None]
    write: Callable[[ModelConfig], dict[str, Any]]


def dig(config: ModelConfig, key: str) -> Any:
    """Returns the value of a dotted key of the model, or None where a section on the way is absent."""
    node: Any = config
    for part in key.split("."):
        node = getattr(node, part) if node is not None else None
    return node


def shortest_pattern(kinds: list[str]) -> list[str]:
    """Returns the shortest list that gives the kinds of all layers when it is repeated."""
    for length in range(1, len(kinds)):
        if all(kind == kinds[i % length] for i, kind in enumerate(kinds)):
            return kinds[:length]
    return kinds
