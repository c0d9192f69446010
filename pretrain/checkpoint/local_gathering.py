"""Gathers the newest local checkpoint that is whole over all nodes' disks into the run's folder, when a run starts.

The main rank asks what each node has, and each file is copied into `run.dir` by a rank that has it, and compared with
its size and SHA-256; if it is damaged there, by another one that has it. After that it is a checkpoint as any other,
which each layout resumes. A local checkpoint of which no disk has a whole copy of some file is passed over.
"""

import contextlib
import shutil
import time
from pathlib import Path
from typing import Any

from configs.loader import ConfigError
from configs.sealed import CHECKPOINT
from pretrain.checkpoint import storage
from pretrain.checkpoint.fetching import put_whole
from pretrain.checkpoint.local_disk import LocalDisk
from pretrain.checkpoint.mirror import Mirror, MirrorError, files_of
from pretrain.checkpoint.storage import MANIFEST, CheckpointError


class LocalGatherer:
    """Access of the main rank to the local checkpoints of all nodes, while all other ranks wait to be asked."""

    def __init__(self, disk: LocalDisk):
        self._disk, self._mesh, self._run_dir = disk, disk.mesh, disk.run_dir

    def gather_newer(self, own: Path | None) -> Path | None:
        """Returns the gathered checkpoint if a whole one of a later step than `own` is on the nodes' disks, else None.

        Raises CheckpointError if the run's folder cannot be written.
        """
        newest = int(storage.read_manifest(own)["step"]) if own else -1
        answers = self._ask({"local": "steps"})
        for step in sorted({int(step) for answer in answers for step in answer}, reverse=True):
            if step > newest:
                try:
                    return self._gather(step, own)
                except CheckpointError as error:
                    print(f"warning: the local checkpoint of step {step} is passed over: {error}", flush=True)
        return None

    def _ask(self, request: dict[str, Any]) -> list[Any]:
        self._mesh.gather_json(request)
        return self._mesh.gather_json(answer(self._disk, request))

    def _gather(self, step: int, own: Path | None) -> Path:
        began = time.monotonic()
        listed = self._ask({"local": "files", "step": step})
        where = f"step {step} in {self._disk.local_dir}"
        texts = self._manifests(step, [rank for rank, sizes in enumerate(listed) if MANIFEST in sizes])
        content = texts[MANIFEST].encode()
        files = files_of(content, where, lambda name: texts[name].encode() if name in texts else None)
        final = storage.directory(self._run_dir, step)
        temporary = storage.temporary_name(final)
        holders = {
            name: [rank for rank, sizes in enumerate(listed) if sizes.get(name) == facts["bytes"]]
            for name, facts in files.items()
        }
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            self._copy(step, temporary, files, holders)
            put_whole(temporary, final, content)
        except CheckpointError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        size = sum(facts["bytes"] for facts in files.values())
        why = f"its own newest is step {storage.read_manifest(own)['step']}" if own else "it has no checkpoint itself"
        print(
            f"gathered step {step} from {self._disk.local_dir} of the nodes into {self._run_dir}, since {why}: "
            f"{size / 1e6:.1f} MB in {time.monotonic() - began:.1f} s",
            flush=True,
        )
        return final

    def _manifests(self, step: int, holders: list[int]) -> dict[str, str]:
        """Returns the content of the manifests, by name, of one node that has them undamaged."""
        for rank in holders:
            found: dict[str, str] = self._ask({"local": "manifests", "step": step, "rank": rank})[rank]
            if MANIFEST in found:
                return found
        raise CheckpointError("its manifest is damaged on every node")

    def _copy(self, step: int, into: Path, files: dict[str, dict[str, Any]], holders: dict[str, list[int]]) -> None:
        """Has every file copied by one of its holders, in as many rounds as copies are damaged."""
        missing, faults = set(files), dict.fromkeys(files, "no node has it whole")
        while missing:
            work: dict[int, list[str]] = {}
            load = dict.fromkeys(range(self._mesh.layout.world_size), 0)
            for name in sorted(missing, key=lambda name: (-files[name]["bytes"], name)):
                if not holders[name]:
                    raise CheckpointError(f"{name}: {faults[name]}")
                rank = min(holders[name], key=lambda rank: load[rank])
                holders[name].remove(rank)
                load[rank] += files[name]["bytes"]
                work.setdefault(rank, []).append(name)
            request = {"local": "copy", "step": step, "into": str(into)}
            request |= {"work": {rank: {name: files[name] for name in names} for rank, names in work.items()}}
            failed = {name: fault for answer in self._ask(request) for name, fault in answer.items()}
            for name in sorted(name for name in failed if holders[name]):
                print(f"warning: {failed[name]}; another node's copy is taken", flush=True)
            faults |= failed
            missing = set(failed)


def answer(disk: LocalDisk, request: dict[str, Any]) -> Any:
    """Answers a request of the main rank on this rank, as every rank does."""
    steps = disk.steps()
    path = steps.get(request.get("step", -1))
    match request["local"]:
        case "steps":
            return list(steps)
        case "files":
            return {file.relative_to(path or "").as_posix(): file.stat().st_size for file in _files(path)}
        case "manifests":
            return _manifests(path) if request["rank"] == disk.mesh.rank else {}
        case "copy":
            work = {int(rank): files for rank, files in request["work"].items()}
            return _copied(disk, path, Path(request["into"]), work.get(disk.mesh.rank, {}))
    raise AssertionError(request)


def _files(path: Path | None) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path else []


def _manifests(path: Path | None) -> dict[str, str]:
    """Returns the content of a checkpoint's manifests on this node that are not damaged, by name."""
    found = {}
    for file in _files(path):
        if file.name == MANIFEST:
            with contextlib.suppress(OSError, ValueError):
                content = file.read_bytes()
                CHECKPOINT.read(content, file)
                found[file.relative_to(path or "").as_posix()] = content.decode()
    return found


def _copied(disk: LocalDisk, path: Path | None, into: Path, files: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Copies files into the folder of a checkpoint; returns what failed, by file."""
    faults = {}
    for name, facts in files.items():
        try:
            Mirror(str(path)).fetch(name, into / name, facts)
        except (CheckpointError, MirrorError, ConfigError, OSError) as error:
            faults[name] = f"rank {disk.mesh.rank}: {error}"
    return faults
