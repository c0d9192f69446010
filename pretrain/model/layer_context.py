"""The settings that layers are built with: precision, device, and the process groups that share their work."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch.distributed import ProcessGroup

from pretrain.megatron import ModelParallelConfig, get_pg_size

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class LayerContext:
    """The settings that every layer is built with. A group that is None has one rank, and nothing is split over it.

    `tp` splits weights, and with `sp` the sequence between split layers; `cp` splits the sequence everywhere; `ep`
    splits the experts. `sequence_part` is (index, count) of the part of a sequence that this process has between
    layers; `dropout` and `seed` are for `layers.Dropout`. With `weights_come_by_call` a layer's weights are there only
    while the layer itself is called (ZeRO-3).
    """

    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    sp: bool = False
    tp: ProcessGroup | None = None
    cp: ProcessGroup | None = None
    ep: ProcessGroup | None = None
    sequence_part: tuple[int, int] = (0, 1)
    dropout: float = 0.0
    seed: int = 0
    weights_come_by_call: bool = False

    @cached_property
    def tp_size(self) -> int:
        return get_pg_size(self.tp)

    @cached_property
    def tp_rank(self) -> int:
        return 0 if self.tp is None else self.tp.rank()

    @cached_property
    def cp_size(self) -> int:
        return get_pg_size(self.cp)

    @cached_property
    def cp_rank(self) -> int:
        return 0 if self.cp is None else self.cp.rank()

    @cached_property
    def ep_size(self) -> int:
        return get_pg_size(self.ep)

    @cached_property
    def megatron(self) -> ModelParallelConfig:
        """The config that megatron-core's layers take. They leave weights unset; `model.initial_weights` draws them."""
        return ModelParallelConfig(
            tensor_model_parallel_size=self.tp_size,
            sequence_parallel=self.sp,
            params_dtype=self.dtype,
            use_cpu_initialization=self.device.type == "cpu",
            perform_initialization=False,
        )
