"""Recorded rollouts: one safetensors file for each, which holds its own checksum and is whole or not there.

A run that makes several updates on a rollout records it before the first one, and so goes on in the middle of it after
any interruption. With `rl.record` all rollouts of a run are kept, and `rl.replay` trains on them again. The file is
also a batch of `posttrain.algorithms.token_batch.TokenBatch`, for `trivium rl compare`.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from configs.files import write_atomic
from configs.loader import ConfigError
from configs.sealed import Format, SealError
from posttrain.algorithms.token_batch import CHECKSUM, arrays_of, arrays_sha256, file_of
from posttrain.rl.rollout import Rollout

FORMAT = "trivium rollout 2"
RECORDED_BY = "recorded_by"  # file in the folder of rl.record: the directory of the run that records there
OWNER = Format("trivium-recorded-by", version=1, oldest=1)


def path_of(folder: Path, number: int) -> Path:
    """Returns the path of the file of a rollout."""
    return folder / f"rollout_{number:06d}.safetensors"


def numbers(folder: Path) -> list[int]:
    """Returns the numbers of the rollouts recorded in a folder, ascending."""
    names = [path.name.removeprefix("rollout_").removesuffix(".safetensors") for path in folder.glob("rollout_*")]
    return sorted(int(name) for name in names if name.isdecimal())


@dataclass(frozen=True)
class Recorded:
    """A rollout with its number, the number of the first prompt after it, and the (sum, count) of its metrics.

    `tokenizer` is the SHA-256 of the tokenizer whose ids it has, and `step` the number of updates of the weights that
    sampled it, where sampling is ahead of training.
    """

    rollout: Rollout
    number: int
    next_prompt: int
    metrics: Mapping[str, tuple[float, float]]
    tokenizer: str
    step: int | None = None

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of all that is recorded."""
        facts = json.dumps(self._facts())
        return hashlib.sha256(f"{facts} {arrays_sha256(self.rollout.arrays)}".encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Writes the file of the rollout into a folder, whole or not at all."""
        arrays = {**_token_batch(self.rollout), **self.rollout.arrays}
        metadata = {"format": FORMAT, "sha256": self.sha256, "facts": json.dumps(self._facts())}
        write_atomic(path_of(folder, self.number), file_of(arrays, metadata))

    def _facts(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "next_prompt": self.next_prompt,
            "group_size": self.rollout.group_size,
            "metrics": {name: list(values) for name, values in sorted(self.metrics.items())},
            "tokenizer": self.tokenizer,
            **({} if self.step is None else {"step": self.step}),
        }


def read(folder: Path, number: int, otherwise: str) -> Recorded:
    """Reads a rollout. `otherwise` is the second remedy in error messages, beside restoring the file.

    Raises ConfigError if the file is missing, damaged or of another format.
    """
    path = path_of(folder, number)
    try:
        arrays, metadata = arrays_of(path)
    except FileNotFoundError:
        found = numbers(folder)
        has = f"{folder} has rollouts {found[0]} to {found[-1]}" if found else f"{folder} has no rollouts"
        raise ConfigError(
            f"{path} does not exist, and rollout {number} is needed ({has}); restore it, or {otherwise}"
        ) from None
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{path} cannot be read as a recorded rollout ({error}); restore it, or {otherwise}"
        ) from None
    if metadata.get("format") != FORMAT:
        raise ConfigError(f"{path} is no rollout of this version of Trivium; {otherwise}")
    damaged = ConfigError(f"{path} does not match its own SHA-256, so it is damaged; restore it, or {otherwise}")
    if metadata.get(CHECKSUM) != arrays_sha256(arrays):
        raise damaged
    kept = {name: array for name, array in arrays.items() if name not in _DERIVED}
    try:
        facts = json.loads(metadata["facts"])
        metrics = {name: (total, count) for name, (total, count) in facts["metrics"].items()}
        rollout = Rollout(kept, facts["group_size"])
        recorded = Recorded(
            rollout, facts["number"], facts["next_prompt"], metrics, facts["tokenizer"], facts.get("step")
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise damaged from None
    if recorded.sha256 != metadata.get("sha256") or recorded.number != number:
        raise damaged
    return recorded


def check_owner(folder: str | None, run_dir: str | Path, continues: bool = False) -> None:
    """Raises ConfigError if rl.record, `folder`, has rollouts of another run than the one in `run_dir`.

    A run that continues may have been moved: then the folder that it recorded from is not there any more.
    """
    if folder is None or not numbers(Path(folder)):
        return
    file, owner = Path(folder, RECORDED_BY), None
    remedy = "name another folder, or remove it"
    if file.is_file():
        try:
            owner = Path(folder, OWNER.read(file.read_bytes(), file)["run"]).resolve()
        except (SealError, KeyError, TypeError) as error:
            raise ConfigError(f"rl.record = {folder!r}: {error}; {remedy}") from None
    if owner != Path(run_dir).resolve() and not (continues and owner is not None and not owner.exists()):
        raise ConfigError(f"rl.record = {folder!r} has rollouts of {owner or 'another run'} already; {remedy}")


def note_owner(folder: Path, run_dir: Path) -> None:
    """Writes into a folder which run records rollouts there, before the first, so that no rollout lacks an owner.

    The run's folder is noted relative to one inside it, since both are then moved and copied together.
    """
    run, record = run_dir.resolve(), folder.resolve()
    run_path = os.path.relpath(run, record) if run in record.parents else str(run)
    write_atomic(folder / RECORDED_BY, OWNER.write({"run": run_path}))


def remove_before(folder: Path, number: int) -> None:
    """Removes the files of all rollouts before `number`."""
    for old in numbers(folder):
        if old < number:
            path_of(folder, old).unlink(missing_ok=True)


_DERIVED = ("logprobs", "sequences", "groups", "rewards")


def _token_batch(rollout: Rollout) -> dict[str, np.ndarray]:
    """Returns the arrays of `TokenBatch` that are not in the rollout under their own names."""
    rows, length = rollout.tokens.shape
    groups = np.broadcast_to(rollout.prompts[:, None], (rows, length))
    real = np.arange(length) < rollout.lengths[:, None]
    sequences = np.where(real, np.arange(rows)[:, None] * length, -1)
    last = rollout.mask & (np.cumsum(rollout.mask, 1) == rollout.mask.sum(1, keepdims=True))
    rewards = np.where(last, np.nan_to_num(rollout.scores)[:, None], 0.0).astype(np.float32)
    logprobs = rollout.arrays.get("old_logprobs", rollout.rollout_logprobs)
    return {"logprobs": logprobs, "sequences": sequences, "groups": np.array(groups), "rewards": rewards}
