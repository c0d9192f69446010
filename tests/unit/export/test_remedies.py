"""Remedies in the export's messages about lengths and memory: each is applied and works."""

import random
import re
from pathlib import Path

import pytest

from configs.export import ExportConfig
from configs.loader import ConfigError, validate
from configs.model import ModelConfig
from configs.train import ParallelConfig
from export.checked_texts import _check_lengths
from export.memory import check_memory
from export.text_model import _layout
from tests.remedies import remedies
from tests.tiny_models import make_source, tiny


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
            assert text.endswith(", or shorten the prompts")
        assert suggested
        shorter = validate(ExportConfig, {"run": "a", "out": "b", "verify": {"greedy_tokens": 1}, "sample_tokens": 1})
        _check_lengths(context, [[1]], [], shorter)
        check(**{**numbers, **suggested})
        for key in suggested:
            with pytest.raises(ConfigError, match=f"{key} = {suggested[key] + 1}"):
                check(**{**numbers, **suggested, key: suggested[key] + 1})
        followed += 1
    assert followed > 100


def test_layers_that_a_message_names_fit_into_memory_and_are_the_most() -> None:
    sizes = {"vocab_size": 1000, "hidden_size": 64, "ffn_hidden_size": 128, "num_heads": 4, "num_kv_heads": 4}
    model = validate(ModelConfig, {**sizes, "num_layers": 12})
    whole = 8 * model.num_parameters()
    check_memory(model, None, int(whole / 0.8) + 1)
    check_memory(model, None, None)
    for share in (0.95, 0.8, 0.6, 0.4):
        free = int(whole * share)
        with pytest.raises(
            ConfigError, match=r"takes 0\.0 GB, twice the model in fp32.* to compare the first layers and all tensors"
        ) as raised:
            check_memory(model, None, free)
        ((key, value),) = remedies(str(raised.value))
        assert key == "verify.layers"
        check_memory(model, int(value), free)
        with pytest.raises(ConfigError):
            check_memory(model, int(value) + 1, free)
    with pytest.raises(ConfigError, match="even for one layer; export on a machine with more memory"):
        check_memory(model, None, 1000)


def test_ranks_that_generate_are_as_many_as_a_message_says() -> None:
    source = make_source(tiny(moe=True), {}, Path("tokenizer.model"))  # of 4 heads, 2 key-value heads and 4 experts
    followed = 0
    for ranks in range(2, 13):
        for tp, ep in ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)):
            try:
                _layout(ranks, ParallelConfig(tp=tp, ep=ep), source)
            except ConfigError as error:
                if "ranks that were started" not in str(error):
                    continue
                start = re.search(r"; start (\d+)(?:, or set parallel\.tp=(\d+))?$", str(error))
                assert start is not None, error
                if int(start[1]) > 1:
                    _layout(int(start[1]), ParallelConfig(tp=tp, ep=ep), source)
                if start[2]:
                    _layout(ranks, ParallelConfig(tp=int(start[2]), ep=ep), source)
                    followed += 1
    assert followed > 5
