"""The prompts that completions are sampled for: problems of a task, or prompts from files without rewards."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from configs.loader import ConfigError
from configs.sample import SampleConfig
from configs.tasks import TaskConfig
from posttrain.chat.format_interface import Chat
from posttrain.rewards.attempt import Attempt, Problem, TaskScore
from posttrain.rewards.reward import WeightedRewards
from posttrain.tasks.file_task import FileTask
from posttrain.tasks.lengths import check_answers
from posttrain.tasks.preflight import check_task
from posttrain.tasks.task import Split, Task
from posttrain.tasks.verifiable_tasks import MadeFrom, make_task


class PromptFiles(FileTask):
    """Prompts of files as a task without answers, rewards and held-out problems."""

    def __init__(self, settings: TaskConfig) -> None:
        """Reads the files. Raises ConfigError if too many records cannot be used."""
        super().__init__(settings.name or "prompts", settings, WeightedRewards({}, {}), settings.max_new_tokens)

    def check_share(self, remedy: str = "") -> None:
        self.check_bad_share(remedy)

    def problem(self, seed: int, split: Split, index: int) -> Problem:
        """Returns prompt number `index` in the order of the files, whatever the seed; the first follows the last."""
        prompts = self.problems["train"]
        return prompts[index % len(prompts)]

    def score(self, attempts: Sequence[Attempt]) -> list[TaskScore]:
        return [TaskScore.unscorable("not scored") for _ in attempts]

    def __str__(self) -> str:
        duplicates = f", {self.duplicates} repeated prompts left out" if self.duplicates else ""
        return f"{self.size('train')} prompts, set aside: {self.reasons or 'none'}{duplicates}"

    def _split(self, content: str, key: str) -> Split:
        return "train"


def open_task(settings: TaskConfig, begun: MadeFrom | None = None) -> Task:
    """Returns the task that a config names; of files without answers and rewards, their prompts.

    `begun` is as in `make_task`. Raises ConfigError.
    """
    return make_task(settings, begun) if settings.is_scored else PromptFiles(settings)


@dataclass(frozen=True)
class Prompt:
    """A problem, its number in the task, its tokens, and a hash of its messages that keys the random numbers."""

    number: int
    problem: Problem
    tokens: list[int]
    key: str


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run, no two with the same messages, and how many repeated ones were left out."""

    task: Task
    items: list[Prompt]
    repeated: int
    notes: list[str]


def open_prompts(config: SampleConfig, chat: Chat, context: int | None, begun: MadeFrom | None = None) -> Prompts:
    """Opens the prompts of a run and tries the rewards of their task; `begun` is as in `make_task`.

    Raises ConfigError if a reward cannot be used, prompts and completions do not fit the model's context, or the number
    of problems is left out for a task that has no end.
    """
    task = open_task(config.task, begun)
    notes = check_task(task, chat, None, context)
    size, wanted = task.size("train"), config.sample.problems
    if wanted is None and size is None:
        raise ConfigError(
            f"the task {task.name!r} draws problems without end, and sample.problems is left out; set for example "
            "sample.problems=256"
        )
    count = min(number for number in (size, wanted) if number is not None)
    check_answers(task, chat, config.run.seed, count, 0, context)
    items, seen = [], set[str]()
    for number in range(count):
        problem = task.problem(config.run.seed, "train", number)
        key = hashlib.sha256(json.dumps(problem.messages, sort_keys=True).encode()).hexdigest()[:16]
        if key not in seen:
            seen.add(key)
            items.append(Prompt(number, problem, chat.render_prompt(problem.messages), key))
    return Prompts(task, items, count - len(items), notes)
