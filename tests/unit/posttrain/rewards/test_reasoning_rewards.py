"""Rewards of answers with reasoning: expressions, one script, and the part behind the reasoning."""

from typing import Any

import pytest

from configs.loader import ConfigError, validate
from configs.rewards import RewardConfig
from configs.tasks import TaskConfig
from posttrain.rewards.attempt import Attempt, Problem, TaskScore
from posttrain.rewards.reward_registry import make_rewards


def scored(completion: str, answer: Any = None, metadata: Any = None, **settings: Any) -> TaskScore:
    rewards = make_rewards({"one": RewardConfig(**settings)})
    return rewards([Attempt(Problem("p", "a prompt", answer, metadata=metadata or {}), completion)])[0]


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("3*5+7", 1.0),
        (" (7 + 5*3)", 1.0),
        ("3*5+8", 0.0),  # another value
        ("22", 0.0),
        ("15+7", 0.0),  # the value from other numbers
        ("3*5+7+0", 0.0),
        ("about 22", 0.0),
        ("", 0.0),
    ],
)
def test_an_expression_has_the_numbers_and_the_value_of_the_answer(completion: str, value: float) -> None:
    assert scored(completion, "5*3+7", kind="expression").value == value


def test_an_answer_that_is_no_expression_is_unscorable() -> None:
    found = scored("3*5", "fifteen", kind="expression")
    assert found.value is None and found.reason == "one: the answer is no expression of +, - and *"
    assert scored("3*5", "5*3", kind="expression").value == 1


@pytest.mark.parametrize(("text", "value"), [("two 二二", 3 / 5), ("12+3", 1.0), ("one two", 1.0)])
def test_one_script(text: str, value: float) -> None:
    assert scored(text, kind="script").value == pytest.approx(value)


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("<think>\nno\n</think>\nyes", 1.0),
        ("<think>yes", 0.0),  # the reasoning never ended
        ("yes", 0.0),
        ("<think>a</think>yes</think>no", 0.0),  # the last mark counts
        ("</think>yes", 1.0),
    ],
)
def test_a_reward_may_see_what_follows_the_reasoning_alone(completion: str, value: float) -> None:
    assert scored(completion, "yes", after="</think>").value == value


def test_unscorable_behind_the_reasoning_is_not_zero() -> None:
    rewards = make_rewards({"one": RewardConfig(kind="expression", after="</think>")})
    problems = [Problem("p", "a", "fifteen"), Problem("p", "a", "15")]
    texts = ["<think></think>15", "15", "<think></think>15"]
    attempts = [Attempt(problems[i > 0], text) for i, text in enumerate(texts)]
    assert [score.value for score in rewards(attempts)] == [None, 0.0, 1.0]


def test_a_weight_of_zero_only_measures() -> None:
    rewards = make_rewards({"right": RewardConfig(weight=0.0), "form": RewardConfig(kind="regex", pattern="[a-z]+")})
    score = rewards([Attempt(Problem("p", "a", "yes"), "yes"), Attempt(Problem("p", "a", "yes"), "no")])
    assert [one.value for one in score] == [1.0, 1.0]
    assert [one.parts["right"] for one in score] == [1.0, 0.0]
    tree = {"kind": "file", "files": ["x"], "rewards": {"right": {"weight": 0.0}}}
    with pytest.raises(ConfigError, match=r"all rewards \(right\) have weight = 0.*give one a weight"):
        validate(TaskConfig, tree)
