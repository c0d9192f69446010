"""Prompts and answers that do not fit are refused before training starts, with remedies that work."""

import re

import pytest

from configs.loader import ConfigError
from configs.train import ParallelConfig
from posttrain.chat.chat_format import ChatFormat
from posttrain.rl.rollout import _empty, _fill
from posttrain.tasks.episode_environment import Transcript
from posttrain.tasks.lengths import check_answers, check_rows
from posttrain.tasks.sorting import SortTask
from pretrain.generation.sampling import Completion

PARALLEL = ParallelConfig()


def said_number(error: pytest.ExceptionInfo[ConfigError], key: str) -> int:
    found = re.search(rf"set {re.escape(key)}=(\d+)", str(error.value))
    assert found, error.value
    return int(found[1])


@pytest.mark.parametrize("digits", [3, 7, 20])
@pytest.mark.parametrize("limit", [1, 4, 8, 30])
def test_answers_must_not_be_cut(chat: ChatFormat, digits: int, limit: int) -> None:
    needed = len(chat.encode_text("1" * digits)) + 1
    task = SortTask(digits, limit)
    if limit >= needed:
        assert check_answers(task, chat, 0, 20, 20, None) > digits
        return
    with pytest.raises(ConfigError, match=rf"task\.max_new_tokens = {limit} cuts right answers") as raised:
        check_answers(task, chat, 0, 20, 20, None)
    better = said_number(raised, "task.max_new_tokens")
    assert better == needed and check_answers(SortTask(digits, better), chat, 0, 20, 20, None)


@pytest.mark.parametrize("parallel", [PARALLEL, ParallelConfig(cp=2, tp=4, sp=True)])
@pytest.mark.parametrize("seq_length", range(8, 40, 4))
def test_a_row_takes_the_longest_prompt_and_its_completion(
    chat: ChatFormat, seq_length: int, parallel: ParallelConfig
) -> None:
    """Tries sequence lengths: one is accepted if and only if the longest prompt and completion fit into a row."""
    task = SortTask(6, 10)
    longest = check_answers(task, chat, 0, 50, 50, None)
    episode = Transcript(task.problem(0, "train", 0), [1] * longest, stopped=False)
    episode.wrote(Completion([5] * task.max_new_tokens, [0.0] * task.max_new_tokens, stopped=False))

    def row(length: int) -> None:
        _fill(_empty(1, length, 0), 0, episode, length)

    try:
        row(seq_length)
    except ValueError:
        with pytest.raises(ConfigError, match=rf"train\.seq_length = {seq_length}; set") as raised:
            check_rows(task, longest, seq_length, parallel)
        fitting = said_number(raised, "train.seq_length")
        assert fitting % (parallel.cp * (parallel.tp if parallel.sp else 1)) == 0
        check_rows(task, longest, fitting, parallel)
        row(fitting)
    else:
        check_rows(task, longest, seq_length, parallel)


def test_nothing_is_sampled_beyond_the_models_context(chat: ChatFormat) -> None:
    longest = check_answers(SortTask(6, 30), chat, 0, 20, 20, None)
    assert check_answers(SortTask(6, 30), chat, 0, 20, 20, longest + 29) == longest
    with pytest.raises(ConfigError, match=rf"beyond the {longest + 28} tokens that the model") as raised:
        check_answers(SortTask(6, 30), chat, 0, 20, 20, longest + 28)
    assert check_answers(SortTask(6, said_number(raised, "task.max_new_tokens")), chat, 0, 20, 20, longest + 28)
    with pytest.raises(ConfigError, match=r"right answers up to") as raised:
        check_answers(SortTask(6, 30), chat, 0, 20, 20, longest + 2)
    fewer = SortTask(said_number(raised, "task.digits"), 3)
    assert fewer.digits < 6
    with pytest.raises(ConfigError) as raised:  # the digits fit now, and the message names the number of tokens
        check_answers(fewer, chat, 0, 20, 20, longest + 2)
    answer = said_number(raised, "task.max_new_tokens")
    assert check_answers(SortTask(fewer.digits, answer), chat, 0, 20, 20, longest + 2) < longest
    with pytest.raises(ConfigError, match=r"no smaller task\.digits fits either, so start from a model"):
        check_answers(SortTask(6, 30), chat, 0, 20, 20, 5)
