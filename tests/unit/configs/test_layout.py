"""Impossible layouts are refused with the numbers that do not fit; possible ones give the right degrees."""

import math
import random
from itertools import product
from typing import Any

import pytest

from configs.layout import Layout, balanced_layers
from configs.loader import ConfigError
from configs.model import ModelConfig
from configs.model_parts import AttentionConfig, DeltaConfig
from configs.moe import MoEConfig
from configs.train import ParallelConfig, TrainSection

MODEL = ModelConfig(
    vocab_size=64, num_layers=6, hidden_size=32, ffn_hidden_size=48, num_heads=4, num_kv_heads=2, tie_embeddings=True
)
TRAIN = TrainSection(steps=1, global_batch_size=12, micro_batch_size=2, seq_length=8)


MOE = MODEL.model_copy(update={"moe": MoEConfig(num_experts=6)})
SIX_KV_HEADS = MODEL.model_copy(update={"num_heads": 12, "num_kv_heads": 6, "head_dim": 4})
DELTAS = DeltaConfig(num_key_heads=2, num_value_heads=4, key_head_dim=4, value_head_dim=4)
DELTA = MODEL.model_copy(update={"num_kv_heads": 4, "attention": AttentionConfig(delta=DELTAS)})
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
        (32, 4, 1.0, (8, 8, 8, 8)),  # slowest 9, as in every split into whole layers
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


@pytest.mark.parametrize(
    ("parallel", "copies"), [({"tp": 2}, 1), ({"tp": 4}, 2), ({"cp": 4}, 1), ({"tp": 2, "cp": 2}, 1)]
)
def test_few_heads_and_an_odd_vocabulary_fit(parallel: dict[str, int], copies: int) -> None:
    """Divides two key-value heads and 61 tokens: tp=4 has two ranks for each head, and cp gathers keys and values."""
    model = MODEL.model_copy(update={"vocab_size": 61})
    assert layout(math.prod(parallel.values()), model, **parallel).kv_copies == copies


def test_zero_stages_have_names() -> None:
    assert str(layout(4, tp=2, zero=3, offload_optimizer=True)) == "tp2 pp1 dp2 zero3 offload"


def test_interleaved_chunks_go_round_the_ranks() -> None:
    found = layout(2, pp=2, vpp=2, layers_per_stage=(1, 2, 2, 1))
    assert str(found) == "tp1 pp2 vpp2 dp1 zero1"
    assert [found.layers_of_stage(v) for v in range(4)] == [range(1), range(1, 3), range(3, 5), range(5, 6)]


@pytest.mark.parametrize(
    ("world_size", "parallel", "words"),
    [
        (3, {"tp": 2}, ["2 * 1 * 1 = 2", "3 ranks", "ranks could be 2 or 4 or 6", "tp could be 1"]),
        (8, {"tp": 8}, ["model.num_heads = 4", "parallel.tp = 8", "tp could be 4"]),
        (4, {"model": DELTA, "tp": 2, "cp": 2}, ["num_key_heads = 2 is not a multiple of", "2 * 2", "cp could be 1"]),
        (4, {"model": SIX_KV_HEADS, "tp": 4}, ["num_kv_heads = 6 is neither", "tp = 4", "tp could be 2"]),
        (8, {"pp": 8}, ["8 * 1 = 8 stages", "model.num_layers = 6", "pp could be 4"]),
        (2, {"pp": 2, "vpp": 4}, ["2 * 4 = 8 stages", "model.num_layers = 6", "vpp could be 2 or 3"]),
        (1, {"vpp": 2}, ["parallel.vpp = 2", "parallel.pp = 1", "vpp could be 1"]),
        (4, {"pp": 2, "vpp": 2}, ["parallel.vpp = 2", "has 3", "batch_size could be 8 or 16 or 24", "vpp could be 1"]),
        (
            2,
            {"pp": 2, "layers_per_stage": (2, 3)},
            ["[2, 3]", "sum 5", "2 numbers", "model.num_layers = 6", "leave out parallel.layers_per_stage"],
        ),
        (2, {"pp": 2, "layers_per_stage": (6, 0)}, ["[6, 0]", "1 or more"]),
        (2, {"pp": 2, "layers_per_stage": (6,)}, ["1 numbers", "pp * vpp = 2"]),
        (5, {}, ["train.global_batch_size = 12", "5 * 2", "batch_size could be 10 or 20 or 30"]),
        (2, {"zero": 2, "pp": 2}, ["parallel.zero = 2", "parallel.pp = 2", "zero could be 1", "pp could be 1"]),
        (4, {"zero": 3, "pp": 2}, ["parallel.zero = 3", "parallel.pp = 2", "zero could be 1"]),
        (2, {"zero": 3, "ep": 2}, ["parallel.zero = 3", "parallel.ep = 2", "ep could be 1"]),
        (2, {"sp": True}, ["parallel.sp = true", "tp = 1", "sp could be false, or parallel.tp could be 2"]),
        (2, {"ep": 2}, ["parallel.ep = 2", "has none", "ep could be 1"]),
        (
            4,
            {"model": MOE, "ep": 4},
            ["model.moe.num_experts = 6", "parallel.ep = 4", "no other value of parallel.ep"],
        ),
        (
            2,
            {"model": MOE, "ep": 3},
            ["parallel.ep = 3", "2 * 1 = 2", "ep could be 1 or 2, or the number of ranks could be 3"],
        ),
        (8, {"cp": 8}, ["model.num_heads = 4", "1 * 8", "cp could be 4"]),
        (8, {"tp": 2, "cp": 4}, ["model.num_heads = 4", "2 * 4", "cp could be 2, or parallel.tp could be 1"]),
        (3, {"cp": 3}, ["train.seq_length = 8", "parallel.cp = 3", "cp could be 1"]),
        (
            6,
            {"tp": 2, "sp": True, "cp": 3},
            ["cp = 3 * parallel.tp = 2 (parallel.sp = true)", "cp could be 1"],
        ),
        (2, {"model": LIMITED, "cp": 2}, ["capacity_factor = 1.0", "parallel.cp = 2"]),
    ],
)
def test_an_impossible_layout_names_its_numbers(world_size: int, parallel: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        layout(world_size, **parallel)
    assert all(word in str(raised.value) for word in words), raised.value


def test_every_number_that_a_message_suggests_is_accepted_alone() -> None:
    """Applies every suggested value alone, for random layouts, each of which then gives a possible layout."""
    draw = random.Random(7)
    suggested = hopeless = 0
    for _ in range(3000):
        heads = draw.choice([(4, 4), (12, 4), (12, 6), (9, 3), (6, 1)])
        shape = {"num_heads": heads[0], "num_kv_heads": heads[1], "num_layers": draw.choice([2, 5, 6, 8])}
        shape |= {"ffn_hidden_size": draw.choice([48, 22]), "vocab_size": draw.choice([64, 61]), "head_dim": 4}
        moe = draw.choice([None, None, MoEConfig(num_experts=6), MoEConfig(num_experts=4, capacity_factor=1.0)])
        model = MODEL.model_copy(update={**shape, "moe": moe})
        batch = {"global_batch_size": draw.choice([4, 12, 16, 30]), "micro_batch_size": draw.choice([1, 2, 3])}
        train = TRAIN.model_copy(update={**batch, "seq_length": draw.choice([8, 12, 15])})
        degrees = {name: draw.choice([1, 1, 2, 3, 4]) for name in ("tp", "pp", "cp", "ep", "vpp")}
        parallel = ParallelConfig(**degrees, sp=draw.random() < 0.3, zero=draw.choice([1, 1, 2, 3]))
        world = draw.choice([1, 2, 3, 4, 8, 12, 16])
        try:
            Layout.of(world, parallel, model, train)
            continue
        except ConfigError as error:
            message = str(error)
        remedies = message.rpartition("; ")[2]
        hopeless += "alone fits the rest" in remedies
        for clause in remedies.split(", or "):
            key, _, values = clause.partition(" could be ")
            if clause.startswith("leave out "):
                key, values = clause.removeprefix("leave out "), "none"
            for value in values.split(" or ") if values else ():
                suggested += 1
                Layout.of(*changed(key, value, world, parallel, model, train))
    assert suggested > 300 and hopeless > 100


def changed(key: str, text: str, world: int, parallel: ParallelConfig, model: ModelConfig, train: TrainSection) -> Any:
    """Returns the four arguments of `Layout.of` with one key changed as a message suggests."""
    value = {"none": None, "false": False}[text] if text in ("none", "false") else int(text)
    section, _, name = key.partition(".")
    if key == "the number of ranks":
        return value, parallel, model, train
    if section == "parallel":
        return world, parallel.model_copy(update={name: value}), model, train
    if section == "train":
        return world, parallel, model, train.model_copy(update={name: value})
    assert key == "model.moe.capacity_factor" and model.moe
    moe = model.moe.model_copy(update={"capacity_factor": value})
    return world, parallel, model.model_copy(update={"moe": moe}), train


def test_remedies_respect_all_that_a_config_says() -> None:
    """Asks for a degree that divides 12 heads and 4 key-value heads: 3 and 6 divide the first alone."""
    model = MODEL.model_copy(update={"num_heads": 12, "num_kv_heads": 4, "head_dim": 4})
    with pytest.raises(ConfigError, match=r"num_heads = 12 is not a multiple of parallel\.tp = 24; .* 4 or 12$"):
        Layout.of(24, ParallelConfig(tp=24), model, TRAIN.model_copy(update={"global_batch_size": 24}))
    with pytest.raises(ConfigError, match=r"no other value of parallel\.tp alone fits the rest"):
        layout(5, tp=5)  # 5 ranks of one row each do not divide a batch of 12 either
