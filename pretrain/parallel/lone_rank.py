"""One rank of a layout alone in its process: torch's `fake` process group, whose collectives do nothing.

The rank's device is torch's `meta` device, whose tensors have shapes and no values. So the engine of a rank in a world
of any size can be built and called on one machine, to see what it asks of its groups.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from configs.layout import Layout
from launch.environment import ClusterEnvironment
from pretrain import megatron
from pretrain.parallel import groups
from pretrain.parallel.deepspeed_on_meta import META, deepspeed_on_meta
from pretrain.parallel.groups import Mesh


@contextlib.contextmanager
def alone(layout: Layout, rank: int) -> Iterator[Mesh]:
    """Context manager that joins a world of which no other rank exists, and yields the mesh of `rank` in it."""
    world_size = layout.world_size
    env = ClusterEnvironment("torchrun", rank, world_size, 0, world_size, 0, "127.0.0.1", 0)
    dist.init_process_group("cpu:fake,meta:fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        mesh = replace(groups.start(env, layout), device=META)
        megatron.redirect_to(META)
        by_deepspeed = layout.zero > 1 or layout.offload_optimizer
        with deepspeed_on_meta() if by_deepspeed else contextlib.nullcontext():
            yield mesh
    finally:
        megatron.redirect_to_cpu()
        groups.stop()
