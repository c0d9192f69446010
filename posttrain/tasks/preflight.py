"""Checks of a task before training starts: its rewards can be used, and accept the right answers that it has."""

from collections.abc import Iterator
from itertools import islice

from configs.loader import ConfigError
from posttrain.chat.chat_format import ChatFormat
from posttrain.rewards.reward import Reward
from posttrain.tasks.file_task import FileTask
from posttrain.tasks.task import Attempt, Problem, Task, TaskScore

TRIED = 32  # problems on whose solutions a slow reward is tried
NO_SOLUTION = "no answer"  # what a reward without solutions is tried on


def check_task(task: Task, chat: ChatFormat, row: int) -> list[str]:
    """Tries the rewards of a task and sets aside what cannot be used; returns lines about its problems to print.

    `row` is the number of tokens that a prompt and its completion may have together. Which problems are set aside is
    the same on all ranks. Raises ConfigError if a reward cannot be used, or too few problems are left.
    """
    if not isinstance(task, FileTask):
        return []
    task.rewards.check(f"{task.key}.rewards")
    _leave_out_long_ones(task, chat, row)
    _try_rewards(task)
    return [f"{task.name}: {task}"]


def _leave_out_long_ones(task: FileTask, chat: ChatFormat, row: int) -> None:
    longest = 0

    def usable(problem: Problem) -> tuple[str, str] | None:
        nonlocal longest
        try:
            tokens = len(chat.render_prompt(problem.messages)) + task.max_new_tokens - 1
        except ValueError as error:  # half a surrogate pair, say, or roles that the chat template lacks
            return "a prompt that cannot be encoded", str(error)
        if tokens <= row:
            return None
        longest = max(longest, tokens)
        return "too long", f"{tokens} tokens with {task.key}.max_new_tokens = {task.max_new_tokens}"

    task.keep(usable)
    task.check_share(f"give prompt and completion more room than {row} tokens: {longest} take the longest")


def _try_rewards(task: FileTask) -> None:
    for name, reward in task.rewards.rewards.items():
        key = f"{task.key}.rewards.{name}"
        if not reward.compares:
            _check_values(task, reward, key)
            continue
        solved = [problem for problem in _problems(task) if problem.solution is not None]
        if reward.quick:
            _set_aside(task, reward, key, solved)
        else:
            _check_accepted(reward, key, solved[:: max(1, len(solved) // TRIED)][:TRIED], task)


def _set_aside(task: FileTask, reward: Reward, key: str, solved: list[Problem]) -> None:
    scores = reward([Attempt(problem, str(problem.solution)) for problem in solved])
    refused = {problem.id: score for problem, score in zip(solved, scores, strict=True) if score.value != 1}

    def usable(problem: Problem) -> tuple[str, str] | None:
        if problem.id not in refused:
            return None
        return f"answers that {key} refuses", _refusal(problem, refused[problem.id])

    task.keep(usable)
    task.check_share(_REMEDY.format(task=task.key))


_REMEDY = (
    'set {task}.answer_format to what a right completion says, such as "<answer>{{answer}}</answer>", '
    "or {task}.solution_key to a key that holds one"
)


def _check_accepted(reward: Reward, key: str, solved: list[Problem], task: FileTask) -> None:
    """Raises ConfigError if a slow reward refuses too many of the solutions on which it is tried.

    Problems are not set aside for it, since time decides too, which would differ from rank to rank.
    """
    scores = reward([Attempt(problem, str(problem.solution)) for problem in solved])
    refused = [pair for pair in zip(solved, scores, strict=True) if pair[1].value != 1]
    if len(refused) > task.settings.max_bad_share * len(solved):
        raise ConfigError(
            f"{key} refuses the problems' own answers in {len(refused)} of {len(solved)} tried (first: "
            f"{refused[0][0].id}, {_refusal(*refused[0])}), more than {task.key}.max_bad_share = "
            f"{task.settings.max_bad_share}; correct the answers, or {_REMEDY.format(task=task.key)}"
        )


def _check_values(task: FileTask, reward: Reward, key: str) -> None:
    """Raises ConfigError if a reward gives no number for any of the first problems, with what it did instead."""
    problems = list(islice(_problems(task), 4))
    scores = reward([Attempt(problem, problem.solution or NO_SOLUTION) for problem in problems])
    if any(score.value is not None for score in scores):
        return
    first, score = problems[0], scores[0]
    said = f"{score.reason}{score.detail and ', ' + score.detail}"
    raise ConfigError(
        f"{key} gives no number for any of the first {len(problems)} problems (first: {first.id}, completion "
        f"{(first.solution or NO_SOLUTION)[:60]!r}: {said}); correct the function, which has "
        f"{reward_seconds(reward):g} s and returns a number, or None for what it cannot judge"
    )


def reward_seconds(reward: Reward) -> float:
    """Returns the time that a reward has for one attempt, in seconds."""
    return float(getattr(getattr(reward, "call", None), "seconds", 0.0))


def _refusal(problem: Problem, score: TaskScore) -> str:
    said = f"{str(problem.solution)[:60]!r} gets {score.value:g}" if score.value is not None else score.reason
    return f"{said}{score.detail and ', ' + score.detail}"


def _problems(task: FileTask) -> Iterator[Problem]:
    yield from task.problems["train"]
    yield from task.problems["heldout"]
