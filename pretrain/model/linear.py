"""Linear layers and embedding split over tensor-parallel ranks: megatron-core's, minus what one rank does not need.

A layer is told its `tp_group`; None means a layer that is whole. When whole, the weight goes through a plain
`F.linear`, so that `torch.compile` takes a block in one graph.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed import ProcessGroup

from pretrain.model.megatron import ModelParallelConfig, tensor_parallel


def layer_config(dtype: torch.dtype, device: torch.device, tp: int = 1) -> ModelParallelConfig:
    """What megatron-core's layers ask to be told. Weights are left unset: `model.init` draws them by name."""
    return ModelParallelConfig(
        tensor_model_parallel_size=tp,
        params_dtype=dtype,
        use_cpu_initialization=device.type == "cpu",
        perform_initialization=False,
    )


class _Whole:
    """A group of one. megatron-core takes None for "the group of this process", whatever that is by now."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


_WHOLE: Any = _Whole()


def _no_init(weight: torch.Tensor) -> torch.Tensor:
    return weight


class ColumnLinear(tensor_parallel.ColumnParallelLinear):
    """y = x Wᵀ with W [out, in] split over its rows: every rank computes out/tp of the outputs."""

    def __init__(self, size_in: int, size_out: int, config: ModelParallelConfig, tp_group: ProcessGroup | None):
        super().__init__(
            size_in,
            size_out,
            config=config,
            init_method=_no_init,
            bias=False,
            tp_group=tp_group or _WHOLE,
            gather_output=False,
        )
        tensor_parallel.set_tensor_model_parallel_attributes(self.weight, self.is_split, 0, 1)

    @property
    def is_split(self) -> bool:
        return self.output_size_per_partition != self.output_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[0] if self.is_split else F.linear(x, self.weight)


class RowLinear(tensor_parallel.RowParallelLinear):
    """y = x Wᵀ with W [out, in] split over its columns: every rank has in/tp of the inputs; outputs are summed."""

    def __init__(self, size_in: int, size_out: int, config: ModelParallelConfig, tp_group: ProcessGroup | None):
        super().__init__(
            size_in,
            size_out,
            config=config,
            init_method=_no_init,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=tp_group or _WHOLE,
        )
        tensor_parallel.set_tensor_model_parallel_attributes(self.weight, self.is_split, 1, 1)

    @property
    def is_split(self) -> bool:
        return self.input_size_per_partition != self.input_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[0] if self.is_split else F.linear(x, self.weight)


class Embedding(tensor_parallel.VocabParallelEmbedding):
    """Token embedding [V, H] split over the vocabulary; the lookups are summed over tp."""

    def __init__(self, vocab_size: int, hidden_size: int, config: ModelParallelConfig, tp_group: ProcessGroup | None):
        super().__init__(vocab_size, hidden_size, init_method=_no_init, config=config, tp_group=tp_group or _WHOLE)
        self.is_split = self.num_embeddings_per_partition != vocab_size
        tensor_parallel.set_tensor_model_parallel_attributes(self.weight, self.is_split, 0, 1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens) if self.is_split else F.embedding(tokens, self.weight)
