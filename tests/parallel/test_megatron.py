"""Behaviour of megatron-core that pretrain relies on: one test for each item in pretrain/megatron.py, of its name.

A version of megatron-core that behaves differently fails here. The tests on two ranks are in workers/megatron.py.
"""

import inspect
import re
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pretrain import megatron
from pretrain.megatron import parallel_state
from tests.parallel.harness import RanksOf
from tests.parallel.workers.megatron import (
    IN,
    IN_TWO_RANKS,
    KEPT,
    MODEL,
    OUT,
    layer_config,
    layout,
)


def whole_layer() -> None:
    one: Any = types.SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    config = layer_config(tp=1)
    column = megatron.ColumnParallelLinear(
        IN, OUT, config=config, gather_output=False, disable_grad_reduce=True, tp_group=one, **KEPT
    )
    row = megatron.RowParallelLinear(
        OUT, IN, config=config, input_is_parallel=True, skip_bias_add=False, tp_group=one, **KEPT
    )
    embedding = megatron.VocabParallelEmbedding(
        OUT, IN, init_method=KEPT["init_method"], reduce_scatter_embeddings=False, config=config, tp_group=one
    )
    assert column.weight.shape == (OUT, IN) and column.output_size_per_partition == column.output_size == OUT
    assert row.weight.shape == (IN, OUT) and row.input_size_per_partition == row.input_size == OUT
    assert embedding.weight.shape == (OUT, IN) and embedding.num_embeddings_per_partition == OUT


def unset_weights() -> None:
    def refuse(weight: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a weight was set")

    one: Any = types.SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    config = layer_config(tp=1, dtype=torch.bfloat16)
    shared = {"config": config, "init_method": refuse, "tp_group": one}
    weights = [
        megatron.ColumnParallelLinear(IN, OUT, bias=False, gather_output=False, **shared).weight,
        megatron.RowParallelLinear(OUT, IN, bias=False, input_is_parallel=True, skip_bias_add=False, **shared).weight,
        megatron.VocabParallelEmbedding(OUT, IN, **shared).weight,
    ]
    for weight in weights:
        assert weight.dtype == torch.bfloat16


def group_size() -> None:
    assert megatron.get_pg_size(None) == 1


def rank_order() -> None:
    def groups(names: str, **sizes: int) -> list[list[int]]:
        degrees = {"tp": 1, "ep": 1, "dp": 1, "pp": 1, "cp": 1} | sizes
        return parallel_state.RankGenerator(**degrees, order="tp-cp-ep-dp-pp").get_ranks(names)

    assert groups("tp", tp=2, cp=2, dp=2, pp=2)[:2] == [[0, 1], [2, 3]]
    assert groups("cp", tp=2, cp=2, dp=2, pp=2)[:2] == [[0, 2], [1, 3]]
    assert groups("dp", tp=2, cp=2, dp=2, pp=2)[:2] == [[0, 4], [1, 5]]
    assert groups("pp", tp=2, cp=2, dp=2, pp=2)[:2] == [[0, 8], [1, 9]]
    assert groups("tp-cp-pp", tp=2, cp=2, dp=2, pp=2) == [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]
    assert groups("ep", tp=2, ep=2, dp=2) == [[0, 2], [1, 3], [4, 6], [5, 7]]


def accepted_config() -> None:
    split = layout(tp=2, sp=True, cp=2, pp=2, vpp=2)
    for shape in (layout(), layout(tp=2), layout(pp=2), layout(pp=2, vpp=2), layout(pp=7, vpp=3), layout(cp=2), split):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            config = megatron.schedule_config(MODEL, shape, dtype)
            assert config.pipeline_dtype == dtype and config.calculate_per_token_loss
            # megatron-core does nothing to gradients and losses, which Trivium sums itself.
            assert config.finalize_model_grads_func is None and config.grad_scale_func is None
            assert config.no_sync_func is None and config.timers is None
            assert config.deallocate_pipeline_outputs == (shape.pp > 1 and shape.vpp == 1) and not config.batch_p2p_sync


def cpu_redirections() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is CUDA, and nothing is redirected")
    megatron.redirect_to_cpu()
    assert {module.__name__.removeprefix("megatron.core.") for module in megatron.REDIRECTED} == {
        "pipeline_parallel.schedules",
        "pipeline_parallel.p2p_communication",
        "tensor_parallel.layers",
        "tensor_parallel.mappings",
    }
    for module in megatron.REDIRECTED:
        seen: Any = module.__dict__["torch"]  # a global of the module, which each use looks up again
        assert seen.cuda.current_device() == torch.device("cpu") and seen.cuda.synchronize() is None
        assert seen.zeros([], dtype=torch.int, device="cuda").device == torch.device("cpu")
        assert seen.Tensor is torch.Tensor and seen.cuda.Stream is torch.cuda.Stream
    with pytest.raises((AssertionError, RuntimeError)):  # only megatron-core gets the redirected `torch`
        torch.zeros(1, device="cuda")


# The tests below run in two ranks, which have the default process group.


ALONE = (whole_layer, unset_weights, group_size, rank_order, accepted_config, cpu_redirections)


@pytest.mark.parametrize("fact", ALONE)
def test_fact(fact: Callable[[], None]) -> None:
    fact()


@pytest.mark.parametrize("fact", IN_TWO_RANKS)
def test_fact_in_two_ranks(fact: Callable[[], None], ranks: RanksOf) -> None:
    ranks(2).run(f"{fact.__module__}:{fact.__name__}")


def test_every_fact_that_is_listed_has_a_test() -> None:
    lines = [line for line in str(inspect.getdoc(megatron)).splitlines() if line.startswith("- ")]
    listed = [name for line in lines for name in re.findall(r"`(\w+)`", line.split(":")[0])]
    assert sorted(listed) == sorted(fact.__name__ for fact in (*ALONE, *IN_TWO_RANKS))
