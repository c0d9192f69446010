"""The folder of a run's local checkpoints on the disk of this rank's node, and which of them the run can go on from.

Each start of a run, and each return to an earlier checkpoint, has a folder of its own there. `local.json` in the run's
folder has the steps that they began from, so that a node that was away, and comes back with checkpoints of steps that
were since taken again, is known by that. Local checkpoints of a run that was removed, and begun again in the same
`run.dir`, are removed at its start.
"""

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from configs.files import write_atomic
from pretrain.checkpoint import storage
from pretrain.checkpoint.storage import MANIFEST
from pretrain.parallel.groups import Mesh

FILE = "local.json"
Unwanted = Callable[[int, int], bool]


class LocalDisk:
    """Local checkpoints on one node's disk, under `checkpoint.local_dir`. Every rank makes one.

    `open` and `begin` are collective. `path` is the folder of the present start, laid out as a run's.
    """

    def __init__(self, mesh: Mesh, run_dir: Path, local_dir: str):
        self.mesh, self.run_dir, self.local_dir = mesh, run_dir, local_dir
        self._starts: list[int] = []  # the step that each began from
        self._folder = Path(local_dir)

    @property
    def start(self) -> int:
        """The number of the present start, counted from 1."""
        return len(self._starts)

    @property
    def path(self) -> Path:
        return self._folder / f"start_{self.start}"

    def open(self) -> None:
        """Finds the run's folder, and removes those of earlier runs in the same `run.dir`."""
        facts = self._read() if self.mesh.is_main else {}
        facts = self.mesh.gather_json(facts)[0]
        self._starts = facts["starts"]
        self._folder = Path(self.local_dir, f"{facts['run_hash']}-{facts['id']}")
        for other in self._folder.parent.glob(f"{facts['run_hash']}-*"):
            if other != self._folder:
                shutil.rmtree(other, ignore_errors=True)

    def begin(self, step: int) -> None:
        """Begins a start of the run from `step`; local checkpoints that it does not follow from are removed."""
        self._starts.append(step)
        if self.mesh.is_main:
            run_hash, _, id_ = self._folder.name.partition("-")
            content = json.dumps({"run_hash": run_hash, "id": id_, "starts": self._starts})
            write_atomic(self.run_dir / FILE, content.encode())
        self.remove(lambda start, there: not self._is_followed(start, there))

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
        """Whether all later starts began from this step or a later one."""
        return all(began >= step for began in self._starts[start:])

    def _all(self) -> Iterator[tuple[int, int, Path]]:
        """Yields start, step and folder of each checkpoint."""
        for folder in list(self._folder.glob("start_*")):
            number = folder.name.removeprefix("start_")
            for step in storage.steps(folder) if number.isdecimal() else ():
                yield int(number), step, storage.directory(folder, step)

    def _read(self) -> dict[str, Any]:
        run_hash = hashlib.sha256(str(self.run_dir.resolve()).encode()).hexdigest()[:12]
        try:
            found = json.loads((self.run_dir / FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            found = {}
        if found.get("run_hash") == run_hash:
            return dict(found)
        return {"run_hash": run_hash, "id": uuid.uuid4().hex, "starts": []}  # the run is new, or a copy of another
