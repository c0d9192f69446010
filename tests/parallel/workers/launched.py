"""Main module of ranks that launch.ranks starts: one training run of tests/parallel/workers/training.py.

python -m launch.ranks --nproc-per-node 2 tests.parallel.workers.launched '{"run_dir": ..., "model": ..., "steps": 9}'

With `"disk": true` the main rank fills the run's file system before step 3 of 6, makes room before step 5, and fills it
again before step 6; it prints what it saw.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint import storage
from pretrain.parallel import groups
from pretrain.parallel.engine import Engine
from tests.parallel.workers.training import make_trainer, settle

LEFT = 60_000  # bytes left free: enough for the log, too few for a checkpoint


def main() -> int:
    torch.set_num_threads(1)
    options: dict[str, Any] = json.loads(sys.argv[1])
    at = disk_steps(Path(options["run_dir"])) if options.pop("disk", False) else {}
    trainer = make_trainer(parallel={}, at=at, **options)
    try:
        return trainer.fit()
    finally:
        if trainer.mesh.is_main:
            look(Path(options["run_dir"]))
        groups.stop()


def disk_steps(run_dir: Path) -> dict[int, Any]:
    ballast = run_dir / "ballast"

    def fill(engine: Engine) -> None:
        settle(engine)
        if engine.mesh.is_main:
            with open(ballast, "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    file.truncate(file.tell() - LEFT)

    def empty(engine: Engine) -> None:
        settle(engine)
        if engine.mesh.is_main:
            look(run_dir)
            ballast.unlink()

    return {2: fill, 4: empty, 5: fill}


def look(run_dir: Path) -> None:
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    print("seen:", json.dumps({"checkpoints": names, "steps": [line["step"] for line in lines if "loss" in line]}))
    for step in storage.steps(run_dir):
        storage.verify(storage.directory(run_dir, step))


if __name__ == "__main__":
    sys.exit(main())
