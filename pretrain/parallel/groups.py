"""Process groups of a layout, made by megatron-core's parallel_state, and one rank's coordinates in them (`Mesh`).

`start` joins the world (gloo on CPU, NCCL on GPU) and makes the groups; `stop` leaves it, so that a process can join
again with another layout, as the tests do. Several ranks on one GPU need `parallel.backend = gloo` (`staged_gloo`).
"""

import contextlib
import datetime
import gc
import os
import platform
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from configs.layout import Layout
from configs.loader import ConfigError
from launch.environment import ClusterEnvironment, is_loopback
from pretrain.megatron import parallel_state
from pretrain.model.slices import Slices, is_expert, tp_split
from pretrain.parallel import staged_gloo
from pretrain.parallel.deepspeed_import import deepspeed, redirect_to_cpu
from pretrain.parallel.host_memory import keep_freed_memory
from pretrain.parallel.rank_messages import gather_json

LOOPBACK = "lo"  # the name of the loopback interface on Linux
RECORDED = "2000"  # the last collectives that torch's flight recorder keeps on each rank; the watchdog reads them


@dataclass(frozen=True)
class Mesh:
    """One rank's coordinates and groups in a layout; `environment` is as the launcher set it, or nobody."""

    environment: ClusterEnvironment
    layout: Layout
    rank: int
    tp_rank: int
    cp_rank: int
    ep_rank: int
    pp_rank: int
    dp_rank: int
    device: torch.device
    tp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    ep_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    zero_group: dist.ProcessGroup  # dp and cp: ranks with the same weights, experts aside, and different tokens
    expert_dp_group: dist.ProcessGroup  # the ranks of zero_group that hold the same experts
    kv_group: dist.ProcessGroup | None = None  # the ranks of tp_group that hold the same key-value head, if several do

    @property
    def zero_size(self) -> int:
        """Number of ranks that ZeRO averages over."""
        return self.layout.dp * self.layout.cp

    @property
    def sequence_part(self) -> tuple[int, int]:
        """(index, count) of the part of a sequence that this rank holds between layers."""
        if not self.layout.sp:
            return self.cp_rank, self.layout.cp
        return self.cp_rank * self.layout.tp + self.tp_rank, self.layout.cp * self.layout.tp

    def is_first_copy(self, parameter: nn.Parameter) -> bool:
        """Tells whether this rank is the first of the tensor-parallel ranks that hold the same slice of a parameter."""
        split = tp_split(parameter)
        return self.tp_rank == 0 if split is None else self.tp_rank % split.copies == 0

    def is_first_holder(self, parameter: nn.Parameter) -> bool:
        """Tells whether this rank is the first of the data-parallel ranks that hold the same slice of a parameter."""
        group = self.expert_dp_group if is_expert(parameter) else self.zero_group
        return dist.get_rank(group) == 0

    def gather_whole(self, slice_: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """Gathers a whole tensor that is split over ranks like `parameter`, of which `slice_` is this rank's part."""
        split = tp_split(parameter)
        if split is not None:
            parts = _gather(slice_, self.tp_group)[:: split.copies]
            slice_ = torch.cat(parts, split.dim).narrow(split.dim, 0, split.size)
        if self.layout.ep > 1 and is_expert(parameter):
            slice_ = torch.cat(_gather(slice_, self.ep_group))
        return slice_

    @property
    def slices(self) -> Slices:
        """The slices of parameters that this rank holds."""
        return Slices(self.layout.tp, self.tp_rank, self.layout.ep, self.ep_rank)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.layout.pp - 1

    @property
    def counts_in_sums(self) -> bool:
        """Tells whether sums over all ranks count this rank's loss, so that each part of a sequence counts once."""
        return self.is_last_stage and self.tp_rank == 0

    def sum_over_world(self, values: torch.Tensor) -> torch.Tensor:
        """Sums `values` over all ranks in fp64, so that the order of summation does not show in fp32."""
        total = values.to(self.device, torch.float64)
        dist.all_reduce(total)
        return total

    def sum_on_host(self, values: torch.Tensor) -> np.ndarray:
        """Sums `values`, in host memory, over all ranks in fp64 by gloo, which waits for no GPU."""
        total = values.double()
        dist.all_reduce(total)
        return total.numpy()

    def gather_json(self, value: Any) -> list[Any]:
        """Returns every rank's value on every rank, in rank order. Values are sent as JSON: nothing is unpickled."""
        return gather_json(value)


def _gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Returns the tensors of all ranks of `group`, which have the same shape."""
    tensors = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(tensors, tensor.contiguous(), group=group)
    return tensors


def device_of(local_rank: int, visible: int) -> torch.device:
    """Returns the device of a rank that sees `visible` GPUs: all of its node, or only its own as Slurm may show it."""
    return torch.device("cuda", local_rank % visible) if visible else torch.device("cpu")


def backend_of(device: torch.device, backend: str) -> str:
    """Returns the backend of torch.distributed for groups on a device, given `parallel.backend`."""
    if device.type != "cuda":
        return "gloo"
    return staged_gloo.NAME if backend == "gloo" else "cpu:gloo,cuda:nccl"


def refuse_shared_gpus(gpus: Sequence[Sequence[str]]) -> None:
    """Raises ConfigError if two ranks have the same GPU, which NCCL refuses; `gpus` are (host, GPU) by rank."""
    first: dict[tuple[str, ...], int] = {}
    for rank, gpu in enumerate(gpus):
        other = first.setdefault(tuple(gpu), rank)
        if other != rank:
            raise ConfigError(
                f"parallel.backend = 'auto' gives each rank a GPU of its own, but ranks {other} and {rank} on "
                f"{gpu[0]} see one and the same; start fewer ranks there, or set parallel.backend=gloo, which is "
                "slow, to try a layout on one GPU"
            )


def _use_gpu(device: torch.device) -> None:
    torch.cuda.set_device(device)
    # fp32 means fp32, also where an image's environment variables ask for TF32, and a product in bf16 is added up in
    # fp32 to its end.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def start(env: ClusterEnvironment, layout: Layout, backend: str = "auto", timeout_minutes: float = 30) -> Mesh:
    """Joins the world that the launcher described and makes all groups of `layout`.

    `backend` is `parallel.backend`. Raises ConfigError if NCCL would find two ranks on one GPU.
    """
    redirect_to_cpu()
    staged_gloo.register()
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", RECORDED)
    device = device_of(env.local_rank, torch.cuda.device_count())
    if device.type == "cuda":
        _use_gpu(device)
    os.environ.update(env.as_variables())  # DeepSpeed reads torchrun's variables whoever the launcher was
    if not dist.is_initialized():
        store = _store(env, timeout_minutes)
        dist.init_process_group(
            backend_of(device, backend),
            store=store,
            init_method="env://" if store is None else None,
            rank=env.rank,
            world_size=env.world_size,
            timeout=datetime.timedelta(minutes=timeout_minutes),
        )
    if device.type == "cuda" and backend == "auto":
        gpu = [platform.node(), str(torch.cuda.get_device_properties(device).uuid)]
        refuse_shared_gpus(gather_json(gpu))  # before NCCL is first used
    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout_minutes,
    )
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    return Mesh(
        environment=env,
        layout=layout,
        rank=env.rank,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        device=device,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        ep_group=parallel_state.get_expert_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        zero_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        expert_dp_group=parallel_state.get_expert_data_parallel_group(),
        kv_group=_kv_group(layout, env.rank),
    )


def _store(env: ClusterEnvironment, timeout_minutes: float) -> dist.Store | None:
    """Returns the store in which ranks meet if this rank opens one itself; None leaves it to torch.

    torch's store can be reached at all addresses of the machine. Ranks of one machine meet on loopback, and gloo, which
    would listen at the address of the machine's name, does so too unless GLOO_SOCKET_IFNAME is set.
    """
    if env.launcher == "single":  # a world of one rank needs no port
        return dist.HashStore()
    if env.is_one_machine and is_loopback(env.master_address) and LOOPBACK in dict(socket.if_nameindex()).values():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    if not env.opens_loopback:
        return None
    try:
        listener = socket.create_server((env.master_address, env.master_port))
    except OSError:
        return None  # torch's own store says what is wrong
    store = dist.TCPStore(
        env.master_address,
        env.master_port,
        env.world_size,
        is_master=True,
        timeout=datetime.timedelta(minutes=timeout_minutes),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return dist.PrefixStore("default_pg", store)  # as torch names it in the stores of the other ranks


@contextlib.contextmanager
def joined(env: ClusterEnvironment, layout: Layout, backend: str = "auto") -> Iterator[Mesh]:
    """Context manager that calls `start`, yields this rank's `Mesh`, and calls `stop` at the end.

    It turns on the garbage collector, which a command that trains leaves off while it imports modules.
    """
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    mesh = start(env, layout, backend)
    if mesh.device.type == "cpu":
        keep_freed_memory()
    try:
        yield mesh
    finally:
        stop()


def _kv_group(layout: Layout, rank: int) -> dist.ProcessGroup | None:
    if layout.kv_copies == 1:
        return None
    firsts = range(0, layout.world_size, layout.kv_copies)  # ranks of a tensor-parallel group are neighbours
    return _own_group([range(first, first + layout.kv_copies) for first in firsts], rank, "key-value head group")


def _own_group(groups: Sequence[Sequence[int]], rank: int, purpose: str) -> dist.ProcessGroup:
    """Makes all groups, as every rank must, and returns the one with this rank."""
    own = None
    for ranks in groups:
        group = dist.new_group(list(ranks), group_desc=purpose)
        own = group if rank in ranks else own
    assert own is not None
    return own


def stop() -> None:
    """Destroys the groups that `start` made, and the references to them in DeepSpeed's module globals."""
    from deepspeed.utils import groups as deepspeed_groups

    parallel_state.destroy_model_parallel()
    deepspeed_groups._EXPERT_PARALLEL_GROUP.clear()
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP.clear()
    deepspeed_groups.expert_tensor_parallel_world_size = 1
    deepspeed_groups.mpu = None
    deepspeed_groups._WORLD_GROUP = None
    deepspeed.comm.comm.cdb = None
    if dist.is_initialized():
        dist.destroy_process_group()


class DeepSpeedMpu:
    """Adapter that gives DeepSpeed, as its `mpu` argument, megatron-core's groups.

    Context-parallel ranks count as data parallel here: they hold the same weights and different tokens.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(parallel_state, name)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.get_data_parallel_group())

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.get_data_parallel_group())

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return parallel_state.get_model_parallel_group()

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(parallel_state.get_model_parallel_group())

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(parallel_state.get_model_parallel_group())
