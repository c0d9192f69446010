"""JSON files that carry a checksum of their own values: one with a digit flipped is damaged, and never believed."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEAL = "sha256"  # the key of the checksum, beside the values that it is of


class SealError(ValueError):
    """A file is damaged, or of another format or version."""


class VersionError(SealError):
    """A file is of a version that is not read."""


@dataclass(frozen=True)
class Format:
    """What a file calls itself. `version` is written; versions from `oldest` on are read, but only it has the seal."""

    name: str
    version: int
    oldest: int

    def write(self, values: dict[str, Any]) -> bytes:
        """`values` under format and version, and the checksum of all of it as the last key."""
        tree = {"format": self.name, "version": self.version, **values}
        tree.pop(SEAL, None)
        return (json.dumps({**tree, SEAL: _digest(tree)}, indent=1, ensure_ascii=False) + "\n").encode()

    def read(self, content: bytes, file: Path) -> dict[str, Any]:
        """The values, checked, without the checksum. Errors: SealError that begins with the file's name."""
        try:
            tree = json.loads(content)
        except ValueError as error:
            raise SealError(f"{file} is damaged, it is no JSON ({error})") from None
        if not isinstance(tree, dict) or tree.get("format") != self.name:
            said = tree.get("format") if isinstance(tree, dict) else None
            raise SealError(f"{file} says format {said!r}: it is no {self.name}, or damaged")
        version = tree["version"] if isinstance(tree.get("version"), int) else None
        if (SEAL in tree or version == self.version) and tree.pop(SEAL, None) != _digest(tree):
            raise SealError(f"{file} is damaged, its values do not match the checksum of them in it")
        if version is None or not self.oldest <= version <= self.version:
            raise VersionError(
                f"{file} says version {tree.get('version')!r}; this code reads {self.oldest} to {self.version}"
            )
        return tree


CHECKPOINT = Format("trivium-checkpoint", version=2, oldest=2)  # 1 does not say what a run began from
PLAN = Format("trivium-plan", version=3, oldest=2)
STAGE = Format("trivium-stage", version=1, oldest=1)
STORE = Format("trivium-tokens", version=1, oldest=1)


def _digest(values: dict[str, Any]) -> str:
    """Of values as JSON has them, in whatever order and layout."""
    text = json.dumps(json.loads(json.dumps(values)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
