"""Sampling that the ranks of a run divide between them, for RL, online preferences and distillation alike."""

from collections.abc import Callable
from typing import Protocol

from posttrain.chat.format_interface import Chat
from posttrain.rl.policy_copy import PolicyCopy
from posttrain.rl.rollout import Rollout, sample
from posttrain.tasks.episode_environment import Environment
from posttrain.tasks.task import Task
from pretrain.parallel.rank_messages import gather_rows


class SampledTask(Protocol):
    """Task and settings of sampling; a seed and the number of a sample fix its prompt and its draws."""

    @property
    def task(self) -> Task: ...

    @property
    def chat(self) -> Chat: ...

    @property
    def temperature(self) -> float: ...

    @property
    def seed(self) -> int: ...


def sample_together(
    policy: PolicyCopy,
    sampling: SampledTask,
    numbers: range,
    group_size: int,
    seq_length: int,
    scores: bool = True,
    make: Callable[[], Environment] | None = None,
    keep_experts: bool = False,
) -> Rollout:
    """Samples the completions `numbers` of a run, a share of them on each rank; every rank gets all. Collective.

    Ranks that hold parts of one model sample the same share, and only the one that leads scores it. See `sample`.
    """
    own = policy.share(len(numbers))
    found = sample(
        policy.text_sampler,
        sampling.task,
        sampling.chat,
        sampling.temperature,
        sampling.seed,
        numbers[own.start : own.stop],
        group_size,
        seq_length,
        scores and policy.leads,
        make,
        keep_experts,
    )
    spoken = found.arrays if policy.leads else {name: array[:0] for name, array in found.arrays.items()}
    return Rollout(gather_rows(spoken), group_size)
