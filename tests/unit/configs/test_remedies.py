"""Remedies in the messages about training configs: each is applied and makes the config valid."""

import random
import tomllib
from collections.abc import Sequence

import pytest

from configs import loader
from configs.kinds import schema_of
from configs.layout import SEQ_LENGTH, Layout
from configs.loader import ConfigError, validate
from configs.starters import starter
from configs.train import PretrainConfig
from tests.remedies import drawn, follow, refused


def checked(kind: str, overrides: Sequence[str]) -> None:
    """Validates the config that `trivium config --new` prints, changed by overrides."""
    tree = tomllib.loads(starter(kind))
    for override in overrides:
        loader._apply(tree, override)
    validate(schema_of(kind), tree)


@pytest.mark.parametrize(
    ("overrides", "remedies"),
    [
        (["model.num_heads=12", "model.num_kv_heads=5", "model.head_dim=8"], 4),
        (["model.hidden_size=100", "model.num_heads=12", "model.num_kv_heads=4"], 2),
        (["model.hidden_size=36", "model.num_heads=12", "model.num_kv_heads=4"], 1),
        (["model.head_dim=7"], 1),
        (["model.moe.num_experts=12", "model.moe.num_groups=5"], 3),
        (["model.moe.num_experts=12", "model.moe.num_groups=5", "model.moe.top_k=6"], 2),
        (["model.moe.num_experts=12", "model.moe.num_groups=4", "model.moe.top_groups=5"], 1),
        (["model.moe.num_experts=12", "model.moe.num_groups=4", "model.moe.top_k=5"], 1),
        (["model.moe.num_experts=4", "model.moe.num_groups=4", "model.moe.group_score=top2", "model.moe.top_k=1"], 1),
        (["schedule.steps=3", "train.steps=9"], 1),
        (["schedule.warmup_steps=30", "train.steps=9"], 1),
        (["schedule.kind=wsd", "schedule.decay_steps=30", "train.steps=9", "schedule.steps=12"], 1),
        (["checkpoint.every=7", "checkpoint.keep_every=10"], 1),
        (["checkpoint.every=7", "checkpoint.keep_every=3"], 1),
    ],
)
def test_what_a_message_about_numbers_says_is_legal(overrides: list[str], remedies: int) -> None:
    assert follow(lambda _, changed: checked("pretrain", changed), 1, overrides) == remedies


def test_whatever_is_suggested_for_a_pretraining_layout_is_legal() -> None:
    """Reads remedies for layouts on a plan, which fixes the row length: none suggests another train.seq_length."""

    def run(ranks: int, overrides: Sequence[str]) -> None:
        tree = tomllib.loads(starter("pretrain"))
        for override in overrides:
            loader._apply(tree, override)
        config = validate(PretrainConfig, tree)
        Layout.of(ranks, config.parallel, config.model, config.train, given=(SEQ_LENGTH,))

    draw, suggested, several = random.Random(3), 0, 0
    for _ in range(200):
        heads = draw.choice([(4, 4), (12, 4), (12, 6), (8, 2), (6, 1), (8, 3)])
        choices: dict[str, Sequence[object]] = {
            "model.num_heads": [heads[0]],
            "model.num_kv_heads": [heads[1]],
            "model.num_layers": [2, 5, 6, 8],
            "model.moe.num_experts": [4, 6],
            "model.moe.num_groups": [1, 1, 2, 4],
            "model.moe.ffn_hidden_size": [None, 24, 36],
            "model.moe.capacity_factor": [None, None, 1.5],
            "train.global_batch_size": [4, 12, 16, 30],
            "train.micro_batch_size": [1, 2, 3],
            "train.seq_length": [8, 12, 15],
            **{f"parallel.{name}": [1, 1, 2, 3, 4] for name in ("tp", "pp", "cp", "ep", "vpp")},
            "parallel.sp": [True, False, False],
            "parallel.zero": [1, 1, 2, 3],
        }
        overrides = drawn(draw, choices)
        ranks = draw.choice([1, 2, 3, 4, 8, 12])
        assert f"{SEQ_LENGTH} could" not in refused(run, ranks, overrides)
        suggested += follow(run, ranks, overrides)
        if together := refused(run, ranks, overrides).partition(", such as ")[2].split():
            keys = {one.partition("=")[0] for one in together}
            run(ranks, [*(one for one in overrides if one.partition("=")[0] not in keys), *together])
            several += 1
    assert suggested > 150 and several > 50


LATENT = ["model.attention.latent={ kv_rank = 8, nope_head_dim = 8, rope_head_dim = 8, v_head_dim = 8 }"]
LATENT += ["model.num_kv_heads=6"]
EXPERTS = ["model.moe.num_experts=8"]


@pytest.mark.parametrize(
    ("ranks", "overrides", "sentence", "mended"),
    [
        (
            1,
            ["model.head_dim=7"],
            "7 is odd, and rotary embedding turns pairs; set model.head_dim=8",
            ["model.head_dim=8"],
        ),
        (
            1,
            [*LATENT, "model.head_dim=8"],
            "model.head_dim follows from model.attention.latent; leave model.head_dim out",
            ["model.head_dim=none"],
        ),
        (
            1,
            [*LATENT, "model.attention.sinks=true"],
            "model.attention.latent has no qkv_bias, qk_norm, sinks, temperature or output_gate; leave those keys of",
            ["model.attention.sinks=false"],
        ),
        (
            1,
            ["model.position={ kind = 'none', scaling.kind = 'linear', scaling.factor = 2.0 }"],
            "model.position.scaling is for rotary positions, not none; leave it out",
            ["model.position.scaling=none"],
        ),
        *(
            (
                1,
                [
                    "model.position={ kind = 'rotary', scaling.kind = 'dynamic', scaling.factor = 2.0 }",
                    "model.head_dim=2",
                ],
                "set model.position.scaling.kind=linear, or give heads 4 rotated elements or more",
                [remedy],
            )
            for remedy in ("model.position.scaling.kind=linear", "model.head_dim=4")
        ),
        (
            1,
            ["model.head.outputs=2"],
            "model.head.outputs = 2 is for model.head.kind = 'scalar'; leave it out",
            ["model.head.outputs=1"],
        ),
        (
            1,
            [*EXPERTS, "model.moe.dense_layers=[9]"],
            "model.moe.dense_layers names layer 9, and layers are 0 to 3",
            ["model.moe.dense_layers=[3]"],
        ),
        (
            2,
            [*EXPERTS, "model.moe.first_layer=9"],
            "no layer has a mixture of experts by model.moe.first_layer, every and dense_layers; leave out model.moe",
            ["model.moe.first_layer=0", "model.moe.dense_layers=[]"],
        ),
        (
            1,
            [*EXPERTS, "model.moe.weigh=input"],
            "model.moe.weigh = 'input' multiplies the input of one expert a token, and model.moe.top_k = 2; set model",
            ["model.moe.top_k=1"],
        ),
        (
            1,
            [*EXPERTS, "model.moe.shared_gate=true"],
            "model.moe.shared_gate needs shared experts; set model.moe.num_shared_experts=1 or leave it out",
            ["model.moe.num_shared_experts=1"],
        ),
        (1, [*EXPERTS, "model.moe.top_k=9"], "num_experts = 8; set model.moe.top_k=8 or less", ["model.moe.top_k=8"]),
        (
            1,
            ["optimizer.betas=[0.9]"],
            "optimizer.betas has too few values; one more is",
            ["optimizer.betas=[0.9, 0.9]"],
        ),
        (
            8,
            [*EXPERTS, "parallel.tp=2", "parallel.ep=8", "train.micro_batch_size=4"],
            "does not divide dp * cp = 4 * 1 = 4, the ranks that experts are spread over",
            ["parallel.ep=4"],
        ),
        (
            1,
            ["parallel.vpp=2"],
            "parallel.vpp = 2 interleaves the stages of a pipeline, and parallel.pp = 1 is no pipeline",
            ["parallel.vpp=1"],
        ),
        (
            2,
            ["parallel.pp=2", "parallel.vpp=2", "train.micro_batch_size=16"],
            "interleaves micro-batches in groups of parallel.pp = 2, and a step has 1 on each data-parallel rank",
            ["train.micro_batch_size=8"],
        ),
    ],
)
def test_what_does_not_fit_is_said_and_mended(
    ranks: int, overrides: list[str], sentence: str, mended: list[str]
) -> None:
    def run(changed: list[str]) -> None:
        tree = tomllib.loads(starter("pretrain"))
        for override in changed:
            loader._apply(tree, override)
        config = validate(PretrainConfig, loader.without_none(PretrainConfig, tree))
        Layout.of(ranks, config.parallel, config.model, config.train, given=(SEQ_LENGTH,))

    with pytest.raises(ConfigError) as raised:
        run(overrides)
    assert sentence in str(raised.value)
    run([*overrides, *mended])


@pytest.mark.parametrize(
    ("kind", "override", "sentence"),
    [
        (
            "export",
            "step=2.5",
            "step = 2.5 has none of the types that it may have; an integer is written like 3, or text is written in "
            'quotes, like "this"',
        ),
        ("pretrain", "optimizer.lr=inf", "optimizer.lr = inf: input should be a finite number"),
        ("pretrain", "optimizer.betas=[0.9, 1.5]", "[0.9, 1.5] are not two numbers from 0 to below 1"),
        ("pretrain", "eval.rows=nan", "eval.rows = nan: input should be a valid integer; an integer is written like 3"),
        ("pretrain", "eval.rows={ x = 1 }", "eval.rows = {'x': 1}: input should be a valid integer"),
        ("pretrain", "eval.rwos.x=1", "unknown key 'eval.rwos'; did you mean 'rows'?"),
        ("sft", "data.dialogues=[1]", "data.dialogues[0] = 1: input should be a valid string"),
        ("export", "verify.tolerance=nan", "verify.tolerance = nan: input should be a finite number"),
    ],
)
def test_a_value_of_a_wrong_kind_is_one_sentence(kind: str, override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        checked(kind, [override])
    assert sentence in str(raised.value) and str(raised.value).count("input should") < 2
