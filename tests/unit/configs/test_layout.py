"""Impossible layouts are refused by numbers, and legal ones split as they say."""

from itertools import product
from typing import Any

import pytest

from configs.layout import Layout, balanced_layers
from configs.loader import ConfigError
from configs.train import ModelConfig, MoEConfig, ParallelConfig, TrainSection

MODEL = ModelConfig(
    vocab_size=64, num_layers=6, hidden_size=32, ffn_hidden_size=48, num_heads=4, num_kv_heads=2, tie_embeddings=True
)
TRAIN = TrainSection(steps=1, global_batch_size=12, micro_batch_size=2, seq_length=8)


MOE = MODEL.model_copy(update={"moe": MoEConfig(num_experts=6)})
LIMITED = MODEL.model_copy(update={"moe": MoEConfig(num_experts=6, capacity_factor=1.0)})


def layout(world_size: int, model: ModelConfig = MODEL, **parallel: Any) -> Layout:
    return Layout.of(world_size, ParallelConfig(**parallel), model, TRAIN)


def test_data_parallel_takes_the_ranks_that_are_left() -> None:
    found = layout(12, tp=2, pp=2)
    assert (found.dp, found.grad_accum_steps, str(found)) == (3, 2, "tp2 pp2 dp3 zero1")
    assert str(layout(6, MOE, cp=2, ep=6)) == "tp1 cp2 pp1 dp3 ep6 zero1"
    assert [found.layers_of_stage(stage) for stage in range(2)] == [range(3), range(3, 6)]


@pytest.mark.parametrize(
    ("layers", "stages", "head", "expected"),
    [
        (4, 1, 3.9, (4,)),
        (4, 2, 0.3, (2, 2)),
        (4, 2, 3.9, (3, 1)),  # the head alone is slower than three layers
        (32, 4, 1.0, (8, 8, 8, 8)),  # 9 against 8.33 for (8, 8, 9, 7): no whole layer to gain, as every split has a 9
        (30, 4, 1.5, (8, 8, 8, 6)),
        (7, 4, 0.0, (1, 2, 2, 2)),
        (6, 6, 9.0, (1, 1, 1, 1, 1, 1)),
    ],
)
def test_layers_are_spread_so_that_the_slowest_stage_is_fast(
    layers: int, stages: int, head: float, expected: tuple[int, ...]
) -> None:
    assert balanced_layers(layers, stages, head) == expected
    everything = [c for c in product(range(1, layers + 1), repeat=stages) if sum(c) == layers] if layers < 8 else []
    costs = [max(*c[:-1], c[-1] + head) for c in everything if len(c) > 1]
    assert not costs or max(*expected[:-1], expected[-1] + head) == min(costs)


def test_zero_stages_have_names() -> None:
    assert str(layout(4, tp=2, zero=3, offload_optimizer=True)) == "tp2 pp1 dp2 zero3 offload"


def test_interleaved_chunks_go_round_the_ranks() -> None:
    found = layout(2, pp=2, vpp=2, layers_per_stage=(1, 2, 2, 1))
    assert str(found) == "tp1 pp2 vpp2 dp1 zero1"
    assert [found.layers_of_stage(v) for v in range(4)] == [range(1), range(1, 3), range(3, 5), range(5, 6)]


@pytest.mark.parametrize(
    ("world_size", "parallel", "words"),
    [
        (3, {"tp": 2}, ["2 * 1 * 1 = 2", "3 ranks", "multiple of 2"]),
        (4, {"tp": 4}, ["model.num_kv_heads = 2", "parallel.tp = 4", "1 or 2"]),
        (8, {"pp": 8}, ["8 * 1 = 8 stages", "model.num_layers = 6", "lower pp or vpp"]),
        (2, {"pp": 2, "vpp": 4}, ["2 * 4 = 8 stages", "model.num_layers = 6", "lower"]),
        (1, {"vpp": 2}, ["parallel.vpp = 2", "parallel.pp = 1", "vpp=1"]),
        (4, {"pp": 2, "vpp": 2}, ["parallel.vpp = 2", "has 3", "multiple of 8"]),
        (2, {"pp": 2, "layers_per_stage": (2, 3)}, ["[2, 3]", "sum 5", "2 numbers", "model.num_layers = 6"]),
        (2, {"pp": 2, "layers_per_stage": (6, 0)}, ["[6, 0]", "1 or more"]),
        (2, {"pp": 2, "layers_per_stage": (6,)}, ["1 numbers", "pp * vpp = 2"]),
        (5, {}, ["train.global_batch_size = 12", "5 * 2", "the nearest that is: 10"]),
        (2, {"zero": 2, "pp": 2}, ["parallel.zero = 2", "parallel.pp = 2", "parallel.zero=1", "parallel.pp=1"]),
        (4, {"zero": 3, "pp": 2}, ["parallel.zero = 3", "parallel.pp = 2", "parallel.zero=1", "parallel.pp=1"]),
        (2, {"zero": 3, "ep": 2}, ["parallel.zero = 3", "parallel.ep = 2", "parallel.zero=2", "parallel.ep=1"]),
        (2, {"sp": True}, ["parallel.sp = true", "tp = 1"]),
        (2, {"ep": 2}, ["parallel.ep = 2", "has none", "parallel.ep=1"]),
        (4, {"model": MOE, "ep": 4}, ["model.moe.num_experts = 6", "parallel.ep = 4", "2 or 3 or 6"]),
        (2, {"model": MOE, "ep": 3}, ["parallel.ep = 3", "dp * cp = 2 * 1 = 2", "2, or start more"]),
        (4, {"cp": 4}, ["model.num_kv_heads = 2", "1 * 4", "1 or 2"]),
        (4, {"tp": 2, "cp": 2}, ["model.num_kv_heads = 2", "2 * 2", "cp could be 1"]),
        (3, {"cp": 3}, ["train.seq_length = 8", "parallel.cp = 3", "9"]),
        (6, {"tp": 2, "sp": True, "cp": 3}, ["parallel.cp = 3 * parallel.tp = 2 (parallel.sp = true)", "6"]),
        (2, {"model": LIMITED, "cp": 2}, ["capacity_factor = 1.0", "parallel.cp = 2"]),
    ],
)
def test_an_impossible_layout_names_its_numbers(world_size: int, parallel: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        layout(world_size, **parallel)
    assert all(word in str(raised.value) for word in words), raised.value
