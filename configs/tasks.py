"""Tasks, whose completions are scored by rewards: generated ones, those read from files, and mixtures of tasks."""

import re
from typing import Literal

from pydantic import Field, model_validator

from configs.rewards import RewardConfig
from configs.section import Section, check_name

_GENERATED = ("sort", "countdown")
_OF_FILES = (
    *("files", "heldout_files", "heldout_share", "prompt_key", "answer_key", "answer_pattern", "solution_key"),
    *("answer_format", "system_prompt", "max_bad_share", "rewards"),
)


class TaskPartConfig(Section):
    """The source of a task's problems, and its rewards."""

    kind: Literal["sort", "countdown", "file"] = "sort"
    """Where problems come from: sort asks for the digits of a number in ascending order, countdown for an expression
    of digits that makes a number, and file reads prompts and answers."""
    digits: int | None = Field(default=None, ge=3, le=32)
    """The number of digits to sort, by default 6, or to make the number of, by default 3 (sort, countdown)."""
    files: tuple[str, ...] = ()
    """Files or globs of JSON lines, .gz or .zst too, or parquet, with one problem a line or row (file)."""
    heldout_files: tuple[str, ...] = ()
    """Files of the problems that are held out; left out, a share of `files` is (file)."""
    heldout_share: float = Field(default=0.1, gt=0, lt=1)
    """The share of problems, by hash of their prompt, that is never trained on (file)."""
    prompt_key: str = "prompt"
    """The key of the prompt, a text or a list of messages; if it is nested, a path such as "a.b" (file)."""
    answer_key: str = "answer"
    """The key of the answer that rewards compare with, or a path; "" if problems have none (file)."""
    answer_pattern: str | None = None
    """A pattern whose first group is the answer within the text at answer_key, such as "#### (.+)" (file)."""
    solution_key: str = ""
    """The key of a right completion, to demonstrate and to try the rewards on; "" if there is none (file)."""
    answer_format: str = "{answer}"
    """A right completion, with {answer} for the answer, such as "<answer>{answer}</answer>" (file)."""
    system_prompt: str = ""
    """A system message before every prompt (file)."""
    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """The share of the problems that may be set aside as broken, too long, or with an answer that their own rewards
    refuse; above it the run stops (file)."""
    rewards: dict[str, RewardConfig] = Field(default={})
    """The rewards by a name for logs, whose weighted sum is the score; left out, it is exact (file)."""

    @property
    def is_scored(self) -> bool:
        """Whether completions get scores: not if files have neither answers nor rewards, but prompts alone."""
        return self.kind != "file" or self.answer_key != "" or bool(self.rewards)

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> "TaskPartConfig":
        if self.kind != "file":
            self._refuse(_OF_FILES)
        if self.kind not in _GENERATED:
            self._refuse(("digits",))
        if self.kind == "file":
            if not self.files:
                raise ValueError("kind = 'file' needs files; name JSON lines or parquet files of prompts and answers")
            if "{answer}" not in self.answer_format:
                raise ValueError(
                    f"answer_format = {self.answer_format!r} lacks {{answer}}; put it where answers belong"
                )
            self._check_pattern()
        for name in self.rewards:
            check_name("reward", name, "a part of the names of metrics")
        if self.rewards and not any(reward.weight for reward in self.rewards.values()):
            raise ValueError(
                f"all rewards ({', '.join(self.rewards)}) have weight = 0, so every score is 0; give one a weight"
            )
        return self

    def _check_pattern(self) -> None:
        if self.answer_pattern is None:
            return
        try:
            groups = re.compile(self.answer_pattern).groups
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"answer_pattern = {self.answer_pattern!r} is no regular expression: {error}; correct it"
            ) from None
        if not groups:
            raise ValueError(f"answer_pattern = {self.answer_pattern!r} has no group; put the answer in parentheses")

    def _refuse(self, keys: tuple[str, ...]) -> None:
        """Raises ValueError if a key is set that this kind of task does not read."""
        for key in keys:
            if (value := getattr(self, key)) != type(self).model_fields[key].default:
                said = f"section {key} ({', '.join(value)})" if isinstance(value, dict) else f"{key} = {value!r}"
                raise ValueError(f"{said} says nothing of kind {self.kind!r}; leave it out")


class VerifiersConfig(Section):
    """An environment of the package verifiers: a taskset, which has problems and rewards, and how it is played."""

    taskset: str
    """The id of the taskset, a module or package that exports one, such as "my-game" for my_game.py."""
    config: str | None = None
    """A TOML file whose table [env] is a config of verifiers, for settings of the taskset and its environment."""
    max_problems: int = Field(default=10_000, ge=2)
    """The number of problems that are taken of a taskset that has more."""
    heldout_share: float = Field(default=0.1, gt=0, lt=1)
    """The share of problems, by hash of their key, that is never trained on."""
    seconds: float = Field(default=30.0, gt=0)
    """The time for the reply to one answer, in seconds, its score included; beyond it the episode is unscorable."""
    memory_mb: int = Field(default=4096, ge=64)
    """The address space of an episode's process, in MiB."""


class WeightedTaskConfig(TaskPartConfig):
    """A task of a mixture, and its weight."""

    weight: float = Field(default=1.0, gt=0)
    """The share of this task among the problems, relative to the other tasks' weights."""


class TaskConfig(TaskPartConfig):
    """A task. Problems are divided by hash into training and held-out ones, which never overlap."""

    kind: Literal["sort", "countdown", "file", "mixture", "verifiers"] = "sort"  # type: ignore[assignment]
    """Where problems come from: sort asks for the digits of a number in ascending order, countdown for an expression
    of digits that makes a number, file reads prompts and answers, mixture draws from several tasks, and verifiers has
    those of an environment of the package verifiers, which replies to the model's turns and scores the episode."""
    verifiers: VerifiersConfig | None = None
    """An environment of the package verifiers (verifiers)."""
    tasks: dict[str, WeightedTaskConfig] = Field(default={})
    """The tasks of a mixture, by a name for logs (mixture)."""
    name: str = ""
    """The name of the task in logs; left out, it is that of its kind (file, mixture, verifiers)."""
    max_new_tokens: int = Field(default=16, ge=1)
    """The maximum length of a completion, in tokens; one that is longer is cut and counts as wrong."""
    eval_prompts: int = Field(default=256, ge=1)
    """The number of held-out prompts on which the model is scored at the end, once greedily and once sampled."""

    @model_validator(mode="after")
    def _parts_fit_the_kind(self) -> "TaskConfig":
        if self.kind != "mixture":
            self._refuse(("tasks",))
        elif not self.tasks:
            raise ValueError("kind = 'mixture' needs tasks; set [task.tasks.NAME] with kind and weight for each")
        if self.kind == "verifiers" and self.verifiers is None:
            raise ValueError("kind = 'verifiers' needs verifiers.taskset; set the id of a taskset")
        if self.kind != "verifiers" and self.verifiers is not None:
            raise ValueError(f"section verifiers says nothing of kind {self.kind!r}; leave it out")
        for name in self.tasks:
            check_name("task", name, "a part of the names of metrics")
        return self


class DemonstrationConfig(TaskConfig):
    """A task, and the number of its demonstrations to train on."""

    demonstrations: int = Field(default=20000, ge=0)
    """The number of training problems whose demonstrations are among the dialogues."""
