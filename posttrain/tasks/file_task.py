"""A task whose problems are read from files: a prompt, and mostly an answer, a record.

All problems are held in memory. Records that cannot be used are set aside and counted by reason; above
task.max_bad_share of them the run does not start. Of equal prompts the first is kept, which is no fault.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from configs.loader import ConfigError
from configs.tasks import TaskPartConfig
from posttrain.chat.messages import BrokenDialogue, Message, check_order
from posttrain.records import Unusable, find_files, read_records, value_at
from posttrain.rewards.attempt import Attempt, Problem, TaskScore
from posttrain.rewards.reward import WeightedRewards
from posttrain.tasks.held_problems import HeldProblems
from posttrain.tasks.task import Split, fraction


class FileTask(HeldProblems):
    """A task of the problems in files, scored by `rewards`."""

    def __init__(
        self, name: str, settings: TaskPartConfig, rewards: WeightedRewards, max_new_tokens: int, key: str = "task"
    ) -> None:
        """Reads the files. Raises ConfigError, naming keys below `key`, if too many records cannot be used."""
        super().__init__(name)
        self.max_new_tokens, self.settings, self.rewards, self.key = max_new_tokens, settings, rewards, key
        self.duplicates = 0
        self._read()
        self.check_share()

    @property
    def facts(self) -> dict[str, Any]:
        """Name, limit and number of the problems, with a hash of all that a reward sees of them."""
        digest = hashlib.sha256()
        for problem in self.problems["train"]:
            seen = (problem.messages, problem.answer, problem.metadata)
            digest.update("/".join(map(_canonical, seen)).encode(errors="surrogatepass"))
        problems = f"{self.size('train'):,} to train on ({digest.hexdigest()[:12]})"
        return {"name": self.name, "max_new_tokens": self.max_new_tokens, "problems": problems}

    @property
    def reward_names(self) -> tuple[str, ...]:
        return tuple(self.rewards.rewards)

    @property
    def reward_weights(self) -> dict[str, float]:
        return self.rewards.weights

    def score(self, attempts: Sequence[Attempt]) -> list[TaskScore]:
        """Returns the weighted sum of the rewards of each attempt, and says on stderr why some cannot be judged."""
        scores = self.rewards(attempts)
        for score in scores:
            self.note(score, "completions for")
        return scores

    def check_bad_share(self, remedy: str = "") -> None:
        """Raises ConfigError if there are no records, or too many of them are set aside."""
        key, bad = self.key, self.set_aside.counts.total()
        left = sum(len(problems) for problems in self.problems.values())
        if not bad + left:
            raise ConfigError(f"{key}.files: {self._names} has no problem; name files with a problem on each line")
        if bad > self.settings.max_bad_share * (bad + left) or not left:
            raise ConfigError(
                f"{bad} of {bad + left} problems of {self._names} are set aside, more than {key}.max_bad_share = "
                f"{self.settings.max_bad_share}: {self.set_aside}; correct or remove them{remedy and ', or ' + remedy}"
            )

    def check_share(self, remedy: str = "") -> None:
        """Raises ConfigError if too many records are set aside, or a split has no problem left."""
        self.check_bad_share(remedy)
        key, names = self.key, self._names
        left = {split: len(problems) for split, problems in self.problems.items()}
        if not left["train"]:
            raise ConfigError(
                f"all {left['heldout']} problems of {names} are held out; add problems"
                + ("" if self.settings.heldout_files else f", or lower {key}.heldout_share")
            )
        if not left["heldout"]:
            raise ConfigError(
                f"none of the {left['train']} problems of {names} is held out, by the hash of their prompts, so "
                f"nothing could be measured; raise {key}.heldout_share = {self.settings.heldout_share}, or name "
                f"{key}.heldout_files"
            )

    @property
    def _names(self) -> str:
        return ", ".join((*self.settings.files, *self.settings.heldout_files))

    def __str__(self) -> str:
        train, heldout = self.size("train"), self.size("heldout")
        duplicates = f", {self.duplicates} repeated prompts left out" if self.duplicates else ""
        return f"{train} problems to train on, {heldout} held out, set aside: {self.reasons or 'none'}{duplicates}"

    def _read(self) -> None:
        settings, seen = self.settings, set[str]()
        # Held-out files first: a prompt that is in both is held out.
        for paths, key in ((settings.heldout_files, "heldout_files"), (settings.files, "files")):
            for where, record in read_records(find_files(paths, f"{self.key}.{key}"), f"{self.key}.{key}"):
                try:
                    if isinstance(record, Unusable):
                        raise record
                    problem = self._problem(where, record)
                except Unusable as broken:
                    self.set_aside.add(broken.reason, where, broken.details)
                    continue
                content = _canonical(problem.prompt)
                if content in seen:
                    self.duplicates += 1
                    continue
                seen.add(content)
                self.problems[self._split(content, key)].append(problem)
        if not settings.heldout_files:  # by hash, so that the first ones are a fair choice whatever the files' order
            self.problems["heldout"].sort(key=lambda problem: fraction(_canonical(problem.prompt)))

    def _split(self, content: str, key: str) -> Split:
        if key == "heldout_files":
            return "heldout"
        share = 0.0 if self.settings.heldout_files else self.settings.heldout_share
        return "heldout" if fraction(content) < share else "train"

    def _problem(self, where: str, record: Mapping[str, Any]) -> Problem:
        settings = self.settings
        prompt = value_at(record, settings.prompt_key)
        _check_prompt(prompt, settings.prompt_key)
        if settings.system_prompt and not isinstance(prompt, str) and prompt[0]["role"] == "system":
            raise Unusable(
                "the prompt has a system message, and so has the task", f"leave {self.key}.system_prompt out"
            )
        answer = value_at(record, settings.answer_key) if settings.answer_key else None
        if settings.answer_key and (answer is None or answer == "" or answer != answer):  # a missing number is NaN
            raise Unusable(f"{settings.answer_key!r} is empty")
        if settings.answer_pattern is not None:
            match = re.search(settings.answer_pattern, str(answer))
            if match is None or match[1] is None:
                raise Unusable("no match of answer_pattern in the answer", str(answer))
            answer = match[1].strip()
        solution = None
        if settings.solution_key:
            solution = value_at(record, settings.solution_key)
            if not isinstance(solution, str):
                raise Unusable(f"{settings.solution_key!r} is no text", f"it is {type(solution).__name__}")
        elif self.rewards.answer_is_text and isinstance(answer, str | int | float):
            solution = settings.answer_format.replace("{answer}", str(answer))
        used = (settings.prompt_key, settings.answer_key, settings.solution_key)
        metadata = {key: value for key, value in record.items() if key not in used}
        system = settings.system_prompt
        return Problem(where, prompt, answer, solution, solution, metadata, self.name, system)


def _check_prompt(prompt: Any, key: str) -> None:
    """Raises Unusable if a prompt is neither a text nor messages that end with the user's."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise Unusable(f"{key!r} is empty")
        return
    if not isinstance(prompt, list):
        raise Unusable(f"{key!r} is neither a text nor a list of messages", f"it is {type(prompt).__name__}")
    messages: list[Message] = prompt
    try:
        check_order(messages)
    except BrokenDialogue as broken:
        raise Unusable(broken.rule, str(broken)) from None
    if messages[-1]["role"] != "user":
        raise Unusable("the last message is not the user's", f"it is the {messages[-1]['role']}'s")


def _canonical(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
