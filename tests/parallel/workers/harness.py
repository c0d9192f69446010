"""Functions that test_harness.py runs in the ranks: sums, a failure, a hang, a death."""

import os
import time

import torch
import torch.distributed as dist


def total(values: list[float]) -> dict[str, object]:
    """Sums values[rank] over all ranks."""
    tensor = torch.tensor(values[dist.get_rank()])
    dist.all_reduce(tensor)
    return {"total": tensor.item(), "world_size": dist.get_world_size(), "pid": os.getpid()}


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
