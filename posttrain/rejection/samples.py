"""All completions that a run has sampled, in files of some prompts each, whole or not there, with their checksums.

`samples/samples.json` in the folder of the run says what decides the samples. A run that goes on has the same facts,
and samples the parts that are not there yet; other filters are applied to the same files without sampling again.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from configs.differences import changes, flat, words
from configs.files import write_atomic
from configs.loader import ConfigError

FOLDER, FACTS = "samples", "samples.json"
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class DrawnSample:
    """Completion `number` of problem `prompt` (its number in the task), which has the id `problem`.

    `tokens` counts the end of its turn, without which `stopped` is False. `repeated` is the share of its runs of tokens
    that occurred before. `score` is None where the task could not judge, for the `reason` given; `rewards` has the
    value of each reward by name.
    """

    prompt: int
    problem: str
    number: int
    text: str
    tokens: int
    stopped: bool
    repeated: float
    score: float | None = None
    reason: str = ""
    rewards: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the sample in messages and data."""
        return f"{self.problem}#{self.number}"


class SampleFiles:
    """The files of a run's samples: part i has the samples of prompts [i * size, (i + 1) * size)."""

    def __init__(self, run_dir: Path, prompts: int, completions: int, size: int) -> None:
        self.folder, self.prompts, self.completions, self.size = run_dir / FOLDER, prompts, completions, size

    @property
    def parts(self) -> list[range]:
        """The prompts of each part."""
        return [range(first, min(first + self.size, self.prompts)) for first in range(0, self.prompts, self.size)]

    def path(self, part: int) -> Path:
        """Returns the path of a part's file."""
        return self.folder / f"part_{part:06d}.jsonl"

    def missing(self) -> list[int]:
        """Returns the numbers of the parts that have no file yet, or one of another number of prompts."""
        return [part for part, prompts in enumerate(self.parts) if self._held(part) != len(prompts) * self.completions]

    def _held(self, part: int) -> int | None:
        """Returns the number of samples in a part's file, None without one; a damaged file counts as full."""
        try:
            with open(self.path(part), "rb") as file:
                return int(json.loads(file.readline())["samples"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):  # `read` says so
            return len(self.parts[part]) * self.completions

    def write(self, part: int, samples: Sequence[DrawnSample]) -> None:
        """Writes the samples of a part, whole or not at all."""
        lines = "".join(json.dumps(asdict(sample), ensure_ascii=True) + "\n" for sample in samples).encode()
        head = json.dumps({"sha256": hashlib.sha256(lines).hexdigest(), "samples": len(samples)}) + "\n"
        write_atomic(self.path(part), head.encode() + lines)

    def read(self, part: int) -> list[DrawnSample]:
        """Reads the samples of a part. Raises ConfigError if the file is damaged."""
        path = self.path(part)
        head, _, lines = path.read_bytes().partition(b"\n")
        try:
            said = json.loads(head)["sha256"]
        except (ValueError, KeyError, TypeError):
            said = ""
        if said != hashlib.sha256(lines).hexdigest():
            raise ConfigError(
                f"{path} does not match its own SHA-256, so it is damaged; remove it and run the same command again, "
                "which samples its prompts anew, to the same texts"
            )
        return [DrawnSample(**json.loads(line)) for line in lines.splitlines()]

    def by_prompt(self) -> Iterator[list[DrawnSample]]:
        """Yields the samples of each prompt, in order."""
        for part in range(len(self.parts)):
            found = self.read(part)
            for first in range(0, len(found), self.completions):
                yield found[first : first + self.completions]


def recorded_facts(run_dir: Path) -> dict[str, Any]:
    """Returns the recorded facts on which the samples of a run depend; {} for a new run.

    Raises ConfigError if the file is damaged.
    """
    path = run_dir / FOLDER / FACTS
    try:
        return dict(json.loads(path.read_bytes())) if path.exists() else {}
    except (ValueError, TypeError):
        raise ConfigError(f"{path} is damaged; remove {path.parent} to sample anew") from None


def check_facts(run_dir: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ConfigError if the samples of a run were decided by other facts than `now`."""
    found = changes(before, now) if before else {}
    moved = ("model.path", "checkpoint")  # paths of what is known by its SHA-256
    found = {key: change for key, change in found.items() if key != "problems" and not _ends(key, moved)}
    if found:
        said = "; ".join(_said(key, pair, flat(before), flat(now)) for key, pair in found.items())
        raise ConfigError(
            f"run.dir = {str(run_dir)!r} has samples that were drawn otherwise: {said}; undo the change, or choose "
            "another run.dir (the filters of [keep] alone may change)"
        )


def _said(key: str, pair: tuple[Any, Any], before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Says what a fact was and is; of one that is known by its SHA-256, what it is a hash of."""
    if not all(one is None or _SHA256.fullmatch(str(one)) for one in pair):
        return words({key: pair})[0]
    name = key.removesuffix(".sha256")
    paths = [str(facts.get(f"{name}.path", "")) for facts in (before, now)]
    if paths[0] == paths[1]:
        return f"the {name.replace('_', ' ')} {paths[0]} has another content".replace("  ", " ")
    return f"{name} {paths[0]} -> {paths[1]}"


def _ends(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.endswith(f".{name}") for name in names)


def write_facts(run_dir: Path, facts: Mapping[str, Any]) -> None:
    """Writes the facts that a run's samples depend on, such as model and settings, into its folder."""
    write_atomic(run_dir / FOLDER / FACTS, json.dumps(facts, indent=1, sort_keys=True).encode())
