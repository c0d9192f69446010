"""Functions run in the ranks: training on nodes, each of which has a disk of its own at the same path."""

import os
from pathlib import Path
from typing import Any

from configs.layout import Layout
from configs.loader import validate
from configs.model import ModelConfig
from configs.train import ParallelConfig, TrainSection
from launch.environment import ClusterEnvironment
from pretrain.checkpoint import storage
from pretrain.checkpoint.local_disk import LocalDisk
from pretrain.parallel import groups
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


def starts(run_dir: str, local_dir: str, model: dict[str, Any], begun: list[tuple[int, list[int]]]) -> list[int]:
    """Returns the steps that a run can go on from after starts, each from a step and with the steps that it wrote.

    Before each start the node is replaced by one with an empty disk, and it is the first node that comes back.
    """
    env = ClusterEnvironment.read()
    section = TrainSection(steps=1, global_batch_size=1, micro_batch_size=1, seq_length=8)
    layout = Layout.of(1, ParallelConfig(), validate(ModelConfig, model), section)
    with groups.joined(env, layout) as mesh:
        for number, (step, written) in enumerate(begun):
            disk = LocalDisk(mesh, Path(run_dir), f"{local_dir}_{number}")
            disk.open()
            disk.begin(step)
            for one in written:
                path = storage.directory(disk.path, one)
                path.mkdir(parents=True)
                (path / storage.MANIFEST).touch()
        back = LocalDisk(mesh, Path(run_dir), f"{local_dir}_0")
        back.open()
        return sorted(back.steps())
