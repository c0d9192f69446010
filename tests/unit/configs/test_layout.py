"""Impossible layouts are refused by numbers, and legal ones split as they say."""

from typing import Any

import pytest

from configs.layout import Layout
from configs.loader import ConfigError
from configs.train import ModelConfig, ParallelConfig, TrainSection

MODEL = ModelConfig(
    vocab_size=64, num_layers=6, hidden_size=32, ffn_hidden_size=48, num_heads=4, num_kv_heads=2, tie_embeddings=True
)
TRAIN = TrainSection(steps=1, global_batch_size=12, micro_batch_size=2, seq_length=8)


def layout(world_size: int, **parallel: Any) -> Layout:
    return Layout.of(world_size, ParallelConfig(**parallel), MODEL, TRAIN)


def test_data_parallel_takes_the_ranks_that_are_left() -> None:
    found = layout(12, tp=2, pp=2)
    assert (found.dp, found.grad_accum_steps, str(found)) == (3, 2, "tp2 pp2 dp3 zero1")
    assert [found.layers_of_stage(6, stage) for stage in range(2)] == [range(3), range(3, 6)]


@pytest.mark.parametrize(
    ("world_size", "parallel", "words"),
    [
        (3, {"tp": 2}, ["2 * 1 = 2", "3 ranks", "multiple of 2"]),
        (4, {"tp": 4}, ["model.num_kv_heads = 2", "parallel.tp = 4", "1 or 2"]),
        (4, {"pp": 4}, ["model.num_layers = 6", "parallel.pp = 4", "2 or 3 or 6"]),
        (5, {}, ["train.global_batch_size = 12", "5 * 2", "the nearest that is: 10"]),
        (1, {"zero": 2}, ["parallel.zero = 2 is not built yet"]),
        (1, {"zero": 0}, ["parallel.zero = 0 is not built yet"]),
        (2, {"tp": 2, "sp": True}, ["parallel.sp", "not built yet"]),
        (2, {"vpp": 2, "pp": 2}, ["parallel.vpp = 2 is not built yet"]),
        (2, {"ep": 2}, ["parallel.ep = 2 is not built yet"]),
        (2, {"cp": 2}, ["parallel.cp = 2 is not built yet"]),
    ],
)
def test_an_impossible_layout_names_its_numbers(world_size: int, parallel: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        layout(world_size, **parallel)
    assert all(word in str(raised.value) for word in words), raised.value
