"""Rollouts of which a part could not be scored: no reward of 0, no gradient, and no end of the run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from configs.loader import Failure
from configs.rl import OVER_ROLLOUT, RLSection
from configs.train import TrainSection
from posttrain.algorithms.aggregation import Aggregation
from posttrain.algorithms.dialects import DIALECTS
from posttrain.chat.chat_format import ChatFormat
from posttrain.rl import rollout_source
from posttrain.rl.critic import Critic, ValueLoss
from posttrain.rl.group_credit import GroupCredit
from posttrain.rl.logprob_check import LogprobCheck
from posttrain.rl.policy_copy import PolicyCopy
from posttrain.rl.policy_loss import PolicyLoss
from posttrain.rl.rollout import Rollout, _empty
from posttrain.rl.rollout_source import RolloutSource, SamplingPlan
from posttrain.tasks.sorting import SortTask
from pretrain.data.batch_source import collate

SAMPLES, LENGTH, GROUP = 8, 6, 4


def made(scores: list[float]) -> Rollout:
    """Returns a rollout of completions of 2 and 3 tokens with these scores."""
    arrays = _empty(len(scores), LENGTH, 0)
    for i, score in enumerate(scores):
        arrays["lengths"][i], arrays["scores"][i], arrays["prompts"][i] = 4 + i % 2, score, i // GROUP
        arrays["mask"][i, 2 : 4 + i % 2], arrays["labels"][i, 2 : 4 + i % 2] = True, 5
        arrays["rollout_logprobs"][i] = np.where(arrays["mask"][i], -1.0 - i, 0)
    return Rollout(arrays, GROUP)


def source(chat: ChatFormat, folder: Path, aggregation: str = "token_mean", **rl: Any) -> RolloutSource:
    train = TrainSection(steps=2, global_batch_size=4, micro_batch_size=2, seq_length=LENGTH)
    settings = RLSection(rollout_batch=2, **rl)
    sampling = SamplingPlan(SortTask(3, max_new_tokens=6), chat, GROUP, 1.0, 3)
    credit = GroupCredit(DIALECTS["grpo@trl"], settings, 6)
    kind = Aggregation(aggregation)
    return RolloutSource(sampling, settings, train, folder, credit, kind, PolicyCopy(), LogprobCheck(1.0))


@pytest.mark.parametrize("aggregation", Aggregation)
def test_a_step_of_which_nothing_could_be_scored_has_no_gradient(
    chat: ChatFormat, tmp_path: Path, aggregation: str
) -> None:
    own = source(chat, tmp_path, aggregation, kl="loss")
    own._mesh = SimpleNamespace(layout=SimpleNamespace(dp=1), dp_rank=0)  # type: ignore[assignment]
    unknown, known = own.phases.minibatch(0), own.phases.minibatch(1)
    scores = [float("nan") if i in unknown else float(i % 3) for i in range(SAMPLES)]
    rollout = made(scores)
    old = rollout.rollout_logprobs
    own._rollout = own.credit(rollout.plus(old_logprobs=old, ref_logprobs=old - 1), None)  # type: ignore[arg-type]
    for step, has_gradient in ((0, False), (1, True)):
        own._step = step
        batch = collate(own.rows(range(4)))
        assert batch.loss_mask.sum() > 0, "the trainer refuses a step without weight"
        logprobs = (batch.extra["rollout_logprobs"] + 0.1).requires_grad_()
        loss, metrics = PolicyLoss(DIALECTS["grpo@trl"].policy, own.settings, 1.0)(logprobs, batch)
        (grad,) = torch.autograd.grad((loss * batch.loss_mask).sum(), logprobs)
        assert bool(grad.any()) == has_gradient and loss.isfinite().all() and grad.isfinite().all()
        assert all(bool(value.any()) <= has_gradient for value in metrics.values())
        batch.extra.update(old_values=logprobs.detach(), returns=logprobs.detach() + 1)  # type: ignore[attr-defined]
        assert bool(ValueLoss(None)(logprobs, batch)[0].any()) == has_gradient
    assert sorted([*unknown, *known]) == list(range(SAMPLES))


def test_a_critic_learns_from_every_group_with_a_score() -> None:
    critic, rollout = Critic.__new__(Critic), made([1.0, 1.0, float("nan"), float("nan")])
    assert critic.equal_groups(Rollout(rollout.arrays, 1)).tolist() == [False, False, True, True]
    assert critic.equal_groups(Rollout(rollout.arrays, 2)).tolist() == [False, True]


def test_a_dialect_over_the_whole_rollout_learns_from_groups_of_equal_rewards() -> None:
    """Holds what counts as nothing to learn from against the advantages themselves, with and without a baseline."""
    nan = float("nan")
    for dialect, scores, expected in (
        ("reinforce_pp", [1.0, 1.0, 0.0, 0.0], [False, False]),
        ("reinforce_pp@verl", [1.0, 1.0, nan, nan], [True, True]),
        ("reinforce_pp", [1.0, 0.0, nan, nan], [False, True]),
        ("reinforce_pp_baseline", [1.0, 1.0, 1.0, 0.0], [True, False]),
        ("grpo@trl", [1.0, 1.0, 0.0, 0.0], [True, True]),
    ):
        credit = GroupCredit(DIALECTS[dialect], RLSection(), 4)
        rollout = Rollout(made(scores).arrays | {"prompts": np.array([0, 0, 1, 1])}, 2)
        assert credit.equal_groups(rollout).tolist() == expected, dialect
        if dialect != "reinforce_pp_baseline":  # its last step is a mean over tokens, which is not that over samples
            advantages = credit(rollout, None).advantages  # type: ignore[arg-type]
            assert [not advantages[first : first + 2].any() for first in (0, 2)] == expected, dialect
    assert {name for name, one in DIALECTS.items() if one.over_rollout} == set(OVER_ROLLOUT)


def test_a_run_ends_only_if_nothing_of_a_rollout_can_be_scored(
    chat: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draws a group of equal rewards, another, and, in its place, one that cannot be scored at all."""
    nan, useful = float("nan"), [0.0, 1.0, 0.0, 1.0]
    drawn = [[*useful, *[0.0] * 4], [nan] * 4, [nan] * 4]
    monkeypatch.setattr(rollout_source, "sample_together", lambda *args, **options: made(drawn.pop(0)))
    rollout, metrics = source(chat, tmp_path, max_draws=2, replay_experts=False)._sampled()
    assert rollout.scores.tolist() == [*useful, *[0.0] * 4] and metrics["unscorable"] == (8, 16) and not drawn
    drawn += [[nan] * 8]
    with pytest.raises(Failure, match=r"could score none of the 8 .* prompts 0 to 1; mend its reward, and run the"):
        source(chat, tmp_path, replay_experts=False)._sampled()
