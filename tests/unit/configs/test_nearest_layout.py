"""The nearest legal layout for fewer ranks: what is kept, what changes, what stays idle, in many worlds."""

import time
from typing import Any

import pytest

from configs.layout import Layout
from configs.loader import ConfigError, validate
from configs.model import ModelConfig
from configs.nearest_layout import nearest_layout
from configs.train import ParallelConfig, TrainSection

DENSE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_layers": 8,
    "num_heads": 8,
    "num_kv_heads": 8,
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": DENSE,
    "gqa": {**DENSE, "num_kv_heads": 2},
    "moe": {**DENSE, "moe": {"num_experts": 8, "top_k": 2}},
}
SHORT = ("tp", "sp", "cp", "ep", "pp", "vpp", "zero")
TABLE: list[tuple[str, dict[str, Any], int, int, int, dict[str, Any], int]] = [
    # model, [parallel], global batch, micro-batch, ranks; then what changes, and the ranks that are used
    ("dense", {}, 512, 2, 4, {}, 4),
    ("dense", {"tp": 2, "pp": 2}, 512, 2, 32, {}, 32),
    ("dense", {"tp": 2, "pp": 2}, 512, 2, 24, {}, 16),  # dp 6 does not divide 512
    ("dense", {"tp": 2, "pp": 2}, 480, 2, 24, {}, 24),  # but 480
    ("dense", {"tp": 2}, 12, 4, 8, {"micro": 3}, 8),  # dp 4 has 3 samples each
    ("dense", {"tp": 2}, 16, 4, 15, {"micro": 4}, 8),  # dp 7 to 5 do not divide 16
    ("dense", {"tp": 4, "sp": True, "pp": 2}, 16, 2, 8, {}, 8),
    ("dense", {"tp": 4, "sp": True, "pp": 2}, 16, 2, 7, {"tp": 1, "sp": False, "pp": 7}, 7),
    ("dense", {"tp": 4, "sp": True, "pp": 2}, 16, 2, 6, {"tp": 2, "pp": 3}, 6),
    ("dense", {"tp": 4, "sp": True, "pp": 2}, 16, 2, 4, {"pp": 1}, 4),
    ("dense", {"tp": 4, "sp": True, "pp": 2}, 16, 2, 2, {"tp": 1, "sp": False}, 2),
    ("dense", {"tp": 2, "sp": True}, 16, 2, 1, {"tp": 1, "sp": False}, 1),
    ("gqa", {"tp": 8}, 16, 2, 4, {"tp": 4}, 4),  # two ranks for each of two key-value heads
    ("gqa", {"tp": 8}, 16, 2, 3, {"tp": 1, "pp": 3}, 3),
    ("dense", {"cp": 4}, 16, 2, 2, {"cp": 2}, 2),
    ("dense", {"tp": 2, "cp": 2, "pp": 2}, 16, 2, 4, {"cp": 1}, 4),
    ("dense", {"pp": 4, "vpp": 2}, 16, 2, 4, {}, 4),
    ("dense", {"pp": 4, "vpp": 2}, 16, 2, 3, {"pp": 3, "vpp": 1}, 3),  # 8 micro-batches are no groups of 3
    ("dense", {"pp": 4, "vpp": 2}, 16, 2, 2, {"pp": 2}, 2),
    ("dense", {"pp": 4, "layers_per_stage": [1, 2, 2, 3]}, 16, 2, 2, {"pp": 2, "layers_per_stage": None}, 2),
    ("dense", {"zero": 3}, 16, 2, 3, {}, 2),
    ("dense", {"tp": 4, "zero": 2}, 16, 2, 3, {"tp": 2}, 2),  # a pipeline does not go with ZeRO stage 2
    ("moe", {"ep": 4}, 16, 2, 8, {}, 8),
    ("moe", {"ep": 4}, 24, 2, 6, {}, 4),  # dp 6 has no groups of 4 ranks; ep keeps what a rank holds of the experts
    ("moe", {"ep": 8}, 16, 2, 4, {"ep": 4}, 4),
    ("moe", {"ep": 8}, 24, 2, 6, {"ep": 2, "pp": 3}, 6),
    ("moe", {"ep": 4, "cp": 4}, 16, 2, 4, {}, 4),
    ("moe", {"tp": 2, "ep": 4, "pp": 2}, 32, 2, 16, {}, 16),
    ("moe", {"tp": 2, "ep": 4, "pp": 2}, 32, 2, 8, {"ep": 2}, 8),
]


@pytest.mark.parametrize(("model", "parallel", "batch", "micro", "ranks", "changes", "used"), TABLE)
def test_the_nearest_layout(
    model: str, parallel: dict[str, Any], batch: int, micro: int, ranks: int, changes: dict[str, Any], used: int
) -> None:
    given, shape = validate(ParallelConfig, parallel), validate(ModelConfig, MODELS[model])
    train = TrainSection(steps=1, global_batch_size=batch, micro_batch_size=micro, seq_length=64)
    found = nearest_layout(ranks, given, shape, train)
    expected = {("train.micro_batch_size" if key == "micro" else f"parallel.{key}"): v for key, v in changes.items()}
    assert found.changed == {key: value for key, value in expected.items() if value != micro or "micro" not in key}
    assert (found.layout.world_size, found.idle) == (used, ranks - used)
    # The values that a command line gets lead to this layout, with the same global batch.
    tree = {**parallel, **{key[9:]: value for key, value in found.changed.items() if key.startswith("parallel.")}}
    now = train.model_copy(update={"micro_batch_size": found.micro_batch_size})
    assert Layout.of(used, validate(ParallelConfig, tree), shape, now) == found.layout
    assert found.layout.dp * found.layout.grad_accum_steps * found.micro_batch_size == batch


def test_every_world_from_one_to_many_ranks_has_one() -> None:
    train = TrainSection(steps=1, global_batch_size=64, micro_batch_size=2, seq_length=64)
    for name, model in MODELS.items():
        for parallel in ({"tp": 4, "pp": 2}, {"tp": 2, "sp": True, "cp": 2}, {"pp": 4, "vpp": 2}, {"tp": 8}):
            given = validate(ParallelConfig, {**parallel, **({"ep": 2} if name == "moe" else {})})
            for ranks in range(1, 40):
                found = nearest_layout(ranks, given, validate(ModelConfig, model), train)
                assert found.layout.world_size > ranks // 2, (name, parallel, ranks, found)


def test_overrides_are_those_of_a_command_line() -> None:
    given = validate(ParallelConfig, {"tp": 4, "sp": True, "pp": 2, "layers_per_stage": [4, 4]})
    train = TrainSection(steps=1, global_batch_size=16, micro_batch_size=2, seq_length=64)
    found = nearest_layout(1, given, validate(ModelConfig, DENSE), train)
    words = ["parallel.tp=1", "parallel.sp=false", "parallel.pp=1", "parallel.layers_per_stage=none"]
    assert sorted(found.overrides) == sorted(words)


def test_what_no_number_of_ranks_can_do_is_refused_as_ever() -> None:
    given, shape = validate(ParallelConfig, {"tp": 2, "ep": 2}), validate(ModelConfig, DENSE)
    train = TrainSection(steps=1, global_batch_size=16, micro_batch_size=2, seq_length=64)
    assert nearest_layout(2, given, shape, train).changed == {"parallel.ep": 1}
    long = train.model_copy(update={"seq_length": 63})
    with pytest.raises(ConfigError, match=r"train\.seq_length = 63 is not a multiple"):
        Layout.of(2, validate(ParallelConfig, {"tp": 2, "sp": True}), shape, long)


def test_thousands_of_ranks_take_no_time() -> None:
    big = {**DENSE, "num_layers": 126, "num_heads": 128, "hidden_size": 1280, "num_kv_heads": 8}
    train = TrainSection(steps=1, global_batch_size=16384, micro_batch_size=1, seq_length=64)
    given = validate(ParallelConfig, {"tp": 8, "sp": True, "pp": 16, "vpp": 7, "cp": 8})
    began = time.process_time()
    assert nearest_layout(1016, given, validate(ModelConfig, big), train).layout.tp == 8
    assert time.process_time() - began < 5  # seconds; sizes as on a large cluster
