"""Checks of a task before training starts: its rewards can be used, and accept the right answers that it has."""

from collections.abc import Iterator
from itertools import islice

from configs.loader import ConfigError
from posttrain.chat.format_interface import Chat
from posttrain.rewards.attempt import Attempt, Problem, TaskScore
from posttrain.rewards.reward import Reward
from posttrain.tasks.file_task import FileTask
from posttrain.tasks.task import Task
from posttrain.tasks.task_mixture import MixtureTask
from posttrain.tasks.verifiers_task import VerifiersTask

TRIED = 32  # problems on whose solutions a slow reward is tried
FEW = 4  # problems on which a function of the user is tried
NO_SOLUTION = "no answer"  # what a reward is tried on where there is no solution
UNLIMITED = 2**31  # tokens


def check_task(task: Task, chat: Chat, row: int | None, context: int | None = None) -> list[str]:
    """Tries the rewards of a task and sets aside what cannot be used; returns lines about its problems to print.

    A prompt and its completion may have as many tokens together as a training row and as the model's context, where
    these are given. Which problems are set aside is the same on all ranks. Raises ConfigError if a reward cannot be
    used, or too few problems are left.
    """
    if isinstance(task, MixtureTask):
        return [line for part in task.parts.values() for line in check_task(part, chat, row, context)]
    if isinstance(task, VerifiersTask):
        _leave_out_long_ones(task, chat, row, context)
        task.try_out()
        return [f"{task.name}: {task}"]
    if not isinstance(task, FileTask):
        return []
    task.rewards.check(f"{task.key}.rewards")
    _leave_out_long_ones(task, chat, row, context)
    _try_rewards(task)
    return [f"{task.name}: {task}"]


def _leave_out_long_ones(task: FileTask | VerifiersTask, chat: Chat, row: int | None, context: int | None) -> None:
    room, longest = min(row or UNLIMITED, context or UNLIMITED), 0

    def usable(problem: Problem) -> tuple[str, str] | None:
        nonlocal longest
        try:
            tokens = len(chat.render_prompt(problem.messages)) + task.max_new_tokens - 1
        except ValueError as error:  # half a surrogate pair, say, or roles that the chat template lacks
            return "a prompt that cannot be encoded", str(error)
        if tokens <= room:
            return None
        longest = max(longest, tokens)
        return "too long", f"{tokens} tokens with task.max_new_tokens = {task.max_new_tokens}"

    task.keep(usable)
    is_beyond_model = longest > (context or UNLIMITED)
    longer = "start from a model that was trained on longer texts" if is_beyond_model else "raise train.seq_length"
    remedy = f"lower task.max_new_tokens, or {longer}: of {room} tokens of room the longest takes {longest}"
    task.check_share(remedy if longest else "")  # problems with other faults alone need no room


def _remedy(task: FileTask) -> str:
    if not (task.settings.answer_key or task.settings.rewards):
        return f"set {task.key}.answer_key to the key that holds the answer, or name rewards that need none"
    return (
        f'set {task.key}.answer_format to what a right completion says, such as "<answer>{{answer}}</answer>", '
        f"or {task.key}.solution_key to a key that holds one"
    )


def _try_rewards(task: FileTask) -> None:
    for name, reward in task.rewards.rewards.items():
        key = f"{task.key}.rewards.{name}"
        if not reward.compares:
            _check_values(task, reward, key)
        elif reward.quick:
            _set_aside(task, reward, key)
        else:
            _check_accepted(task, reward, key)


def _set_aside(task: FileTask, reward: Reward, key: str) -> None:
    """Sets aside the problems whose own solution gets less than 1, and those that the reward cannot judge."""
    refused = dict(_refused(reward, list(_problems(task))))

    def usable(problem: Problem) -> tuple[str, str] | None:
        if problem.id not in refused:
            return None
        score = refused[problem.id]
        if score.value is None:
            return f"that {key} cannot judge: {score.reason}", score.detail
        return f"whose answer {key} refuses", f"{str(problem.solution)[:60]!r} gets {score.value:g}"

    task.keep(usable)
    task.check_share(_remedy(task) if refused else "")


def _check_accepted(task: FileTask, reward: Reward, key: str) -> None:
    """Raises ConfigError if a slow reward refuses too many of the solutions on which it is tried.

    Problems are not set aside for it, since time decides too, which would differ from rank to rank.
    """
    problems = list(_problems(task))
    tried = problems[:: max(1, len(problems) // TRIED)][:TRIED]
    refused = dict(_refused(reward, tried))
    if len(refused) <= task.settings.max_bad_share * len(tried):
        return
    first = next(problem for problem in tried if problem.id in refused)
    score = refused[first.id]
    said = score.reason if score.value is None else f"{str(first.solution)[:60]!r} gets {score.value:g}"
    raise ConfigError(
        f"{key} refuses the problems' own answers, or cannot judge them, in {len(refused)} of {len(tried)} tried "
        f"(first: {first.id}, {said}{score.detail and ', ' + score.detail}), more than {task.key}.max_bad_share = "
        f"{task.settings.max_bad_share}; correct {key} or the answers, or {_remedy(task)}"
    )


def _refused(reward: Reward, problems: list[Problem]) -> Iterator[tuple[str, TaskScore]]:
    """Yields (id, score) of the problems that cannot be judged, or whose own solution gets less than 1."""
    texts = [problem.solution if problem.solution is not None else NO_SOLUTION for problem in problems]
    scores = reward([Attempt(problem, text) for problem, text in zip(problems, texts, strict=True)])
    for problem, score in zip(problems, scores, strict=True):
        if score.value is None or (problem.solution is not None and score.value != 1):
            yield problem.id, score


def _check_values(task: FileTask, reward: Reward, key: str) -> None:
    """Raises ConfigError if a reward gives no number for any of the first problems, with what it did instead."""
    problems = list(islice(_problems(task), FEW))
    scores = reward([Attempt(problem, problem.solution or NO_SOLUTION) for problem in problems])
    if any(score.value is not None for score in scores):
        return
    first, score = problems[0], scores[0]
    raise ConfigError(
        f"{key} gives no number for any of the first {len(problems)} problems (first: {first.id}, completion "
        f"{(first.solution or NO_SOLUTION)[:60]!r}: it {score.reason}{score.detail and ', ' + score.detail}); correct "
        f"it, so that it returns a number within {key}.seconds, or None for what it cannot judge"
    )


def _problems(task: FileTask) -> Iterator[Problem]:
    yield from task.problems["train"]
    yield from task.problems["heldout"]
