"""Tests verdicts that follow from scores and rules."""

import numpy as np
import pyarrow as pa
import pytest

from configs.rules import Bound, RuleSet, combined
from data_pipeline.scores.filtering import verdict, verdicts

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


def test_a_table_is_judged_as_its_rows_are() -> None:
    """Judges rows of two rule sets with scores at, below and above every bound, as a table and one by one."""
    rules = {"a": RULES, "b": RuleSet(word_count=Bound(max=60), stop_word_count=Bound(min=2))}
    draw = np.random.default_rng(0)
    rows = [
        {
            "rules": str(draw.choice(["a", "b"])),
            "word_count": float(draw.choice([49, 50, 60, 61, 100, 101])),
            "dup_line_ratio": float(draw.choice([0.0, 0.3, 0.31])),
            "stop_word_count": float(draw.choice([1, 2])),
        }
        for _ in range(500)
    ]
    found = verdicts(pa.Table.from_pylist(rows), rules)
    assert found.tolist() == [verdict(row, rules[row["rules"]]) for row in rows]
    assert set(found) == {"", "word_count_min", "word_count_max", "dup_line_ratio_max", "stop_word_count_min"}


def test_published_sets_are_combined_and_overridden() -> None:
    rules = RuleSet.model_validate_json(
        '{"use": ["gopher_quality@paper", "gopher_repetition@paper", "c4@reference"], "without": ["bad_words"],'
        ' "word_count": {"min": 60}, "bad_words_file": "x"}'
    )
    assert rules.bounds()["word_count"] == Bound(min=60, max=100_000)
    assert rules.c4 == "reference" and "bad_words" not in rules.bounds()
    assert next(iter(rules.bounds())) == "word_count"
    both = combined(["fineweb2_zh", "code@starcoder"], {"splitter": "cjk"})
    assert both["word_count"] == {"min": 100, "max": 200_000}  # the stricter limit of each


@pytest.mark.parametrize(
    ("names", "own", "said"),
    [
        (["gopher_quality@papers"], {}, r"does not exist; did you mean 'gopher_quality@paper'\?"),
        (
            ["gopher_quality@paper", "gopher_repetition@datatrove"],
            {},
            "splitter is .spaces. in gopher_quality@paper and .spacy. in gopher_repetition@datatrove",
        ),
        (["c4@paper", "c4@fineweb"], {"splitter": "spaces"}, "c4 is .paper. in c4@paper and .fineweb. in c4@fineweb"),
    ],
)
def test_sets_that_do_not_go_together_are_refused(names: list[str], own: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        combined(names, own)


def test_a_rule_switched_off_has_to_be_on() -> None:
    with pytest.raises(ValueError, match="without = 'dup_5_gram' is no rule of this set"):
        RuleSet(word_count=Bound(min=1), without=("dup_5_gram",))
    with pytest.raises(ValueError, match="needs bad_words_file"):
        RuleSet(bad_words=Bound(max=0))
