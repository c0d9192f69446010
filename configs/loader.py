"""Loads and validates configs; every mistake becomes one sentence that says what to change.

A config is a TOML file plus dotted overrides (`train.steps=50`). Values of overrides are TOML values; a bare word is
a string. A published model's name may stand for `[model]` (see `configs.presets`), and none leaves out a key that need
not be there (see `configs.left_out`). An unknown key, a wrong type or a value out of range raises a `ConfigError` that
names the key, the value and what to change. Entrypoints turn it into exit status 2.
"""

import difflib
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError

from configs import presets
from configs.files import write_atomic
from configs.left_out import NONE, may_be_none, without_none
from configs.section import section_in

T = TypeVar("T", bound=BaseModel)


class ConfigError(ValueError):
    """A mistake in the config or the command line, as one sentence that says what to change."""


class Failure(ValueError):
    """A fault of files that a command needs, as one sentence that names the file and says what to do.

    `of_all_ranks` says that all ranks raise it together, so that the main one alone need print it.
    """

    of_all_ranks = False


def load(
    schema: type[T],
    path: str | Path,
    overrides: Sequence[str] = (),
    complete: Callable[[dict[str, Any]], dict[str, Any]] = lambda tree: tree,
) -> T:
    """Reads `path`, applies `key.sub=value` overrides, fills in the published model that it names, and validates it.

    Before it is validated, `complete` may add keys that follow from others. Raises ConfigError for any mistake.
    """
    return validate(schema, complete(filled_tree(schema, path, overrides)), origin=str(path))


def filled_tree(schema: type[BaseModel], path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads a config file, with overrides and the published model that it names, without checking its keys."""
    tree = read_overridden(path, overrides)
    try:
        return without_none(schema, presets.filled_in(tree))
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_overridden(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Reads a config file as a plain dict and applies overrides, without checking its keys. Raises ConfigError."""
    tree = read_tree(path)
    presets.with_preset_key(tree)
    for override in overrides:
        _apply(tree, override)
        presets.with_preset_key(tree)
    return tree


def read_tree(path: str | Path) -> dict[str, Any]:
    """Reads a config file as a plain dict, without checking its keys. Raises ConfigError if it is no TOML file."""
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist; presets are under configs/") from None
    except IsADirectoryError:
        raise ConfigError(f"config {path} is a directory; name a .toml file in it") from None
    except OSError as error:
        raise ConfigError(
            f"config file {path} cannot be read ({error.strerror}); name a .toml file that this user may read"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {path} is not UTF-8 at byte {error.start}; save it in UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config file {path} is not valid TOML: {error}; correct it") from None


def from_overrides(schema: type[T], overrides: Sequence[str]) -> T:
    """Validates `key.sub=value` overrides by `schema`, without a file. Raises ConfigError for any mistake."""
    tree: dict[str, Any] = {}
    for override in overrides:
        _apply(tree, override)
    return validate(schema, without_none(schema, tree), origin="the command line")


def validate(schema: type[T], tree: dict[str, Any], origin: str = "config") -> T:
    """Validates a plain dict by `schema`. Raises one ConfigError that names all mistakes, after `origin`."""
    for key, text in _no_texts(tree):
        raise ConfigError(
            f"{origin}: {key} = {text!r} is not valid UTF-8; rename the file or folder, or match it by * if the key "
            "takes patterns"
        )
    try:
        # Through JSON, where lists may stand for tuples and strings for enums, while all other types stay strict.
        return schema.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        messages = [_sentence(schema, tries) for tries in _by_value(error.errors())]
        raise ConfigError(f"{origin}: " + "; ".join(dict.fromkeys(messages))) from None


def _no_texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields (key, text) for each text in a tree that is not valid Unicode, as a name of other bytes becomes."""
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _no_texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _no_texts(inner, f"{key}[{number}]")


def plain(config: BaseModel) -> dict[str, Any]:
    """Returns the config as a dict of TOML and JSON values, without keys that are None (TOML has no null)."""
    return config.model_dump(mode="json", exclude_none=True)


def write(config: BaseModel, path: str | Path) -> None:
    """Writes the config, with defaults filled in, as TOML to `path`, atomically."""
    write_atomic(path, toml(plain(config)))


def toml(tree: dict[str, Any]) -> bytes:
    """Returns a plain dict as TOML, without keys that are None."""
    return tomli_w.dumps(_without_none(tree)).encode()


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return value


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    key = key.strip()
    if not separator or not key or any(not part for part in key.split(".")):
        raise ConfigError(f"override {override!r} is not of the form key.sub=value, e.g. train.steps=50")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is a value, not a section")
    node[leaf] = _value(text.strip())


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


# How a value of the expected type is written in TOML, by the type in pydantic's error.
_EXAMPLES = {
    "int": "an integer is written like 3",
    "float": "a number is written like 0.5",
    "bool": "write true or false, without quotes",
    "string": 'text is written in quotes, like "this"',
    "tuple": "a list is written like [1, 2] or ['a', 'b']",
    "list": "a list is written like [1, 2] or ['a', 'b']",
}
# Parts that pydantic adds to the location of an error if the key may have several types: the type that was tried.
_OF_UNIONS = ("str", "int", "float", "bool", "[key]")
_WITH_ARGUMENTS = ("tuple[", "list[", "literal[")


def _by_value(items: Sequence[Any]) -> list[list[Any]]:
    """Groups pydantic's errors by value, since a value that may have several types has an error for each of them.

    `loc` of the returned errors has no types in it. Only the errors deepest inside the value stay in a group: for a
    list with a wrong value in it, the error is that value, and not also that the list is not a string.
    """
    found: dict[tuple[Any, ...], list[tuple[int, Any]]] = {}
    for item in items:
        location = item["loc"]
        types = [i for i, part in enumerate(location) if part in _OF_UNIONS or str(part).startswith(_WITH_ARGUMENTS)]
        plain = tuple(part for i, part in enumerate(location) if i not in types)
        value = location[: types[0]] if types else location
        found.setdefault(value, []).append((len(plain), {**item, "loc": plain}))
    return [[item for depth, item in tries if depth == max(d for d, _ in tries)] for tries in found.values()]


def _sentence(schema: type[BaseModel], tries: Sequence[Any]) -> str:
    item = tries[0]
    location = [f"[{part}]" if isinstance(part, int) else str(part) for part in item["loc"]]
    key = ".".join(location).replace(".[", "[") or "config"
    if len(tries) > 1 and (ways := list(dict.fromkeys(filter(None, map(_way, tries))))):
        return f"{key} = {item['input']!r} has none of the types that it may have; {', or '.join(ways)}"
    if item["type"] == "extra_forbidden":
        known = list(_known_keys(schema, location[:-1]))
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys here: {', '.join(known) or 'none'}"
        return f"unknown key {key!r}; {hint}"
    if item["type"] == "missing" and isinstance(item["loc"][-1], int):
        return f"{'.'.join(location[:-1])} has too few values; one more is expected"
    if item["type"] == "missing" and (shown := _keys_of_section(schema, location)):
        return f"section {key!r} is missing; set {shown}"
    if item["type"] == "missing":
        return f"key {key!r} is missing; set it in the file or as {key}=VALUE"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":  # our own validators name key and value themselves
        return message if key == "config" else f"{key}: {message}"
    if item["type"] in ("model_type", "model_attributes_type", "dict_type"):
        keys = _keys_of_section(schema, location) or f"names below it, as in {key}.NAME=VALUE"
        without = f", or leave it out by {key}={NONE}" if _may_be_none(schema, location) else ""
        return f"{key} = {item['input']!r}: this is a section, not a value; set {keys}{without}"
    if item["type"] == "too_short":
        least, present = item["ctx"]["min_length"], item["ctx"]["actual_length"]
        return f"{key} = {item['input']!r} has {present} values; give it {least} or more"
    way = _way(item) if item["type"] != "literal_error" else ""
    return f"{key} = {item['input']!r}: {message[0].lower()}{message[1:]}{way and '; ' + way}"


def _keys_of_section(schema: type[BaseModel], location: Sequence[str]) -> str:
    """Returns in words the keys of the section at `location`, with one that must be set; "" if it is a value."""
    section, is_named = _section_at(schema, location)
    if section is None:
        return ""
    key = ".".join(location)
    first = next((name for name, field in section.model_fields.items() if field.is_required()), None)
    if is_named:
        return f"names below it, as in {key}.NAME.{first or next(iter(section.model_fields))}=VALUE"
    known = list(_known_keys(schema, location))
    shown = ", ".join(known[:6]) + "..." * (len(known) > 6)
    return f"its keys ({shown}), as in {key}.{first or known[0]}=VALUE"


def _way(item: Any) -> str:
    """Returns how to write a value of the type that this error expects, or "" if the type is not the mistake."""
    if item["type"] == "literal_error":
        return f"write {item['ctx']['expected'].replace('False', 'false').replace('True', 'true')}"
    kind, _, wrong = item["type"].partition("_")
    return _EXAMPLES.get(kind, "") if wrong in ("type", "parsing", "from_float") else ""


def _may_be_none(schema: type[BaseModel], location: Sequence[str]) -> bool:
    """Whether the section at `location` may be left out by the value none."""
    current: type[BaseModel] | None = schema
    for part in location[:-1]:
        field = current.model_fields.get(part) if current else None
        current = section_in(field.annotation)[0] if field else current  # a name in a dict of sections is no field
    field = current.model_fields.get(location[-1]) if current else None
    return field is None or may_be_none(field.annotation)


def _known_keys(schema: type[BaseModel], location: Sequence[str]) -> Iterator[str]:
    """Yields the keys of the section at `location`; names in a dict of sections (`rules.english`) are skipped."""
    section, is_named = _section_at(schema, location)
    if section and not is_named:
        yield from section.model_fields
    if section is presets.ModelConfig and not is_named:
        yield "preset"


def _section_at(schema: type[BaseModel], location: Sequence[str]) -> tuple[type[BaseModel] | None, bool]:
    """Returns the schema of the section at `location`, and whether sections with names are there; None for a value."""
    current: type[BaseModel] | None = schema
    is_named = False
    for part in location:
        if is_named:
            is_named = False
            continue
        field = current.model_fields.get(part) if current else None
        current, is_named = section_in(field.annotation) if field else (None, False)
    return current, is_named
