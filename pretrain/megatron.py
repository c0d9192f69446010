"""Everything that pretrain uses of megatron-core: its imports, the behaviour relied on, and how it runs without CUDA.

No other file imports megatron-core. The list below is behaviour that pretrain relies on and that megatron-core's
documentation does not promise. Each item has a test of its name in tests/parallel/test_megatron.py, so that a new
version which behaves differently fails there, by that name, before training goes wrong.

Layers, for pretrain/model:

- `whole_layer`: a layer takes anything with `size()` and `rank()` for a group of one.
- `unset_weights`: with `perform_initialization` off, weights keep what memory held, in `params_dtype`.
- `column_layer`: it returns (output, None), and with `disable_grad_reduce` the input's gradient is this rank's part;
  with its `sequence_parallel` set to False, it takes the whole sequence whatever the config says.
- `row_layer`: it returns (summed output, None), and under sequence parallel this rank's share of the sum.
- `embedding`: lookups are summed; `reduce_scatter_embeddings` takes [B, S] and gives this rank's [S/tp, B, H].
- `regions`: what each way into and out of split layers does, and its gradient, for contiguous tensors.
- `exchange`: `all_to_all` takes the rows that arrive before those that leave; its gradient goes back the same way.
- `group_size`: `get_pg_size` of None is 1.

Groups, for pretrain/parallel:

- `rank_order`: the order of ranks is tp, cp, dp, pp from neighbours to farthest, with ep inside cp and dp.
- `process_groups`: which ranks are in each group that pretrain gets from `parallel_state`, which can drop them all.

Schedules, for pretrain/parallel:

- `schedule_without_pipeline`, `pipeline`, `interleaved_pipeline`: `get_forward_backward_func` picks one by the groups;
  how it calls the model and the loss; that a loss function which returns three values has its loss left alone, since
  the config says `calculate_per_token_loss`; that the third values come back in order, on the last stage.
- `accepted_config`: the config takes the layouts that Trivium allows.
- `cpu_redirections`: the modules of `redirect_to_cpu` look up the global `torch` at each use.
"""

import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from configs.layout import Layout
from configs.model import ModelConfig


def _unchanged(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
    return (lambda decorated: decorated) if function is None else function


@contextmanager
def not_installed(*names: str) -> Iterator[None]:
    """Context in which modules that have not been imported yet cannot be."""
    names = tuple(name for name in names if name not in sys.modules)
    refused: Any = None  # what makes an import fail
    for name in names:
        sys.modules[name] = refused
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


# While it is imported, megatron-core passes fused kernels that Trivium does not use to `torch.compile`. That loads all
# of Inductor, which takes seconds on every rank, as do the loggers that its timers would import if it could. It also
# warns of each accelerator package that is not installed.
with (
    mock.patch.object(torch, "compile", _unchanged),
    not_installed("torch.utils.tensorboard", "wandb"),
    warnings.catch_warnings(),
):
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.enums import ModelType
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.pipeline_parallel import get_forward_backward_func, p2p_communication, schedules
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        all_to_all,
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        layers,
        mappings,
        reduce_from_tensor_model_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
    )
    from megatron.core.transformer import TransformerConfig
    from megatron.core.utils import get_pg_size

__all__ = [
    "ColumnParallelLinear",
    "ModelParallelConfig",
    "ModelType",
    "RowParallelLinear",
    "TransformerConfig",
    "VocabParallelEmbedding",
    "all_to_all",
    "copy_to_tensor_model_parallel_region",
    "gather_from_sequence_parallel_region",
    "get_forward_backward_func",
    "get_pg_size",
    "not_installed",
    "parallel_state",
    "redirect_to",
    "redirect_to_cpu",
    "reduce_from_tensor_model_parallel_region",
    "reduce_scatter_to_sequence_parallel_region",
    "schedule_config",
]

# Which modules ask torch for "the current CUDA device", synchronise it, or make a counter on it.
REDIRECTED = (schedules, p2p_communication, layers, mappings)

warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")


def schedule_config(model: ModelConfig, layout: Layout, dtype: torch.dtype) -> TransformerConfig:
    """Builds the config of megatron-core's pipeline schedules for a layout.

    megatron-core refuses a number of layers that its pipeline chunks cannot share evenly; Trivium's chunks may be
    uneven, so the config says one layer per chunk.
    """
    return TransformerConfig(
        num_layers=layout.pp * layout.vpp,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        tensor_model_parallel_size=layout.tp,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        # Between two ranks an interleaved schedule has activations and gradients under way in the same direction at
        # once; batched, they would be taken for one another.
        overlap_p2p_comm=layout.vpp > 1,
        batch_p2p_comm=layout.vpp == 1,
        batch_p2p_sync=False,  # it would wait for the whole device because of a fault of old versions of torch
        # Backward does not need the values of an output that was sent. An interleaved schedule would empty outputs that
        # gloo is still sending, and gloo does not keep their memory.
        deallocate_pipeline_outputs=layout.pp > 1 and layout.vpp == 1,
        calculate_per_token_loss=True,
        use_cpu_initialization=not torch.cuda.is_available(),
    )


class _Redirected(types.ModuleType):
    """Module with the attributes of `original`, some of them replaced."""

    def __init__(self, original: types.ModuleType, **replaced: Any):
        super().__init__(original.__name__)
        self.__dict__.update(replaced)
        self.__dict__["_original"] = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_original"], name)


def redirect_to_cpu() -> None:
    """Gives megatron-core a `torch` whose current CUDA device is the CPU; does nothing on machines with CUDA."""
    if not torch.cuda.is_available():
        redirect_to(torch.device("cpu"))


def redirect_to(chosen: torch.device) -> None:
    """Gives megatron-core a `torch` whose current CUDA device is `chosen`, such as one without memory."""

    def zeros(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, device=chosen if device == "cuda" else device, **options)

    cuda = _Redirected(torch.cuda, current_device=lambda: chosen, synchronize=lambda *_: None)
    for module in REDIRECTED:
        module.torch = _Redirected(torch, cuda=cuda, zeros=zeros)  # type: ignore[attr-defined]
