"""Remedies in the export's messages about lengths: each is applied and works."""

import random

import pytest

from configs.export import ExportConfig
from configs.loader import ConfigError, validate
from export.huggingface import _check_lengths
from tests.remedies import remedies


def test_lengths_that_a_message_names_are_legal_and_the_longest() -> None:
    draw, followed = random.Random(2), 0
    for _ in range(300):
        context = draw.randint(8, 200)
        prompts = [[1] * draw.randint(1, context - 1) for _ in range(3)]
        openings = [[1] * draw.randint(1, context // 2) for _ in range(draw.randint(0, 2))]
        numbers = {"greedy_tokens": draw.randint(1, 150), "sample_tokens": draw.randint(1, 150)}

        def check(greedy_tokens: int, sample_tokens: int) -> None:
            tree = {"run": "a", "out": "b", "verify": {"greedy_tokens": greedy_tokens}, "sample_tokens": sample_tokens}
            _check_lengths(context, prompts, openings, validate(ExportConfig, tree))  # noqa: B023

        try:
            check(**numbers)
            continue
        except ConfigError as error:
            text = str(error).replace("set verify.", "set ").replace(" sample_tokens=", " set sample_tokens=")
            suggested = {key: int(value) for key, value in remedies(text.replace("set set", "set"))}
        assert suggested
        check(**{**numbers, **suggested})
        for key in suggested:
            with pytest.raises(ConfigError, match=f"{key} = {suggested[key] + 1}"):
                check(**{**numbers, **suggested, key: suggested[key] + 1})
        followed += 1
    assert followed > 100
