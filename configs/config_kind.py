"""The kind of a config: that of a command, or the one whose keys a file has.

Kinds are those of `trivium config`. Imports no torch.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError

from configs.kinds import SCHEMAS, schema_of
from configs.loader import ConfigError, filled_tree

OVERRIDE = re.compile(r"[\w.]+=")


def kind_of(path: str | Path, words: Sequence[str] = ()) -> str:
    """Returns the kind of config whose keys these are; of `words`, overrides count and others are passed over.

    It is the kind that knows most of the keys and, among those, misses the fewest that it needs. So a misspelt key or a
    wrong value does not change the kind, and the command of that kind can say what is wrong. Raises ConfigError if
    several kinds fit, or none.
    """
    misfits = {kind: _misfit(kind, path, words) for kind in SCHEMAS}
    best = min(misfits.values())
    found = [kind for kind, misfit in misfits.items() if misfit == best]
    tree = filled_tree(schema_of(found[0]), path, _overrides(words))
    known = schema_of(found[0]).model_fields.keys() & tree.keys()
    if len(found) == 1 and 2 * len(known) > len(tree):
        return found[0]
    which = f"fit configs of the kinds {' and '.join(found)}" if known else "are those of no config"
    raise ConfigError(f"the keys of {path} {which}; name the command before it, as in `train {path}`")


def command_for(path: str | Path, words: Sequence[str], commands: Iterable[str], otherwise: str) -> str:
    """Returns the one of `commands` that takes a config, by its keys; of `words`, overrides count.

    Raises ConfigError if it cannot be told, or is another command; `otherwise` then says what that one is not for.
    """
    kind = kind_of(path, words)
    found = next((name for name in commands if kind_of_command(name) == kind), None)
    if found is None:
        raise ConfigError(f"the keys of {path} are those of a {kind} config, which {otherwise}; name another config")
    return found


def kind_of_command(command: str) -> str:
    """Returns the kind of config that a command takes."""
    return "pretrain" if command == "train" else command.split()[0]


def _overrides(words: Sequence[str]) -> list[str]:
    return [word for word in words if OVERRIDE.match(word)]


def _misfit(kind: str, path: str | Path, words: Sequence[str]) -> tuple[int, int]:
    """Returns how many keys of the config this kind does not know, and how many that it needs are missing."""
    schema = schema_of(kind)
    tree = filled_tree(schema, path, _overrides(words))
    try:
        schema.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        found_elsewhere = ("model",) if kind == "pretrain" and "init" in tree else None  # in the files of another run
        types = Counter(item["type"] for item in error.errors() if item["loc"] != found_elsewhere)
        return types["extra_forbidden"], types["missing"]
    return 0, 0
