"""Return values of functions of the user: any real number that sums of squares can hold, in whatever type it comes."""

import decimal
import fractions
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.rewards.attempt import Attempt, Problem, TaskScore
from posttrain.rewards.reward import RuleReward, WeightedRewards
from posttrain.rewards.worker_child import ARGUMENTS, call, value_of


@pytest.mark.parametrize(
    ("result", "value"),
    [
        (True, 1.0),
        (np.True_, 1.0),
        (np.float16(0.5), 0.5),
        (np.array(3), 3.0),
        (fractions.Fraction(1, 4), 0.25),
        (decimal.Decimal("0.25"), 0.25),
        (torch.tensor(0.25), 0.25),
        (torch.tensor(True), 1.0),
    ],
)
def test_a_real_number_of_any_type_is_a_reward(result: Any, value: float) -> None:
    assert value_of(result) == {"value": value}


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (np.str_("0.5"), "returned str_, which is no number"),  # numpy would make a number of it
        (np.array("0.5"), "returned ndarray, which is no number"),
        (np.array(None), "returned ndarray, which is no number"),
        (np.datetime64("2020-01-01"), "returned datetime64, which is no number"),
        (np.complex64(1 + 2j), "returned complex64, which is no number"),
        ([0.5], "returned list, which is no number"),
        pytest.param(10**400, "returned int that no float can hold", id="a whole number of 401 digits"),
        (decimal.Decimal("sNaN"), "returned Decimal that no float can hold"),
        (np.float32("nan"), "returned nan"),
    ],
)
def test_anything_else_has_a_reason_that_names_its_type(result: Any, reason: str) -> None:
    assert value_of(result) == {"reason": reason}


def test_an_exception_without_words_has_a_reason_too() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise self

    def judge(*arguments: Any) -> float:
        raise Mute

    reply = call(judge, dict.fromkeys(ARGUMENTS), {})
    assert reply == {"reason": "raised an exception that cannot be shown"}


def test_rewards_whose_squares_would_overflow_are_unscorable() -> None:
    assert TaskScore.of(-1e16) == TaskScore(None, "returned -1e+16, beyond 1e+15")
    large = RuleReward(lambda prompt, completion, answer, metadata: 1e15)
    attempts = [Attempt(Problem("one", "what?", "this"), "that")]
    alone, twice = (WeightedRewards({"large": large}, {"large": weight})(attempts)[0] for weight in (1.0, 2.0))
    assert alone.value == 1e15 and twice.value is None and twice.parts == {"large": 1e15}
