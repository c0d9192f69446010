"""Writes local checkpoints: each rank's files to its node's disk, a copy to the next node's, and manifests to all.

So the disks of all nodes but one hold a whole checkpoint, whichever is lost, and those of more if no two of them are
neighbours. Only one is kept beside the one that is being written; where the run goes on from one, it is gathered into
`run.dir` first (see local_gathering.py). On a single node there is nothing to copy to, and its disk alone has them.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from configs.files import sync, write_atomic
from pretrain.checkpoint import pruning, storage
from pretrain.checkpoint.local_disk import LocalDisk
from pretrain.checkpoint.replication import exchange, targets
from pretrain.checkpoint.storage import MANIFEST, CheckpointError, Piece
from pretrain.parallel.rank_messages import broadcast_json, gather_json

Pieces = Mapping[str, Mapping[str, tuple[Piece, dict[str, torch.Tensor]]]]  # of each model, by its folder's name
Parts = dict[str, list[dict[str, Any]]]  # what the ranks' files hold, likewise


class LocalSaver:
    """Writes the local checkpoints of a run on `disk`. All ranks make one and call its methods in the same order."""

    def __init__(self, disk: LocalDisk, group: dist.ProcessGroup):
        self._disk, self._group, self._rank = disk, group, disk.mesh.rank
        sharing = disk.sharing
        self._to = targets(sharing)
        self._is_first = any(self._rank == ranks[0] for ranks in sharing)  # of those that share its disk
        self.said = f"{disk.local_dir} of {len(sharing)} nodes, with copies on the next one's"
        if len(sharing) == 1:
            self.said = f"{disk.local_dir} of this node alone, without a copy on another"
        if self._is_first:
            pruning.remove_leftovers(disk.path)
        dist.barrier(group)  # no rank may write its first file before leftovers are removed

    def save(self, step: int, pieces: Pieces, manifests: Callable[[Parts], dict[str, bytes]]) -> str | None:
        """Writes a checkpoint; returns on all ranks why it was given up, or None. `manifests` makes them on rank 0.

        Raises CheckpointError if the pieces are not those of a whole checkpoint, a bug that ends the run.
        """
        final = storage.directory(self._disk.path, step)
        temporary = storage.temporary_name(final)
        try:
            failure = self._save(temporary, final, pieces, manifests)
        except CheckpointError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if failure is None:
            if self._is_first:
                self._disk.remove(lambda start, there: (start, there) != (self._disk.start, step))
        else:
            shutil.rmtree(temporary, ignore_errors=True)
        return failure

    def superseded(self, step: int) -> None:
        """Removes local checkpoints up to `step`, of which the run's folder has one now."""
        if self._is_first:
            self._disk.remove(lambda _, there: there <= step)

    def _save(
        self, temporary: Path, final: Path, pieces: Pieces, manifests: Callable[[Parts], dict[str, bytes]]
    ) -> str | None:
        parts, failure = self._write(temporary, pieces)
        files = {
            f"{name}/{part['file']}" if name else part["file"]: {"bytes": part["bytes"], "sha256": part["sha256"]}
            for name, part in parts.items()
        }
        answers = gather_json({"failure": failure, "files": files}, self._group)
        if failure := next(filter(None, (answer["failure"] for answer in answers)), None):
            return failure
        if self._to:
            fault = exchange(temporary, self._rank, [answer["files"] for answer in answers], self._to, self._group)
            failure = f"rank {self._rank}: {fault}" if fault else None
        found = gather_json({"failure": failure, "parts": parts}, self._group, everywhere=False)
        verdict: dict[str, Any] = {"failure": None, "mistake": None, "manifests": {}}
        if self._rank == 0:
            verdict["failure"] = next(filter(None, (answer["failure"] for answer in found)), None)
            try:
                made = manifests({name: [answer["parts"][name] for answer in found] for name in parts})
                verdict["manifests"] = {name: content.decode() for name, content in made.items()}
            except CheckpointError as error:
                verdict["mistake"] = str(error)
        verdict = broadcast_json(verdict, self._group)
        if verdict["mistake"] is not None:
            raise CheckpointError(verdict["mistake"])
        if failure := verdict["failure"]:
            return str(failure)
        if self._is_first:
            failure = self._publish(temporary, final, verdict["manifests"])
        return next(filter(None, gather_json(failure, self._group)), None)

    def _write(self, temporary: Path, pieces: Pieces) -> tuple[dict[str, dict[str, Any]], str | None]:
        parts = {}
        try:
            for name, those in pieces.items():
                (temporary / name).mkdir(parents=True, exist_ok=True)
                parts[name] = storage.write_rank(temporary / name, self._rank, those)
        except OSError as error:
            return {}, f"rank {self._rank} could not write {temporary}: {error.strerror}"
        return parts, None

    def _publish(self, temporary: Path, final: Path, manifests: Mapping[str, str]) -> str | None:
        try:
            for name in sorted(manifests, reverse=True):  # that of the whole checkpoint last
                write_atomic(temporary / name / MANIFEST, manifests[name].encode())
                sync(temporary / name)
            storage.rename_to_final(temporary, final)
            self._disk.keep_facts()
        except OSError as error:
            return f"rank {self._rank} could not publish {final}: {error.strerror}"
        return None
