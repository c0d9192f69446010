"""The task that a config names, and what its rewards are made from."""

from collections.abc import Mapping

from configs.loader import ConfigError
from configs.tasks import TaskConfig, TaskPartConfig
from posttrain.rewards.reward_registry import make_rewards
from posttrain.tasks.countdown import CountdownTask
from posttrain.tasks.file_task import FileTask
from posttrain.tasks.sorting import SortTask
from posttrain.tasks.task import Task
from posttrain.tasks.task_mixture import MixtureTask
from posttrain.tasks.verifiers_task import VerifiersTask

MadeFrom = Mapping[str, Mapping[str, str]]


def make_task(settings: TaskConfig, begun: MadeFrom | None = None, plays: bool = False) -> Task:
    """Returns the task that a config names. Raises ConfigError if its files or rewards cannot be used.

    `begun` is what `made_from` returned when a run that goes on began. `plays` says that episodes can be played.
    """
    most = settings.max_new_tokens
    if settings.verifiers is not None:
        if not plays:
            raise ConfigError(
                "task.kind = 'verifiers' has episodes of several turns, which trivium grpo and trivium ppo alone play; "
                "name a task of another kind"
            )
        return VerifiersTask(settings.name or settings.verifiers.taskset, settings.verifiers, most)
    if settings.kind != "mixture":
        return _make(settings, settings.name, most, "task", begun)
    parts = {
        name: (part.weight, _make(part, name, most, f"task.tasks.{name}", begun))
        for name, part in settings.tasks.items()
    }
    return MixtureTask(settings.name or settings.kind, parts, most)


def made_from(task: Task) -> MadeFrom:
    """Returns, by config key, what a task's rewards depend on outside the config: reward models and functions."""
    if isinstance(task, MixtureTask):
        return {key: facts for part in task.parts.values() for key, facts in made_from(part).items()}
    if isinstance(task, VerifiersTask):
        return {task.key: task.made_from} if task.made_from else {}
    if not isinstance(task, FileTask):
        return {}
    return {f"{task.key}.rewards.{name}": facts for name, facts in task.rewards.made_from.items()}


def _make(settings: TaskPartConfig, name: str, max_new_tokens: int, key: str, begun: MadeFrom | None) -> Task:
    try:
        match settings.kind:
            case "sort":
                return SortTask(settings.digits or SortTask.digits, max_new_tokens)
            case "countdown":
                return CountdownTask(settings.digits or CountdownTask.digits, max_new_tokens)
            case "file":
                rewards = make_rewards(settings.rewards, f"{key}.rewards", begun)
                return FileTask(name or settings.kind, settings, rewards, max_new_tokens, key)
            case kind:
                raise ConfigError(f"{key}.kind = {kind!r} is no task")
    except ValueError as error:
        raise ConfigError(str(error)) from None
