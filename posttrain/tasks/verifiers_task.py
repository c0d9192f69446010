"""A task of an environment of the package verifiers: its problems, and episodes that it replies to and scores."""

import hashlib
import importlib.metadata
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.files import file_sha256
from configs.loader import ConfigError
from configs.tasks import VerifiersConfig
from posttrain.chat.messages import BrokenDialogue, Message, check_order
from posttrain.rewards.attempt import Attempt, Problem, TaskScore
from posttrain.rewards.worker import file_of
from posttrain.tasks.episode_environment import Reply
from posttrain.tasks.held_problems import HeldProblems
from posttrain.tasks.task import split_of
from posttrain.tasks.verifiers_process import EpisodeEnded, VerifiersEpisode, VerifiersProcess

PACKAGE = "verifiers"
VERSION = "0.4"  # whose interface this is; it was another one in versions before
TRIED = 4  # problems on which an environment is tried before training
ANSWER = "no answer"  # what it is tried with
TURNS = 32  # turns after which a trial ends


class VerifiersTask(HeldProblems):
    """A task of the problems of a taskset; its score is what the environment says at the end of an episode."""

    def __init__(self, name: str, settings: VerifiersConfig, max_new_tokens: int, key: str = "task.verifiers") -> None:
        """Loads the taskset. Raises ConfigError, naming keys below `key`, if it cannot be played here."""
        super().__init__(name)
        self.settings, self.max_new_tokens, self.key = settings, max_new_tokens, key
        self.version = _installed(key)
        env = _env(settings, key)
        self._env_sha256 = hashlib.sha256(json.dumps(env, sort_keys=True, default=str).encode()).hexdigest()[:12]
        self.process = VerifiersProcess(settings.taskset, env, settings.max_problems, settings.memory_mb * 2**20)
        found = self.process.load()
        if "error" in found:
            raise ConfigError(
                f"{key}.taskset = {settings.taskset!r} cannot be played: {found['error']}; tasksets are looked for in "
                f"the working directory and among installed packages (memory is {key}.memory_mb)"
            )
        self.reward_weights: dict[str, float] = found["rewards"]
        self._indices: dict[str, int] = {}
        self._take(found["problems"])
        self.check_share()

    @property
    def facts(self) -> dict[str, Any]:
        """Name, limit, taskset and its config, and number of the problems with a hash of their keys."""
        digest = hashlib.sha256("/".join(problem.id for problem in self.problems["train"]).encode())
        problems = f"{self.size('train'):,} to train on ({digest.hexdigest()[:12]})"
        own = {"taskset": self.settings.taskset, "config": self._env_sha256, "version": self.version}
        return {"name": self.name, "max_new_tokens": self.max_new_tokens, "verifiers": own, "problems": problems}

    @property
    def made_from(self) -> Mapping[str, str]:
        """The taskset's module and its hash, if it is a file."""
        file = file_of(module_of(self.settings.taskset))
        return {"function": self.settings.taskset, "sha256": file_sha256(file)} if file else {}

    @property
    def reward_names(self) -> tuple[str, ...]:
        return tuple(self.reward_weights)

    def score(self, attempts: Sequence[Attempt]) -> list[TaskScore]:
        """Returns that attempts outside of an episode cannot be judged."""
        return [TaskScore.unscorable("an answer outside of an episode")] * len(attempts)

    def environment(self) -> "VerifiersEnvironment":
        """Returns an environment for one episode."""
        return VerifiersEnvironment(self)

    def begin(self, problem: Problem) -> VerifiersEpisode:
        """Begins an episode. Raises EpisodeEnded if it cannot begin."""
        return self.process.begin(self._indices[problem.id])

    def check_share(self, remedy: str = "") -> None:
        """Raises ConfigError if a split has no problem left."""
        train, heldout = self.size("train"), self.size("heldout")
        if not train or not heldout:
            raise ConfigError(
                f"{self.key}.taskset = {self.settings.taskset!r} has {train} problems to train on and {heldout} held "
                f"out, and needs some of both (set aside: {self.reasons or 'none'}); raise or lower "
                f"{self.key}.heldout_share = {self.settings.heldout_share}, or raise {self.key}.max_problems = "
                f"{self.settings.max_problems}{remedy and ', or ' + remedy}"
            )

    def try_out(self) -> None:
        """Plays the first problems with an answer that says nothing. Raises ConfigError if none of them is scored."""
        first = ""
        for problem in self.problems["train"][:TRIED]:
            environment = self.environment()
            environment.reset(problem)
            reply = Reply()
            for _ in range(TURNS):
                if (reply := environment.step(ANSWER)).done:
                    break
            environment.close()
            if reply.score is None or reply.score.value is not None:
                return
            first = first or f"{problem.id}, it {reply.score.reason}{reply.score.detail and ', ' + reply.score.detail}"
        raise ConfigError(
            f"{self.key}.taskset = {self.settings.taskset!r} scores none of its first problems, answered with "
            f"{ANSWER!r} (first: {first}); mend it, or raise {self.key}.seconds = {self.settings.seconds:g} or "
            f"{self.key}.memory_mb = {self.settings.memory_mb}"
        )

    def __str__(self) -> str:
        train, heldout = self.size("train"), self.size("heldout")
        return f"{train} problems to train on, {heldout} held out, set aside: {self.reasons or 'none'}"

    def _take(self, problems: Sequence[Mapping[str, Any]]) -> None:
        for index, record in enumerate(problems):
            key, prompt = record["key"], record["prompt"]
            if key in self._indices:
                self.set_aside.add("a repeated problem", key, "")
                continue
            try:
                if [message["role"] for message in prompt] not in ([], ["system"]):
                    check_asked(prompt)
            except BrokenDialogue as broken:
                self.set_aside.add(broken.rule, key, str(broken))
                continue
            self._indices[key] = index
            # A problem whose environment speaks first has no prompt before its episode begins.
            opened = bool(prompt) and prompt[-1]["role"] != "system"
            shown: list[Message] = prompt if opened else [{"role": "user", "content": self.name}]
            self.problems[split_of(key, self.settings.heldout_share)].append(Problem(key, shown, task=self.name))
        self.problems["heldout"].sort(key=lambda problem: problem.id)


class VerifiersEnvironment:
    """One episode of a `VerifiersTask`; it is unscorable, with a reason, if its environment raises, hangs or ends."""

    def __init__(self, task: VerifiersTask) -> None:
        self.task = task
        self._episode: VerifiersEpisode | None = None
        self._dialogue: list[Message] = []
        self._fault: TaskScore | None = None

    def reset(self, problem: Problem) -> list[Message]:
        """Returns the first messages; those of the problem if the episode cannot begin, which `step` then says."""
        self.close()
        self._dialogue, self._fault = [], None
        try:
            self._episode = self.task.begin(problem)
        except EpisodeEnded as ended:
            self._fault = TaskScore.unscorable(str(ended))
            return problem.messages
        reply = self._next(None)
        self._fault = reply.score
        return list(reply.observation) or problem.messages

    def step(self, answer: str) -> Reply:
        if self._fault is not None:
            self.task.note(self._fault, "episodes of")
            return Reply(score=self._fault, done=True)
        self._dialogue.append({"role": "assistant", "content": answer})
        reply = self._next(answer)
        if reply.score is not None:
            self.task.note(reply.score, "episodes of")
        return reply

    def close(self) -> None:
        if self._episode is not None:
            self._episode.close()
        self._episode = None

    def _next(self, answer: str | None) -> Reply:
        assert self._episode is not None
        try:
            found = self._episode.next(answer, self.task.settings.seconds)
            if "messages" in found:
                self._dialogue += found["messages"]
                check_asked(self._dialogue)
                return Reply(found["messages"])
        except EpisodeEnded as ended:
            found = {"reason": str(ended)}
        except BrokenDialogue as broken:
            found = {"reason": f"sent messages out of order: {broken.rule}", "detail": str(broken)}
        self.close()
        if "value" in found and answer is not None:
            score = TaskScore.of(found["value"])
            if score.value is not None:
                score = TaskScore(score.value, score.reason, found["parts"])
            return Reply(score=score, done=True)
        said = found.get("reason", "ended before the model's first turn"), found.get("detail", "")
        return Reply(score=TaskScore.unscorable(*said), done=True)


def check_asked(messages: Sequence[Message]) -> None:
    """Raises BrokenDialogue for messages that are out of order or do not end with what the model answers."""
    check_order(messages)
    if messages[-1]["role"] == "assistant":
        raise BrokenDialogue("the last message is the assistant's", "there is nothing to answer")


def module_of(taskset: str) -> str:
    """Returns the module that verifiers imports for the id of a taskset."""
    return taskset.rsplit("/", 1)[-1].split("@", 1)[0].replace("-", "_").lower()


def _installed(key: str) -> str:
    """Returns the version of the package. Raises ConfigError if it is missing, or another one than is understood."""
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if version.split(".")[:2] == VERSION.split("."):
        return version
    said = f"is {version}, whose interface is another one" if version else "is not installed"
    raise ConfigError(
        f"{key} needs version {VERSION} of the package {PACKAGE}, which {said}; run: pip install 'trivium[{PACKAGE}]' "
        f"(in the repository: pip install --constraint constraints.txt '.[{PACKAGE}]')"
    )


def _env(settings: VerifiersConfig, key: str) -> dict[str, Any]:
    """Returns the table [env] of the config of verifiers that the settings name; {} if they name none."""
    if settings.config is None:
        return {}
    try:
        tree = tomllib.loads(Path(settings.config).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}.config = {settings.config!r} cannot be read: {error}; correct it") from None
    env = tree.get("env", {})
    if not isinstance(env, dict) or tree.keys() - {"env"}:
        other = ", ".join(sorted(tree.keys() - {"env"})) or "an env that is no table"
        raise ConfigError(f"{key}.config = {settings.config!r} has {other}; only the table [env] is read, leave it out")
    own = env.get("taskset", {})
    if isinstance(own, dict) and own.get("id", settings.taskset) != settings.taskset:
        raise ConfigError(
            f"{key}.config = {settings.config!r} has env.taskset.id = {own['id']!r}, and {key}.taskset = "
            f"{settings.taskset!r}; leave the id out of the file"
        )
    return dict(env)
