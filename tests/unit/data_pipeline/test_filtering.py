"""Verdicts from scores."""

import pytest

from configs.data import Bound, RuleSet
from data_pipeline.filtering import verdict

RULES = RuleSet(word_count=Bound(min=50, max=100), dup_line_ratio=Bound(max=0.3))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"word_count": 50, "dup_line_ratio": 0.3}, ""),
        ({"word_count": 49, "dup_line_ratio": 0.9}, "word_count_min"),
        ({"word_count": 101, "dup_line_ratio": 0.0}, "word_count_max"),
        ({"word_count": 60, "dup_line_ratio": 0.31}, "dup_line_ratio_max"),
        ({"dup_line_ratio": 0.1}, ""),
    ],
)
def test_the_first_broken_rule_is_the_reason(values: dict[str, float], reason: str) -> None:
    assert verdict(values, RULES) == reason
