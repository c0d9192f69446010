"""Remedies in the messages about tokenizers, recipes and post-training configs: each is applied and works."""

from typing import Any

import pytest
from pydantic import BaseModel

from configs.adapters import AdapterConfig
from configs.initial import InitConfig
from configs.loader import ConfigError, validate
from configs.model import ModelConfig
from configs.preference import PreferenceConfig
from configs.recipe import RecipeConfig
from configs.reward_model import RewardModelConfig
from configs.rewards import RewardConfig
from configs.rl import GRPOConfig, PPOConfig, RLSection
from configs.tasks import TaskConfig
from configs.tokenizer import TokenizerConfig, TokenizerTrainConfig

STAGE = {"command": "sft", "config": "a.toml"}
TRAIN = {
    "run": {"dir": "runs/x"},
    "init": {"run": "runs/y"},
    "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "seq_length": 8},
    "optimizer": {"lr": 0.1},
}
PAIRS = {**TRAIN, "data": {"pairs": ["a.jsonl"]}}
FILES = {**TRAIN, "data": {"files": ["a.jsonl"]}}
PPO = {**TRAIN, "task": {}}
FILE = {"kind": "file", "files": ["a"]}
PLAYED = {**TRAIN, "task": {"kind": "verifiers", "verifiers": {"taskset": "my-game"}}}


def ahead(**rl: Any) -> dict[str, Any]:
    """Returns the config of a GRPO run for which another command samples ahead, or that is this command."""
    return PPO | {"rl": {"staleness": 1, "correction": "truncate"} | rl, "checkpoint": {"every": 1}}


def recipe(**stage: Any) -> dict[str, Any]:
    return {"dir": "runs/r", "stages": {"a": STAGE, "b": STAGE | stage}}


@pytest.mark.parametrize(
    ("schema", "wrong", "words", "right"),
    [
        (
            TokenizerConfig,
            {"special_tokens": ["x y"]},
            r"cannot be .*, such as <\|tool\|>",
            {"special_tokens": ["<|tool|>"]},
        ),
        (TokenizerConfig, {"special_tokens": ["<s>"]}, "'<s>' is a token that every .*; leave it out", {}),
        (TokenizerConfig, {"special_tokens": ["<a>"] * 2}, "'<a>' stands there twice", {"special_tokens": ["<a>"]}),
        (TokenizerConfig, {"kind": "wordpiece", "whitespace_runs": 4}, "leave the key out, or", {"kind": "wordpiece"}),
        (TokenizerConfig, {"kind": "wordpiece", "whitespace_runs": 4}, "choose another kind", {"whitespace_runs": 4}),
        (TokenizerConfig, {"padding": "x"}, "set tokenizer.file as well", {"padding": "x", "file": "a"}),
        (TokenizerConfig, {"padding": "x"}, "or leave it out", {}),
        (TokenizerConfig, {"file": "a", "seed": 3}, "is taken as it is; leave out seed, or", {"file": "a"}),
        (TokenizerConfig, {"file": "a", "seed": 3}, "or tokenizer.file", {"seed": 3}),
        (TokenizerTrainConfig, {"out": "a", "text": {}}, "set text.files", {"out": "a", "text": {"files": ["b"]}}),
        (TokenizerTrainConfig, {"out": "a", "text": {}}, "or text.run to", {"out": "a", "text": {"run": "b"}}),
        (
            RecipeConfig,
            recipe(gates=[{"metric": "loss"}]),
            "set at_least, at_most",
            recipe(gates=[{"metric": "loss", "at_most": 3.0}]),
        ),
        (
            RecipeConfig,
            recipe(set=["steps"]),
            r'write it as "key=value", e\.g\. "train',
            recipe(set=["train.steps=50"]),
        ),
        (
            RecipeConfig,
            recipe(set=["init.run={c}"]),
            "does not exist; stages before it: a",
            recipe(set=["init.run={a}"]),
        ),
        (GRPOConfig, ahead(record="a", sampler="vllm"), "set rl.sampler=whole", ahead(record="a", sampler="whole")),
        (RLSection, {"correction_low": 3.0}, "swap them", {"correction_low": 2.0, "correction_high": 3.0}),
        (RLSection, {"record": "a", "replay": "a"}, "leave out rl.record to replay it", {"replay": "a"}),
        *(
            (GRPOConfig, ahead(**rl), "in the one that samples, .*, and rl.replay", ahead(**{key: "a"}))
            for rl in ({}, {"record": "a", "replay": "b"})
            for key in ("record", "replay")
        ),
        (GRPOConfig, ahead(replay="a", correction="report"), "set rl.correction=truncate, or mask", ahead(replay="a")),
        (
            GRPOConfig,
            ahead(replay="a", epochs=2) | {"checkpoint": {"every": 4}},
            "rollouts, of 2 steps each, .* set checkpoint.every=2",
            ahead(replay="a", epochs=2) | {"checkpoint": {"every": 2}},
        ),
        (
            GRPOConfig,
            ahead(replay="a", staleness=2),
            "set checkpoint.keep=3 or more",
            ahead(replay="a", staleness=2) | {"checkpoint": {"every": 1, "keep": 3}},
        ),
        (PPOConfig, PPO | {"ppo": {"text_rows": 2}}, "set both, or", PPO | {"ppo": {"text_rows": 2, "text_plan": "a"}}),
        (PPOConfig, PPO | {"ppo": {"text_rows": 2}}, "or leave out both", PPO),
        *(
            (schema, PPO | {"rl": {"overlong_buffer": 17}}, r"set rl\.overlong_buffer=16 or less", PPO | {"rl": most})
            for schema in (GRPOConfig, PPOConfig)
            for most in [{"overlong_buffer": 16}]
        ),
        (
            PPOConfig,
            PPO | {"ppo": {"text_rows": 2, "text_plan": "a", "temperature": 0.5}},
            "needs ppo.temperature = 1, which is that of text, not 0.5; set it to 1",
            PPO | {"ppo": {"text_rows": 2, "text_plan": "a", "temperature": 1.0}},
        ),
        *(
            (
                GRPOConfig,
                PPO | {"rl": {"max_draws": 2}, "grpo": {"dialect": "reinforce_pp"}},
                r"learns from them, as it compares rewards over the whole rollout; set rl\.max_draws=1, or grpo\.d",
                PPO | right,
            )
            for right in (
                {"rl": {"max_draws": 1}, "grpo": {"dialect": "reinforce_pp"}},
                {"rl": {"max_draws": 2}, "grpo": {"dialect": "reinforce_pp_baseline"}},
            )
        ),
        (
            PPOConfig,
            PPO | {"rl": {"max_draws": 2}},
            r"ppo\.dialect = 'ppo' learns from them, .* each reward with the critic's value; set rl\.max_draws=1",
            PPO,
        ),
        (RewardConfig, {"pattern": "a"}, "says nothing of kind 'exact'; leave it out", {}),
        (RewardConfig, {"kind": "regex"}, "set pattern as well", {"kind": "regex", "pattern": "a"}),
        (RewardConfig, {"kind": "reward_model"}, "set model as well", {"kind": "reward_model", "model": "a"}),
        (
            RewardConfig,
            {"kind": "regex", "pattern": "("},
            "is no regular expression of Python: .*; correct it",
            {"kind": "regex", "pattern": "()"},
        ),
        (
            RewardConfig,
            {"kind": "function", "function": "f"},
            "as in my_rewards:judge",
            {"kind": "function", "function": "my_rewards:judge"},
        ),
        (TaskConfig, {"kind": "file"}, "name JSON lines or parquet files", FILE),
        (
            TaskConfig,
            FILE | {"answer_format": "x"},
            "lacks {answer}; put it where",
            FILE | {"answer_format": "x {answer}"},
        ),
        (
            TaskConfig,
            FILE | {"answer_pattern": "#"},
            "no group; put the answer in paren",
            FILE | {"answer_pattern": "#(.*)"},
        ),
        (TaskConfig, FILE | {"answer_pattern": "("}, "no regular .*; correct it", FILE | {"answer_pattern": "(.)"}),
        (TaskConfig, FILE | {"digits": 3}, "digits = 3 says nothing of kind 'file'; leave it out", FILE),
        (
            TaskConfig,
            {"kind": "mixture"},
            "set .task.tasks.NAME. with kind and weight",
            {"kind": "mixture", "tasks": {"NAME": {"kind": "sort", "weight": 2.0}}},
        ),
        (TaskConfig, {"tasks": {"a": {}}}, r"section tasks \(a\) says nothing of kind 'sort'; leave it out", {}),
        (PreferenceConfig, PAIRS | {"preference": {"smoothing": 0.2}}, "leave it out, or", PAIRS),
        (
            PreferenceConfig,
            PAIRS | {"preference": {"smoothing": 0.2}},
            "or choose such a loss",
            PAIRS | {"preference": {"smoothing": 0.2, "loss": "robust"}},
        ),
        (
            PreferenceConfig,
            PAIRS | {"preference": {"sft_weight": 0.2, "loss": "kto"}},
            "leave it out",
            PAIRS | {"preference": {"loss": "kto"}},
        ),
        (
            PreferenceConfig,
            PAIRS | {"parallel": {"cp": 2}},
            "set parallel.cp=1, and parallel.tp with parallel.sp=true",
            PAIRS | {"parallel": {"cp": 1, "tp": 2, "sp": True}},
        ),
        (
            RewardModelConfig,
            FILES | {"parallel": {"cp": 2}},
            "set parallel.cp=1, and",
            FILES | {"parallel": {"tp": 2, "sp": True}},
        ),
        (RewardModelConfig, FILES | {"reward_model": {"labels": ["a", "b"]}}, "pairs have none; leave it out", FILES),
        (
            RewardModelConfig,
            FILES | {"reward_model": {"kind": "process", "margin": 1.0}},
            "leave them out",
            FILES | {"reward_model": {"kind": "process"}},
        ),
        (
            RewardModelConfig,
            FILES | {"reward_model": {"kind": "classification"}},
            r"""for example \["bad", "good"\]""",
            FILES | {"reward_model": {"kind": "classification", "labels": ["bad", "good"]}},
        ),
        (
            RewardModelConfig,
            FILES | {"reward_model": {"kind": "process", "labels": ["a", "a"]}},
            "not two or more different names; correct them",
            FILES | {"reward_model": {"kind": "process", "labels": ["a", "b"]}},
        ),
        (
            AdapterConfig,
            {"targets": ["q_proj", "q_proj"]},
            "names a layer twice; name each once",
            {"targets": ["q_proj"]},
        ),
        (AdapterConfig, {"kind": "dora", "dropout": 0.1}, "set adapter.dropout=0", {"kind": "dora", "dropout": 0.0}),
        (
            AdapterConfig,
            {"kind": "dora", "dropout": 0.1},
            "is for adapter.kind = 'lora'",
            {"kind": "lora", "dropout": 0.1},
        ),
        (
            InitConfig,
            {"run": "a", "hf": "b"},
            "leave only one of them .*: init.run= or init.hf=",
            {"run": "", "hf": "b"},
        ),
        (
            TaskConfig,
            {"kind": "verifiers"},
            "needs verifiers.taskset; set the id of a taskset",
            {"kind": "verifiers", "verifiers": {"taskset": "my-game"}},
        ),
        *(
            (
                GRPOConfig,
                PLAYED | {"rl": rl},
                rf"and task\.kind = 'verifiers' has episodes of its own; {remedy}$",
                PLAYED | {"rl": right},
            )
            for rl, remedy, right in (
                ({"environment": {"tools": ["calculator"]}}, r"leave out rl\.environment", {}),
                ({"sampler": "vllm"}, r"set rl\.sampler=whole", {"sampler": "whole"}),
                ({"overlong_buffer": 4}, r"set rl\.overlong_buffer=0", {"overlong_buffer": 0}),
            )
        ),
        (InitConfig, {}, "set init.run=RUN", {"run": "RUN"}),
        (InitConfig, {}, "init.checkpoint=RUN/checkpoints/step_N", {"checkpoint": "RUN/checkpoints/step_N"}),
        (InitConfig, {}, "or init.hf=FOLDER", {"hf": "FOLDER"}),
    ],
)
def test_a_config_is_legal_once_it_is_as_the_message_says(
    schema: type[BaseModel], wrong: dict[str, Any], words: str, right: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=words):
        validate(schema, wrong)
    validate(schema, right)


@pytest.mark.parametrize(
    ("adapter", "words", "right"),
    [
        ({"targets": ["kv_up_proj"]}, "choose among its linear layers, .*, o_proj, ", {"targets": ["o_proj"]}),
        ({"kind": "dora"}, r"set adapter\.targets=\['q_proj', 'k_proj', 'v_proj', 'o_proj'\]$", {}),
        (
            {"dropout": 0.1, "targets": ["experts", "q_proj"]},
            r"set adapter\.targets=\['q_proj'\]",
            {"targets": ["q_proj"]},
        ),
        (
            {"dropout": 0.1, "targets": ["experts"]},
            r"set adapter\.kind=lora, adapter\.base=full and adapter\.dropout=0",
            {"dropout": 0.0},
        ),
        (
            {"kind": "dora", "targets": ["experts"]},
            r"set adapter\.kind=lora, adapter\.base=full and adapter\.dropout=0",
            {"kind": "lora"},
        ),
    ],
)
def test_an_adapter_serves_a_model_of_experts_as_the_message_says(
    adapter: dict[str, Any], words: str, right: dict[str, Any]
) -> None:
    sizes = {"vocab_size": 400, "num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 48, "num_heads": 4}
    model = validate(ModelConfig, {**sizes, "num_kv_heads": 2, "moe": {"num_experts": 4}})
    with pytest.raises(ConfigError, match=words):
        validate(AdapterConfig, adapter).targets_in(model)
    if not right:
        right = {"targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    assert validate(AdapterConfig, {**adapter, **right}).targets_in(model)
