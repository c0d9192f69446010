"""All rewards by name, and the rewards that a config names."""

from collections.abc import Callable, Mapping
from typing import Any

from configs.rewards import RewardConfig
from posttrain.rewards.behind import BehindReward
from posttrain.rewards.exact_answer import exact
from posttrain.rewards.expression import expression
from posttrain.rewards.instructions import instructions
from posttrain.rewards.judge_model import ModelReward
from posttrain.rewards.program_tests import ProgramTests
from posttrain.rewards.reward import Reward, RuleReward, WeightedRewards
from posttrain.rewards.script import script
from posttrain.rewards.worker import Call, WorkerReward
from pretrain.evaluation.sandbox import Limits

MIB = 2**20


def _in_worker(
    target: str, settings: RewardConfig, compares: bool = True, package: str = "", options: dict[str, Any] | None = None
) -> Reward:
    call = Call(target, options or {}, settings.seconds, settings.memory_mb * MIB)
    return WorkerReward(call, compares, package)


def _exact(settings: RewardConfig) -> Reward:
    return RuleReward(exact, ignore_case=settings.ignore_case)


def _regex(settings: RewardConfig) -> Reward:  # in a worker, since a pattern may take time without end
    options = {"pattern": settings.pattern, "ignore_case": settings.ignore_case}
    return _in_worker("posttrain.rewards.regex:regex", settings, options=options)


def _math_verify(settings: RewardConfig) -> Reward:  # in a worker, since simplifying may take time without end
    return _in_worker("posttrain.rewards.mathematics:mathematics", settings, package="math-verify")


def _instructions(settings: RewardConfig) -> Reward:
    return RuleReward(instructions, answer_is_text=False, partial=settings.partial)


def _reasoning_gym(settings: RewardConfig) -> Reward:
    return _in_worker("posttrain.rewards.gym:gym", settings, package="reasoning-gym")


def _tests(settings: RewardConfig) -> Reward:
    return ProgramTests(Limits(settings.seconds, settings.memory_mb * MIB), settings.partial)


def _function(settings: RewardConfig) -> Reward:
    return _in_worker(str(settings.function), settings, compares=False)


def _judge(settings: RewardConfig, key: str, begun: Mapping[str, str]) -> Reward:
    """Returns the reward of a reward model; `begun` identifies the model that the run used when it began."""
    # It loads the model's code, which other rewards do without.
    from posttrain.rewards.dialogue_scorer import found_again, open_scorer

    named = str(settings.model)
    scorer = open_scorer(found_again(named, f"{key}.model", begun) if begun else named, f"{key}.model")
    return ModelReward(scorer, {"model": named, "checkpoint": scorer.pin.checkpoint, "sha256": scorer.pin.sha256})


RULES: Mapping[str, Callable[[RewardConfig], Reward]] = {
    "exact": _exact,
    "regex": _regex,
    "expression": lambda settings: RuleReward(expression),
    "script": lambda settings: RuleReward(script),
    "math_verify": _math_verify,
    "instructions": _instructions,
    "reasoning_gym": _reasoning_gym,
    "tests": _tests,
    "function": _function,
}


def make_rewards(
    settings: Mapping[str, RewardConfig], key: str = "rewards", begun: Mapping[str, Mapping[str, str]] | None = None
) -> WeightedRewards:
    """Returns the rewards of a task; exact, if the config names none.

    `begun` says what rewards were made from when a run that goes on began, by config key: a reward model stays the same
    checkpoint, whatever its run has trained since. Raises ConfigError, naming keys below `key`, if a reward model is
    none, or is gone.
    """
    named = dict(settings) or {"exact": RewardConfig()}
    rewards: dict[str, Reward] = {}
    for name, one in named.items():
        own = f"{key}.{name}"
        reward = _judge(one, own, (begun or {}).get(own, {})) if one.kind == "reward_model" else RULES[one.kind](one)
        rewards[name] = BehindReward(reward, one.after) if one.after else reward
    return WeightedRewards(rewards, {name: one.weight for name, one in named.items()})
