"""Functions that test_harness.py runs in the ranks: sums, a failure, a hang, a death."""

import gc
import os
import time
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.distributed as dist

from configs.layout import Layout
from configs.loader import validate
from configs.model import ModelConfig
from configs.train import ParallelConfig, TrainSection
from launch import bootstrap
from launch.environment import ClusterEnvironment
from pretrain.parallel import groups
from tests.parallel.matrix import MODELS


def total(values: list[float]) -> dict[str, object]:
    """Sums values[rank] over all ranks."""
    tensor = torch.tensor(values[dist.get_rank()])
    dist.all_reduce(tensor)
    return {"total": tensor.item(), "world_size": dist.get_world_size(), "pid": os.getpid()}


def listening() -> list[str]:
    """Joins the ranks as a training command does, and returns the addresses, in hex, that this process listens at."""
    os.environ.pop("GLOO_SOCKET_IFNAME", None)  # which only tests set
    with _joined():
        dist.all_reduce(torch.ones(1))
        own = {os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()}
        lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()]
        found = [line[1].split(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in own]
        dist.barrier()
    return found


def garbage_collected() -> None:
    """Begins as a training command does: the garbage collector is off until the ranks are joined."""
    bootstrap.begin("pretrain.train")
    assert not gc.isenabled()
    with _joined():
        assert gc.isenabled()


def _joined() -> AbstractContextManager[groups.Mesh]:
    env = ClusterEnvironment.read()
    section = TrainSection(steps=1, global_batch_size=2, micro_batch_size=1, seq_length=8)
    layout = Layout.of(env.world_size, ParallelConfig(), validate(ModelConfig, MODELS["dense"]), section)
    return groups.joined(env, layout)


def fail_in(rank: int) -> None:
    """Raises in one rank while the others wait for it."""
    if dist.get_rank() == rank:
        raise ValueError(f"planted in rank {rank}")
    dist.all_reduce(torch.zeros(1))


def hang_in(rank: int) -> str:
    """Sleeps in one rank without taking part in anything."""
    if dist.get_rank() == rank:
        time.sleep(600)
    return "done"


def die_in(rank: int) -> None:
    """Ends one rank's process without an exception, as the kernel's OOM killer would.

    The kernel may close the process's sockets well before it ends: other ranks can report an exception first.
    """
    if dist.get_rank() == rank:
        print("last words", flush=True)
        dist.destroy_process_group()
        time.sleep(0.5)
        os._exit(7)
    dist.all_reduce(torch.zeros(1))


def bring_up_own_group() -> int:
    """Makes the process group from torchrun's variables, as an entrypoint does."""
    dist.init_process_group("gloo", init_method="env://")
    return dist.get_world_size()


def groups_left() -> bool:
    """Whether a process group of an earlier call is still up."""
    return dist.is_initialized()


def megatron_sizes(tp: int) -> list[int]:
    """Returns the [tensor-parallel, data-parallel] sizes of megatron-core's groups after making them."""
    from megatron.core import parallel_state

    assert not parallel_state.model_parallel_is_initialized()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    return [
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(),
    ]


def draw() -> float:
    """Draws a number from the global random generator, which is reset before every call."""
    return torch.rand(1).item()
