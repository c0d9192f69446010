"""Remedies in messages about rewards that cannot be computed: each is done word for word, and they can be then."""

import pytest

from configs.loader import ConfigError
from configs.rewards import RewardConfig
from posttrain.rewards.reward_registry import make_rewards
from posttrain.rewards.worker import Call, WorkerReward


def test_tests_that_get_too_little_time_are_run_with_more() -> None:
    def check(**limits: float) -> None:
        make_rewards({"mine": RewardConfig(kind="tests", **limits)}).check("task.rewards")

    said = (
        r"mine cannot run a program here: timed out after 0\.001 s; raise task\.rewards\.mine\.seconds or its memory_mb"
    )
    with pytest.raises(ConfigError, match=said):
        check(seconds=0.001)
    check(seconds=5.0)


def test_a_package_that_gets_too_little_memory_is_used_with_more() -> None:
    def check(memory: int) -> None:
        reward = WorkerReward(Call("numpy:linspace", memory_bytes=memory * 2**20), True, package="numpy", workers=1)
        try:
            reward.check("task.rewards.mine")
        finally:
            reward.close()

    with pytest.raises(ConfigError, match=r"cannot use the package numpy: .*; raise task\.rewards\.mine\.memory_mb$"):
        check(32)
    check(4096)
