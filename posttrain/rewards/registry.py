"""All rewards by name, and the rewards that a config names."""

from collections.abc import Callable, Mapping
from typing import Any

from configs.rewards import RewardConfig
from posttrain.rewards.exact import exact
from posttrain.rewards.reward import Reward, RuleReward, WeightedRewards
from posttrain.rewards.worker import Call, WorkerReward

MIB = 2**20


def _in_worker(target: str, settings: RewardConfig, options: dict[str, Any], compares: bool = True) -> Reward:
    call = Call(target, options, settings.seconds, settings.memory_mb * MIB)
    return WorkerReward(call, compares)


def _exact(settings: RewardConfig) -> Reward:
    return RuleReward(exact, ignore_case=settings.ignore_case)


def _regex(settings: RewardConfig) -> Reward:  # in a worker, since a pattern may take time without end
    options = {"pattern": settings.pattern, "ignore_case": settings.ignore_case}
    return _in_worker("posttrain.rewards.regex:regex", settings, options)


def _function(settings: RewardConfig) -> Reward:
    return _in_worker(str(settings.function), settings, {}, compares=False)


REWARDS: Mapping[str, Callable[[RewardConfig], Reward]] = {
    "exact": _exact,
    "regex": _regex,
    "function": _function,
}


def make_rewards(settings: Mapping[str, RewardConfig]) -> WeightedRewards:
    """Returns the rewards of a task; exact, if the config names none."""
    named = dict(settings) or {"exact": RewardConfig()}
    rewards = {name: REWARDS[one.kind](one) for name, one in named.items()}
    return WeightedRewards(rewards, {name: one.weight for name, one in named.items()})
