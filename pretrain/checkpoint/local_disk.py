"""The folder of a run's local checkpoints on the disk of this rank's node, and which of them the run can go on from.

Each start of a run, and each return to an earlier checkpoint, has a folder of its own there. `local.json` in the run's
folder has the steps that they began from, so that a node that was away, and comes back with checkpoints of steps that
were since taken again, is known by that. Each disk has a copy of it, by which a run that has lost `run.dir` can go on.
Local checkpoints of a run that is begun anew in the same `run.dir` are removed.
"""

import hashlib
import json
import platform
import shlex
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from configs.files import write_atomic
from configs.loader import ConfigError
from pretrain.checkpoint import storage
from pretrain.checkpoint.replication import disks
from pretrain.checkpoint.storage import MANIFEST
from pretrain.parallel.groups import Mesh

FILE = "local.json"
Unwanted = Callable[[int, int], bool]


class LocalDisk:
    """Local checkpoints on one node's disk, under `checkpoint.local_dir`. Every rank makes one.

    `open`, `find_sharing` and `begin` are collective, and called in this order. `path` is the folder of the present
    start, laid out as a run's.
    """

    def __init__(self, mesh: Mesh, run_dir: Path, local_dir: str):
        self.mesh, self.run_dir, self.local_dir = mesh, run_dir, local_dir
        self.sharing: list[list[int]] = []  # the ranks of each disk
        self._starts: list[int] = []  # the step that each began from
        self._folder = Path(local_dir)

    @property
    def start(self) -> int:
        """The number of the present start, counted from 1."""
        return len(self._starts)

    @property
    def path(self) -> Path:
        return self._folder / f"start_{self.start}"

    def open(self, begins_anew: bool = False) -> None:
        """Finds the run's folder.

        If `run.dir` has neither checkpoints nor `local.json`, the folder may have been lost: raises ConfigError if a
        node has checkpoints of a run in it, unless the user says that the run `begins_anew`. Also raises it, on all
        ranks, if `local.json` is damaged.
        """
        facts = self._read() if self.mesh.is_main else {}
        facts = self.mesh.gather_json(facts)[0]
        if "damage" in facts:
            raise ConfigError(facts["damage"])
        if facts["is_new"] and not begins_anew:
            left = self.mesh.gather_json(self._left_behind(facts["run_hash"]))
            if found := max((one for one in left if one), default=None):
                self._refuse(*found)
        self._starts = facts["starts"]
        self._folder = Path(self.local_dir, f"{facts['run_hash']}-{facts['id']}")

    def find_sharing(self) -> None:
        """Finds which ranks have a disk in common. Collective; nothing that it writes stays.

        Raises ConfigError if one rank cannot write there, or all nodes share one folder.
        """
        self.sharing = disks(Path(self.local_dir), self.mesh.rank, self.mesh.gather_json)
        hosts = len({*self.mesh.gather_json(platform.node())})
        if len(self.sharing) == 1 and hosts > 1:
            raise ConfigError(
                f"checkpoint.local_dir = {self.local_dir!r} is one folder that all {hosts} nodes share; name one on a "
                "disk that each node has for itself, or leave it out"
            )

    def begin(self, step: int) -> None:
        """Begins a start of the run from `step`.

        Local checkpoints that it does not follow from are removed, and those of earlier runs in the same `run.dir`.
        """
        self._starts.append(step)
        run_hash = self._folder.name.partition("-")[0]
        for other in self._folder.parent.glob(f"{run_hash}-*"):
            if other != self._folder:
                shutil.rmtree(other, ignore_errors=True)
        if self.mesh.is_main:
            write_atomic(self.run_dir / FILE, self._facts())
        self.remove(lambda start, there: not self._is_followed(start, there))

    def keep_facts(self) -> None:
        """Writes a copy of the run's `local.json` on this disk, from which it can be restored."""
        write_atomic(self._folder / FILE, self._facts())

    def _facts(self) -> bytes:
        run_hash, _, id_ = self._folder.name.partition("-")
        return json.dumps({"run_hash": run_hash, "id": id_, "starts": self._starts}).encode()

    def _left_behind(self, run_hash: str) -> tuple[int, int, str, str] | None:
        """Returns newest step, rank, host and `local.json` of a run in `run.dir` that this disk has checkpoints of."""
        found = [
            (int(manifest.parent.name.removeprefix("step_")), self.mesh.rank, platform.node(), str(file))
            for file in Path(self.local_dir).glob(f"{run_hash}-*/{FILE}")
            for manifest in file.parent.glob(f"start_*/checkpoints/step_*/{MANIFEST}")
        ]
        return max(found, default=None)

    def _refuse(self, step: int, rank: int, host: str, file: str) -> None:
        raise ConfigError(
            f"{self.run_dir} has no checkpoint and no {FILE}, but {self.local_dir} of rank {rank} ({host}) has "
            f"checkpoints of a run in it, up to step {step}; if the folder was lost, go on from them: on {host}, "
            f"`cp {shlex.quote(file)} {shlex.quote(str(self.run_dir.absolute()))}/`, then run the same command again; "
            "to begin anew, which removes them, add --resume no"
        )

    def steps(self) -> dict[int, Path]:
        """Returns the folders of the checkpoints here that the run can go on from, by step, whole or not."""
        found = [(start, step, path) for start, step, path in self._all() if self._is_followed(start, step)]
        return {step: path for _, step, path in sorted(found) if (path / MANIFEST).is_file()}

    def remove(self, unwanted: Unwanted) -> None:
        """Removes the checkpoints for whose start and step `unwanted` is true, each manifest first."""
        for start, step, path in self._all():
            if unwanted(start, step):
                (path / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(path, ignore_errors=True)
        for folder in self._folder.glob("start_*"):
            if folder != self.path and not any((folder / "checkpoints").glob("step_*")):
                shutil.rmtree(folder, ignore_errors=True)

    def _is_followed(self, start: int, step: int) -> bool:
        """Tells whether all later starts began from this step or a later one."""
        return all(began >= step for began in self._starts[start:])

    def _all(self) -> Iterator[tuple[int, int, Path]]:
        """Yields start, step and folder of each checkpoint."""
        for folder in list(self._folder.glob("start_*")):
            number = folder.name.removeprefix("start_")
            for step in storage.steps(folder) if number.isdecimal() else ():
                yield int(number), step, storage.directory(folder, step)

    def _read(self) -> dict[str, Any]:
        run_hash = hashlib.sha256(str(self.run_dir.resolve()).encode()).hexdigest()[:12]
        file, found = self.run_dir / FILE, {}
        try:
            found = {key: json.loads(file.read_bytes())[key] for key in ("run_hash", "id", "starts")}
        except FileNotFoundError:
            pass
        except (ValueError, TypeError, KeyError):
            copies = Path(self.local_dir, f"{run_hash}-*", FILE)
            return {
                "damage": f"{file} is damaged; copy {copies} of a node over it, or remove it to go on from the "
                f"checkpoints in {self.run_dir} alone"
            }
        if found.get("run_hash") == run_hash:
            return {**found, "is_new": False}
        is_new = not found and not storage.steps(self.run_dir)  # and no copy of another run
        return {"run_hash": run_hash, "id": uuid.uuid4().hex, "starts": [], "is_new": is_new}
