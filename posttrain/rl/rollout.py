"""Rollouts: groups of completions sampled from the current model, with their scores and log-probabilities.

Sample i of a run is completion i % group_size of prompt i // group_size. Prompt and random numbers are keyed by i, and
in an environment by the number of the turn, so what is sampled does not depend on ranks or batches. The sampled tokens
are trained on as they are, never decoded and tokenized again. `posttrain.rl.rollout_source` decides which rank samples
what.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from configs.sampling import SamplingConfig
from posttrain.algorithms.advantages import equal_groups
from posttrain.chat.format_interface import Chat
from posttrain.rewards.attempt import Attempt, Problem, TaskScore
from posttrain.rl.text_sampler import TextSampler
from posttrain.tasks.episode_environment import Environment, Transcript, play
from posttrain.tasks.task import Task, truncated
from pretrain.generation.sampling import Completion

METRICS = ("reward", "equal_reward_groups", "completion_tokens", "truncated", "unscorable")
EXPERTS = "experts"  # array of the choices of routers
PART = "reward/"  # before the name of a reward, in arrays and metrics


@dataclass(frozen=True)
class Rollout:
    """Completions of whole groups, in host arrays whose first dimension N is the sample.

    tokens            int32 [N, S], prompt and completion without its last token; padding last
    labels            int32 [N, S], the next token at positions that predict one of the completion, else 0
    mask              bool [N, S], whether the label was sampled, and so is trained on; replies are not
    lengths           int32 [N], tokens that are no padding
    prompts           int64 [N], numbers of the prompts in the run
    scores            float32 [N], the rewards of the task; NaN where it could not judge
    stopped           bool [N], whether the completion ended by itself
    rollout_logprobs  float32 [N, S], of the labels, by the sampler at its temperature; 0 outside the mask

    experts           int16 [N, S, L, k], in a mixture of experts whose choices are replayed: the experts that the
                      sampler sent each token to in each of its L layers with a mixture; -1 where it did not say

    Further arrays, such as `old_logprobs` by the trainer's code, are added under their names in `TokenBatch`.
    """

    arrays: Mapping[str, np.ndarray]
    group_size: int

    def __getattr__(self, name: str) -> np.ndarray:
        if name.startswith("_") or name not in self.arrays:
            raise AttributeError(f"the rollout has no {name}; it has {', '.join(self.arrays)}")
        return self.arrays[name]

    def __len__(self) -> int:
        return len(self.arrays["tokens"])

    def plus(self, **arrays: np.ndarray) -> "Rollout":
        """Returns the rollout with more arrays, or with other ones in place of its own."""
        return Rollout({**self.arrays, **arrays}, self.group_size)

    def of_groups(self, groups: Sequence[int]) -> "Rollout":
        """Returns the samples of some groups alone, in the order of `groups`."""
        index = (np.array(groups, dtype=np.int64)[:, None] * self.group_size + np.arange(self.group_size)).flatten()
        return Rollout({name: array[index] for name, array in self.arrays.items()}, self.group_size)

    def followed_by(self, other: "Rollout") -> "Rollout":
        """Returns this rollout's samples and then another's."""
        both = {name: np.concatenate((array, other.arrays[name])) for name, array in self.arrays.items()}
        return Rollout(both, self.group_size)

    def rewards(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (rewards, scored), both [groups, group size]; an unscorable sample has reward 0 and scored False."""
        values = torch.from_numpy(self.scores).view(-1, self.group_size)
        scored = ~values.isnan()
        return torch.where(scored, values, 0.0), scored

    def equal_groups(self) -> np.ndarray:
        """Returns bool [groups], True for those that no advantage can be drawn from, as their rewards are all equal."""
        return equal_groups(*self.rewards()).numpy()

    def unscored_groups(self) -> np.ndarray:
        """Returns bool [groups], True for those of which no completion could be scored."""
        return ~self.rewards()[1].any(1).numpy()

    def completion_lengths(self) -> np.ndarray:
        """Returns the number of sampled tokens of each completion [N]."""
        return self.mask.sum(1)

    def metrics(self) -> dict[str, tuple[float, float]]:
        """Returns (sum, count) of each of `METRICS`, and of each reward by its name, if the task has several."""
        rewards, scored = self.rewards()
        samples, known = len(self), int(scored.sum())
        parts = {name: array for name, array in self.arrays.items() if name.startswith(PART)}
        return {
            **{
                name: (float(np.nansum(part, dtype=float)), int((~np.isnan(part)).sum()))
                for name, part in parts.items()
            },
            "reward": (float(rewards.double().sum()), known),
            "equal_reward_groups": (int(self.equal_groups().sum()), len(rewards)),  # contribute no gradient
            "completion_tokens": (int(self.mask.sum()), samples),
            "truncated": (int((~self.stopped).sum()), samples),
            **({"turns": (int(self.turns.sum()), samples)} if "turns" in self.arrays else {}),
            "unscorable": (samples - known, samples),
        }


def sample(
    sampler: TextSampler,
    task: Task,
    chat: Chat,
    temperature: float,
    seed: int,
    samples: Sequence[int],
    group_size: int,
    seq_length: int,
    scores: bool = True,
    make: Callable[[], Environment] | None = None,
    keep_experts: bool = False,
) -> Rollout:
    """Samples completions for `samples`, numbers of the run, and scores them unless `scores` is False.

    With `make` each of them is an episode in an environment. `keep_experts` keeps the choices of routers. Raises
    ValueError if a prompt and its completion do not fit into `seq_length`.
    """
    arrays = _empty(len(samples), seq_length, chat.tokenizer.pad_id)
    arrays["prompts"][:] = [i // group_size for i in samples]
    arrays |= {PART + name: np.full(len(samples), np.nan, np.float32) for name in task.reward_names}
    if make is not None:
        arrays |= {"turns": np.zeros(len(samples), np.int32)}
    if keep_experts:
        arrays[EXPERTS] = np.full((len(samples), seq_length, *sampler.choices), -1, np.int16)
    if not len(samples):
        return Rollout(arrays, group_size)
    problems = [task.problem(seed, "train", i // group_size) for i in samples]
    settings, keys = SamplingConfig(temperature=temperature), [f"rollout/{i}" for i in samples]
    episodes = written(sampler, task, chat, problems, settings, seed, keys, seq_length + 1, scores, make, keep_experts)
    for i, episode in enumerate(episodes):
        _fill(arrays, i, episode, seq_length)
        if keep_experts:
            arrays[EXPERTS][i, : len(episode.experts)] = episode.experts
        if make is not None:
            arrays["turns"][i] = episode.turns
        if episode.score is not None:
            arrays["scores"][i] = np.nan if episode.score.value is None else episode.score.value
            for name in task.reward_names:
                arrays[PART + name][i] = episode.score.parts.get(name, np.nan)
    return Rollout(arrays, group_size)


def written(
    sampler: TextSampler,
    task: Task,
    chat: Chat,
    problems: Sequence[Problem],
    settings: SamplingConfig,
    seed: int,
    keys: Sequence[str],
    room: int,
    scores: bool = True,
    make: Callable[[], Environment] | None = None,
    keep_experts: bool = False,
) -> list[Transcript]:
    """Returns what the model writes for each problem, one answer or an episode of `make`, scored if `scores` is True.

    `room` is the number of tokens that an episode may have, with its prompt.
    """

    def continued(prompts: Sequence[list[int]], keys: Sequence[str]) -> list[Completion]:
        limit = task.max_new_tokens
        return sampler.continued(prompts, limit, settings, seed, chat.stop_ids, keys, keep_experts)

    if make is not None:
        return play(task, problems, keys, make, chat, continued, room)
    prompts = [chat.render_prompt(problem.messages) for problem in problems]
    completions = continued(prompts, keys)
    found = [Transcript(*one) for one in zip(problems, prompts, strict=True)]
    for episode, completion in zip(found, completions, strict=True):
        episode.wrote(completion)
        episode.stopped = completion.stopped
    if scores:
        for episode, score in zip(found, judge(task, chat, problems, completions), strict=True):
            episode.score = score
    return found


def judge(task: Task, chat: Chat, problems: Sequence[Problem], completions: Sequence[Completion]) -> list[TaskScore]:
    """Returns the task's score of each completion, or 0 if it was cut before it closed its turn."""
    closed = [i for i, completion in enumerate(completions) if completion.stopped]
    attempts = [Attempt(problems[i], chat.decode_answer(completions[i].tokens)) for i in closed]
    scores = [truncated(task, problem) for problem in problems]
    for i, score in zip(closed, task.score(attempts), strict=True):
        scores[i] = score
    return scores


def _empty(samples: int, seq_length: int, pad_id: int) -> dict[str, np.ndarray]:
    shape = (samples, seq_length)
    return {
        "tokens": np.full(shape, pad_id, np.int32),
        "labels": np.zeros(shape, np.int32),
        "mask": np.zeros(shape, bool),
        "lengths": np.zeros(samples, np.int32),
        "prompts": np.zeros(samples, np.int64),
        "scores": np.full(samples, np.nan, np.float32),
        "stopped": np.zeros(samples, bool),
        "rollout_logprobs": np.zeros(shape, np.float32),
    }


def _fill(arrays: dict[str, Any], i: int, episode: Transcript, seq_length: int) -> None:
    whole, start = [*episode.prompt, *episode.tokens], len(episode.prompt)
    inputs = len(whole) - 1  # the last token is a label and never an input
    if inputs > seq_length:
        raise ValueError(
            f"a prompt of {start} and a completion of {len(episode.tokens)} tokens do not fit into "
            f"train.seq_length = {seq_length}; raise it, or lower task.max_new_tokens"
        )
    answer = slice(start - 1, inputs)  # position t predicts token t + 1
    arrays["tokens"][i, :inputs], arrays["lengths"][i], arrays["stopped"][i] = whole[:-1], inputs, episode.stopped
    arrays["mask"][i, answer] = episode.learnt
    arrays["labels"][i, answer] = np.where(episode.learnt, episode.tokens, 0)
    arrays["rollout_logprobs"][i, answer] = episode.logprobs
