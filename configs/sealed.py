"""JSON files with a checksum of their own values, so that a damaged file is detected."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.loader import Failure

SEAL = "sha256"  # key of the checksum, beside the values that it covers


class SealError(Failure):
    """A file that is damaged, or has another format or version."""


class VersionError(SealError):
    """Error for a file whose format version this code cannot read."""


@dataclass(frozen=True)
class Format:
    """Name and version of a file format. `version` is written; all from `oldest` on are read, with or without seal."""

    name: str
    version: int
    oldest: int

    def write(self, values: dict[str, Any]) -> bytes:
        """Returns a file's content: format, version, `values` and, as the last key, the checksum of all of them."""
        tree = {"format": self.name, "version": self.version, **values}
        tree.pop(SEAL, None)
        return (json.dumps({**tree, SEAL: _digest(tree)}, indent=1, ensure_ascii=False) + "\n").encode()

    def read(self, content: bytes, file: Path) -> dict[str, Any]:
        """Returns the values in `content`, without the checksum. Raises SealError naming `file` if it is damaged."""
        try:
            tree = json.loads(content)
        except ValueError as error:
            raise SealError(f"{file} is damaged: it is not JSON ({error})") from None
        if not isinstance(tree, dict) or tree.get("format") != self.name:
            said = tree.get("format") if isinstance(tree, dict) else None
            raise SealError(f"{file} has format {said!r}: it is not a {self.name} file, or it is damaged")
        version = tree["version"] if isinstance(tree.get("version"), int) else None
        if (SEAL in tree or version == self.version) and tree.pop(SEAL, None) != _digest(tree):
            raise SealError(f"{file} is damaged: its values do not match its checksum")
        if version is None or not self.oldest <= version <= self.version:
            raise VersionError(
                f"{file} has version {tree.get('version')!r}; this code reads {self.oldest} to {self.version}"
            )
        return tree


# Version 1 lacks a run's initial checkpoint; version 2 has its data spans under another key.
CHECKPOINT = Format("trivium-checkpoint", version=3, oldest=2)
PLAN = Format("trivium-plan", version=3, oldest=2)
STAGE = Format("trivium-stage", version=1, oldest=1)
STORE = Format("trivium-tokens", version=1, oldest=1)


def _digest(values: dict[str, Any]) -> str:
    """SHA-256 of `values` as JSON; the order of keys and white space do not matter."""
    text = json.dumps(json.loads(json.dumps(values)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
