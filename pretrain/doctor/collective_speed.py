"""Time and bandwidth of an all-reduce between ranks, over NCCL or gloo as in training.

`trivium launch --nproc-per-node 8 pretrain.doctor.collective_speed` prints them, and with `--nnodes` those between
machines. Leaves out other collectives, and which of the links between ranks is slow.
"""

import statistics
import sys
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from configs.cli import entrypoint
from configs.layout import Layout
from configs.loader import from_overrides
from configs.train import ParallelConfig
from launch.environment import ClusterEnvironment, is_main, report_to_torchrun
from pretrain.parallel import groups

TIMEOUT_MINUTES = 3.0
LARGE_BYTES = 64 * 2**20
FEWEST, MOST, SECONDS = 5, 1000, 0.5  # calls that are timed, and the time that they take between those bounds


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a sentence on the links between all ranks; the argument, if there is one, is `parallel.backend`."""
    words = sys.argv[1:] if argv is None else argv
    backend = from_overrides(ParallelConfig, [f"backend={word}" for word in words]).backend
    env = ClusterEnvironment.read()
    mesh = groups.start(env, _data_parallel(env.world_size), backend, TIMEOUT_MINUTES)
    try:
        said = measured(mesh.device, backend)
        if mesh.is_main:
            print(said, flush=True)
    finally:
        groups.stop()
    return 0


def measured(device: torch.device, backend: str = "auto") -> str:
    """Returns a sentence on the all-reduces between all ranks on a device. Collective.

    Bandwidth is that of each rank's link in a ring: 2 (n - 1) / n times the bytes, divided by the time.
    """
    ranks = dist.get_world_size()
    small, large = (_seconds(torch.zeros(size, dtype=torch.uint8, device=device)) for size in (8, LARGE_BYTES))
    rate = 2 * (ranks - 1) / ranks * LARGE_BYTES / large
    name = "NCCL" if device.type == "cuda" and backend == "auto" else "gloo"
    return (
        f"{name} between {ranks} ranks: an all-reduce of 8 bytes takes {small * 1e6:,.0f} µs, one of "
        f"{LARGE_BYTES // 2**20} MiB runs at {rate / 1e9:,.2f} GB/s"
    )


def _seconds(tensor: torch.Tensor) -> float:
    """Returns the median time of an all-reduce, after one that connects the ranks and one that is timed."""
    _once(tensor)
    calls = torch.tensor(min(MOST, max(FEWEST, int(SECONDS / _once(tensor)))), device=tensor.device)
    dist.broadcast(calls, 0)
    return statistics.median(_once(tensor) for _ in range(int(calls)))


def _once(tensor: torch.Tensor) -> float:
    began = time.perf_counter()
    dist.all_reduce(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter() - began


def _data_parallel(ranks: int) -> Layout:
    """Returns a layout that needs no more than the number of ranks."""
    return Layout(
        world_size=ranks,
        tp=1,
        sp=False,
        cp=1,
        ep=1,
        pp=1,
        vpp=1,
        dp=ranks,
        zero=1,
        offload_optimizer=False,
        grad_accum_steps=1,
        layers_per_stage=(),
    )


if __name__ == "__main__":
    entrypoint(main, prints_errors=is_main(), on_error=report_to_torchrun)
