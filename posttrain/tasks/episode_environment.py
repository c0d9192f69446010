"""Environments of several turns: the model answers, the environment replies, until one of them ends the episode.

`ToolEnvironment` makes one of any task: the model may call tools before it answers. `play` runs many episodes at once
and records which tokens the model wrote; those of the prompt and of the environment are read and never learnt.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from configs.loader import ConfigError, Failure
from configs.rl import EnvironmentConfig
from posttrain.chat.format_interface import Chat
from posttrain.chat.messages import Message
from posttrain.rewards.attempt import Attempt, Problem, TaskScore
from posttrain.tasks.task import Task, truncated
from posttrain.tasks.tools import TOOLS, call_in
from pretrain.generation.sampling import Completion

WORKERS = 4  # environments that step at a time; a tool may wait for a process of its own
Sample = Callable[[Sequence[list[int]], Sequence[str]], Sequence[Completion]]  # prompts and keys to completions


@dataclass(frozen=True)
class Reply:
    """The environment's reply to one answer.

    `observation` are messages for the model. If `done`, the episode is over, and `score` is its reward; None means that
    the task scores the last answer.
    """

    observation: Sequence[Message] = ()
    score: TaskScore | None = None
    done: bool = False


class Environment(Protocol):
    """One episode. Neither method raises for what a model wrote, nor waits without end."""

    def reset(self, problem: Problem) -> list[Message]:
        """Begins the episode and returns the messages that the model answers first."""
        ...

    def step(self, answer: str) -> Reply:
        """Returns the reply to the model's answer, the text of its turn."""
        ...

    def close(self) -> None:
        """Frees what the episode holds, whether it has ended or was cut."""
        ...


class ToolEnvironment:
    """An episode in which the model may call tools: the last call of a turn is run, and its result is the reply.

    A turn without a call is the final answer. A call beyond `max_calls` ends the episode with a reward of 0.
    """

    def __init__(self, tools: Sequence[str], max_calls: int = 4) -> None:
        """Raises ValueError if a tool is none of `TOOLS`."""
        unknown = [name for name in tools if name not in TOOLS]
        if unknown:
            raise ValueError(f"there is no tool {unknown[0]!r}; the tools are {', '.join(TOOLS)}")
        self.tools: Mapping[str, Callable[[str], str]] = {name: TOOLS[name] for name in tools}
        self.max_calls, self._calls = max_calls, 0

    def reset(self, problem: Problem) -> list[Message]:
        self._calls = 0
        return problem.messages

    def step(self, answer: str) -> Reply:
        call = call_in(answer, self.tools)
        if call is None:
            return Reply(done=True)
        if self._calls == self.max_calls:
            return Reply(score=TaskScore(0.0, "too many calls of tools"), done=True)
        self._calls += 1
        name, argument = call
        return Reply([{"role": "user", "content": f"<result>{self.tools[name](argument)}</result>"}])

    def close(self) -> None:
        pass


def environments(settings: EnvironmentConfig) -> Callable[[], Environment]:
    """Returns a maker of the environment that a config names."""
    return lambda: ToolEnvironment(settings.tools, settings.max_calls)


@dataclass
class Transcript:
    """The tokens of one episode after its prompt; `learnt` is True on those that the model wrote.

    `logprobs` are those of the learnt tokens when they were sampled, and 0 on the environment's. `answer` is the text
    of the model's last turn. `stopped` is False if a turn was cut, or if there was no room for another. `experts` are
    the choices of routers for prompt and tokens up to the model's last turn (`Completion.experts`), if they are kept.
    """

    problem: Problem
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    learnt: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    turns: int = 0
    answer: str = ""
    stopped: bool = True
    score: TaskScore | None = None
    experts: np.ndarray = field(default_factory=lambda: np.empty(0, np.int16))

    def wrote(self, completion: Completion) -> None:
        """Adds a turn of the model."""
        self._add(completion.tokens, True, completion.logprobs)
        self.turns += 1
        if completion.experts is not None:
            self.experts = completion.experts

    def read(self, tokens: Sequence[int]) -> None:
        """Adds a reply of the environment."""
        self._add(tokens, False, [0.0] * len(tokens))

    def _add(self, tokens: Sequence[int], learnt: bool, logprobs: Sequence[float]) -> None:
        self.tokens += tokens
        self.learnt += [learnt] * len(tokens)
        self.logprobs += logprobs


def play(
    task: Task,
    problems: Sequence[Problem],
    keys: Sequence[str],
    make: Callable[[], Environment],
    chat: Chat,
    sample: Sample,
    room: int,
) -> list[Transcript]:
    """Plays an episode for each problem and returns the transcripts, all of them scored.

    `sample` continues prompts; it gets the episode's key, with the number of the turn from the second turn on, so that
    random numbers depend on neither the other episodes nor the batch. An episode may have `room` tokens with its
    prompt and what is sampled next (task.max_new_tokens at most); one without room left is cut, and its reward is 0.
    """
    if not problems:
        return []
    environments = [make() for _ in problems]
    try:
        return _played(task, problems, keys, environments, chat, sample, room)
    finally:
        for environment in environments:
            environment.close()


def _played(
    task: Task,
    problems: Sequence[Problem],
    keys: Sequence[str],
    environments: Sequence[Environment],
    chat: Chat,
    sample: Sample,
    room: int,
) -> list[Transcript]:
    with ThreadPoolExecutor(WORKERS) as pool:
        dialogues = list(pool.map(lambda pair: pair[0].reset(pair[1]), zip(environments, problems, strict=True)))
    episodes = [Transcript(p, chat.render_prompt(d)) for p, d in zip(problems, dialogues, strict=True)]
    active = list(range(len(problems)))
    while active:
        turn = episodes[active[0]].turns
        completions = sample(
            [[*episodes[i].prompt, *episodes[i].tokens] for i in active],
            [f"{keys[i]}/turn{turn}" if turn else keys[i] for i in active],
        )
        for i, completion in zip(active, completions, strict=True):
            episodes[i].wrote(completion)
            episodes[i].answer = chat.decode_answer(completion.tokens)
            episodes[i].stopped = completion.stopped
        active = [i for i in active if episodes[i].stopped]
        steps = _steps([environments[i] for i in active], [episodes[i].answer for i in active])
        left = []
        for i, step in zip(active, steps, strict=True):
            episodes[i].score = step.score
            if step.done:
                continue
            reply = reply_tokens(chat, dialogues[i], step.observation)
            used = len(episodes[i].prompt) + len(episodes[i].tokens) + len(reply)
            episodes[i].stopped = used + task.max_new_tokens <= room
            if episodes[i].stopped:  # else the reply is left out, as nothing follows it
                episodes[i].read(reply)
                dialogues[i] = [*dialogues[i], {"role": "assistant", "content": episodes[i].answer}, *step.observation]
                left.append(i)
        active = left
    _score(task, episodes)
    return episodes


def reply_tokens(chat: Chat, messages: Sequence[Message], observation: Sequence[Message]) -> list[int]:
    """Returns the tokens between the end of the model's turn and its next turn: the observation, and an opened turn.

    The model's own tokens stay as they were sampled: they are never decoded and tokenized again. Raises Failure if the
    chat template does not let them.
    """
    before = chat.render_prompt(list(messages))
    spoken: list[Message] = [*messages, {"role": "assistant", "content": "a"}, *observation]
    whole = chat.render_prompt(spoken)
    if whole[: len(before)] != before:
        raise Failure(
            "the chat template changes earlier turns as a dialogue goes on, so replies cannot follow what was sampled; "
            "start from a model that `trivium sft` has trained with another data.chat_template"
        )
    end = next(i for i in range(len(before), len(whole)) if whole[i] in chat.stop_ids)
    return whole[end + 1 :]


def check_replies(chat: Chat, key: str) -> None:
    """Raises ConfigError, naming the config's `key`, if the model cannot read a reply in its chat format."""
    turn: list[Message] = [{"role": "user", "content": "a"}]
    try:
        reply_tokens(chat, turn, turn)
    except ValueError as error:
        raise ConfigError(f"{key} has several turns: {error}") from None


def _steps(environments: Sequence[Environment], answers: Sequence[str]) -> list[Reply]:
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(lambda pair: pair[0].step(pair[1]), zip(environments, answers, strict=True)))


def _score(task: Task, episodes: Sequence[Transcript]) -> None:
    """Scores the episodes that have no score of their environment's: by the task, or as truncated."""
    for episode in episodes:
        if not episode.stopped:
            episode.score = truncated(task, episode.problem)
    open_ones = [episode for episode in episodes if episode.score is None]
    scores = task.score([Attempt(episode.problem, episode.answer) for episode in open_ones])
    for episode, score in zip(open_ones, scores, strict=True):
        episode.score = score
