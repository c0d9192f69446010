"""Functions run in the ranks: training on nodes, each of which has a disk of its own at the same path."""

import os
import shutil
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from configs.layout import Layout
from configs.loader import ConfigError, validate
from configs.model import ModelConfig
from configs.train import ParallelConfig, TrainSection
from launch.environment import ClusterEnvironment
from pretrain.checkpoint import storage
from pretrain.checkpoint.local_disk import LocalDisk
from pretrain.parallel import groups
from pretrain.parallel.groups import Mesh
from tests.parallel.kills import mount
from tests.parallel.workers import training


def train(local_dir: str, disks: list[str], **options: Any) -> dict[str, Any]:
    """Trains with the folder `disks[rank]` mounted at `local_dir`, which this rank and its threads alone see.

    Instead of a folder, a number stands for an empty file system of so many bytes.
    """
    disk = disks[int(os.environ["RANK"])]
    if disk.isdecimal():
        mount(local_dir, f"size={disk}")
    else:
        mount(local_dir, folder=disk)
    return training.train(**options)


def lost(run_dir: str, local_dir: str, model: dict[str, Any]) -> dict[str, Any]:
    """Loses the folder of a run after a local checkpoint of step 7; returns what is said, and the steps found after it.

    "restored" are those found after the command that is said, and "anew" those of a run that begins anew.
    """
    run, found = Path(run_dir), dict[str, Any]()
    with _alone(model) as mesh:
        disk = LocalDisk(mesh, run, local_dir)
        disk.open()
        disk.begin(0)
        _write(disk, 7)
        shutil.rmtree(run)
        run.mkdir()
        try:
            LocalDisk(mesh, run, local_dir).open()
        except ConfigError as error:
            found["said"] = str(error)
        subprocess.run(["bash", "-c", found["said"].split("`")[1]], check=True)
        back = LocalDisk(mesh, run, local_dir)
        back.open()
        found["restored"] = sorted(back.steps())
        (run / "local.json").unlink()
        anew = LocalDisk(mesh, run, local_dir)
        anew.open(begins_anew=True)
        anew.begin(0)
        return found | {"anew": sorted(anew.steps()), "left": [path.name for path in Path(local_dir).iterdir()]}


def _write(disk: LocalDisk, step: int) -> None:
    path = storage.directory(disk.path, step)
    path.mkdir(parents=True)
    (path / storage.MANIFEST).touch()
    disk.keep_facts()


def _alone(model: dict[str, Any]) -> AbstractContextManager[Mesh]:
    env = ClusterEnvironment.read()
    section = TrainSection(steps=1, global_batch_size=1, micro_batch_size=1, seq_length=8)
    return groups.joined(env, Layout.of(1, ParallelConfig(), validate(ModelConfig, model), section))


def starts(run_dir: str, local_dir: str, model: dict[str, Any], begun: list[tuple[int, list[int]]]) -> list[int]:
    """Returns the steps that a run can go on from after starts, each from a step and with the steps that it wrote.

    Before each start the node is replaced by one with an empty disk, and it is the first node that comes back.
    """
    with _alone(model) as mesh:
        for number, (step, written) in enumerate(begun):
            disk = LocalDisk(mesh, Path(run_dir), f"{local_dir}_{number}")
            disk.open()
            disk.begin(step)
            for one in written:
                _write(disk, one)
        back = LocalDisk(mesh, Path(run_dir), f"{local_dir}_0")
        back.open()
        return sorted(back.steps())
