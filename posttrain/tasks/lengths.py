"""Checks, before training starts, that prompts and answers fit the task's limit, training rows and model context.

The lengths are those of the prompts that the run will draw.
"""

from collections.abc import Callable

from configs.loader import ConfigError
from configs.train import ParallelConfig
from posttrain.chat.format_interface import Chat, UntrainedEnd
from posttrain.chat.messages import BrokenDialogue
from posttrain.rewards.attempt import Problem
from posttrain.tasks.task import Split, Task, available

DRAWN = 10_000  # the maximum number of prompts of each split whose lengths are measured


def check_answers(task: Task, chat: Chat, seed: int, train: int, heldout: int, context: int | None) -> int:
    """Returns the length, in tokens, of the longest of the first `train` training and `heldout` held-out prompts.

    Raises ConfigError if task.max_new_tokens would cut right answers, or if a prompt with its answer is longer than
    `context` tokens (None: not checked).
    """
    longest, answer = _longest(task, chat, seed, train, heldout)
    most = None if context is None else context + 1 - longest
    if most is not None and most < answer:
        raise ConfigError(
            f"prompts of the task {task.name!r} have up to {longest} tokens and right answers up to {answer}, and the "
            f"model was trained on {context} tokens at a time (the longest text of the runs it comes from); "
            f"{_smaller(task, chat, seed, train, heldout, context)}"
        )
    limit = task.max_new_tokens
    if limit < answer:
        more = "or more" if most is None else f"or any number up to {most}" if most > answer else "exactly"
        raise ConfigError(
            f"task.max_new_tokens = {limit} cuts right answers, which have up to {answer} tokens with the end of "
            f"their turn, so they would count as wrong; set task.max_new_tokens={answer} {more}"
        )
    if most is not None and limit > most:
        raise ConfigError(
            f"prompts of the task {task.name!r} have up to {longest} tokens, and task.max_new_tokens = {limit} more go "
            f"beyond the {context} tokens that the model was trained on (the longest text of the runs it comes from); "
            f"set task.max_new_tokens={most} or less, but not below {answer}"
        )
    return longest


def _longest(task: Task, chat: Chat, seed: int, train: int, heldout: int) -> tuple[int, int]:
    """Returns (tokens of the longest prompt, tokens of the longest right answer with its closing <|end|>).

    Problems without a known solution count as answered by nothing but <|end|>.
    """
    problems = _drawn(task, seed, train, heldout)
    prompt = max(len(chat.render_prompt(problem.messages)) for problem in problems)
    return prompt, max(_answer_length(problem, chat) for problem in problems)


def _drawn(task: Task, seed: int, train: int, heldout: int) -> list[Problem]:
    """Returns the problems whose lengths are measured: those that the run will draw, each once."""
    splits: tuple[tuple[Split, int], ...] = (("train", train), ("heldout", heldout))
    return [
        task.problem(seed, split, i)
        for split, count in splits
        for i in range(min(available(task, split, count), DRAWN))
    ]


def _answer_length(problem: Problem, chat: Chat) -> int:
    texts = {text for text in (problem.solution, problem.demonstration) if text is not None}
    try:
        return max((chat.answer_length(problem.messages, text) for text in texts), default=1)
    except UntrainedEnd as error:
        raise ConfigError(str(error.at("task", problem.id))) from None
    except BrokenDialogue:  # the template writes no such answer, whose reasoning it leaves out, say; a model still may
        return max(len(chat.encode_text(text)) + 1 for text in texts)


def _smaller(task: Task, chat: Chat, seed: int, train: int, heldout: int, context: int | None) -> str:
    """Returns the remedy for a task whose prompts and answers are too long for the model."""
    assert context is not None
    for digits, smaller in task.smaller():
        if sum(_longest(smaller, chat, seed, train, heldout)) - 1 <= context:
            return f"set task.digits={digits} or less"
    if task.size("train") is not None:
        return "leave the longest problems out, or start from a model that was trained on longer rows"
    return "no smaller task.digits fits either, so start from a model that was trained on longer rows"


def longest_answer(task: Task, chat: Chat, seed: int, train: int, heldout: int) -> int:
    """Returns the tokens of the longest right answer to the prompts of `check_answers`, with the end of its turn."""
    return _longest(task, chat, seed, train, heldout)[1]


def check_rows(
    task: Task, longest: int, seq_length: int, parallel: ParallelConfig, answer: Callable[[], int] | None = None
) -> None:
    """Raises ConfigError if a prompt of `longest` tokens and its completion do not fit into a training row.

    `answer` is given for a run that continues, whose rows cannot become longer: it returns the tokens of the longest
    right answer, below which the message does not suggest to set task.max_new_tokens.
    """
    needed = longest + task.max_new_tokens - 1  # the last token is a label and never an input
    if needed <= seq_length:
        return
    parts = parallel.sequence_parts
    fitting = -(-needed // parts) * parts
    if answer is not None:
        room, least = seq_length + 1 - longest, answer()
        fewer = f"set task.max_new_tokens={room} or less, but not below {least}, or " if room >= least else ""
        raise ConfigError(
            f"prompts of the task {task.name!r} have up to {longest} tokens, and with task.max_new_tokens = "
            f"{task.max_new_tokens} more they do not fit into the {seq_length} tokens of a row that this run has had "
            f"from its start; {fewer}choose another run.dir for a run with train.seq_length={fitting} or more"
        )
    raise ConfigError(
        f"prompts of the task {task.name!r} have up to {longest} tokens, and with task.max_new_tokens = "
        f"{task.max_new_tokens} more they do not fit into train.seq_length = {seq_length}; set "
        f"train.seq_length={fitting} or more"
    )
