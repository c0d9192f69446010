"""Every formula of post-training held against published numbers: one table, a row for each.

The numbers are those of the unit tests of NeMo-RL, TRL and verl and of hand calculations; `BASE` is the input that most
of them share. A row is a name, a function without arguments, and what it must return.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.algorithms.advantages import AdvantageDialect, group_advantages
from posttrain.algorithms.aggregation import Aggregation, aggregate, step_factor, token_weight
from posttrain.algorithms.kl import NEMO_CLAMP, KLEstimator, kl_estimate
from posttrain.algorithms.normalisation import whiten
from posttrain.algorithms.policy import TokenLoss, cispo, gspo, ppo_clip
from posttrain.algorithms.reward_shaping import overlong_penalty
from posttrain.algorithms.rollout_correction import Correction, Level, rollout_weights
from posttrain.algorithms.token_batch import TokenBatch
from posttrain.algorithms.value_loss import gae, value_loss
from posttrain.preference.preference_losses import Pairs, kl_reference_point, kto, pair_loss
from posttrain.reward_model.reward_losses import bradley_terry


def batch(ratios: list[float], advantages: list[float], **more: list[float]) -> TokenBatch:
    """Returns one sequence of tokens whose old log-probability is -1."""
    old = torch.full((1, len(ratios)), -1.0)
    return TokenBatch(
        logprobs=old + torch.tensor([ratios]).log(),
        mask=torch.ones(1, len(ratios), dtype=torch.bool),
        sequences=torch.zeros(1, len(ratios), dtype=torch.int64),
        old_logprobs=old,
        advantages=torch.tensor([advantages]),
        **{name: torch.tensor([values]) for name, values in more.items()},
    )


BASE = batch([0.5, 1.0, 1.5], [1.0, -1.0, 2.0], rollout_logprobs=[-0.5, -1.5, -0.8])


def mean(found: TokenLoss, weights: Tensor | float = 1.0) -> Tensor:
    return (found.loss * weights).mean()


def corrected(level: Level, **bounds: Any) -> Tensor:
    return rollout_weights(BASE, Correction.TRUNCATE, level, **bounds).factor


def advantages(dialect: str) -> Tensor:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    return group_advantages(rewards, torch.ones_like(rewards, dtype=torch.bool), AdvantageDialect(dialect))[0]


def kl(logprobs: list[float], reference: list[float], estimator: str, clamp: float | None = None) -> Tensor:
    return kl_estimate(torch.tensor(logprobs), torch.tensor(reference), KLEstimator(estimator), clamp)


def gae_batch(values: list[float], rewards: list[float], mask: list[int]) -> TokenBatch:
    found = batch([1.0] * len(values), [0.0] * len(values), values=values, rewards=rewards)
    return found.but(mask=torch.tensor([mask]).bool())


PLAIN = gae_batch([0.5, 0.6, 0.7], [0.0, 0.0, 1.0], [1, 1, 1])
GAP = gae_batch([0.1, 0.2, 999.0, 0.4, 0.5], [0.0, 0.0, 0.0, 0.0, 1.0], [1, 1, 0, 1, 1])

ROWS = torch.tensor([[1.0, 3.0, 0.0, 0.0], [4.0, 4.0, 4.0, 4.0]])
ROW_MASK = torch.tensor([[True, True, False, False], [True] * 4])
ROW_BATCH = TokenBatch(torch.zeros(2, 4), ROW_MASK, torch.tensor([[0] * 4, [1] * 4]))


def averaged(aggregation: str) -> Tensor:
    return aggregate(ROWS, ROW_BATCH, Aggregation(aggregation), max_length=4)


def averaged_by_the_trainer(aggregation: str) -> float:
    """Sums numerator and denominator over micro-batches of one row and divides at the end, as the trainer does."""
    kind, above, below = Aggregation(aggregation), 0.0, 0.0
    for row, mask in zip(ROWS, ROW_MASK, strict=True):
        weight = token_weight(int(mask.sum()), kind)
        above += weight * float(row[mask].sum())
        below += weight * int(mask.sum())
    return above / below * step_factor(tokens=6, completions=2, max_length=4, aggregation=kind)


def critic(clip: float) -> Tensor:
    found = batch([1.0, 1.0], [0.0, 0.0], values=[1.0, 2.0], old_values=[0.5, 0.5], returns=[0.0, 3.0])
    return mean(value_loss(found, clip))


def preference(name: str, **numbers: float) -> Tensor:
    """Returns the loss of one pair: log-ratios +1 and -.5, log-probabilities -2 of 4 tokens and -6 of 6."""
    chosen, rejected = torch.tensor([-2.0]), torch.tensor([-6.0])
    pairs = Pairs(chosen, rejected, chosen - 1.0, rejected + 0.5, torch.tensor([4.0]), torch.tensor([6.0]))
    return pair_loss(name, **numbers)(pairs)[0]


def kto_losses(z0: float, **weights: float) -> Tensor:
    return kto(torch.tensor([1.0, -0.5]), torch.tensor([True, False]), z0, 0.1, **weights)


VECTORS: list[tuple[str, Callable[[], Any], Any]] = [
    ("PPO clip, token by token", lambda: ppo_clip(BASE).loss[0], [-0.5, 1.0, -2.4]),
    ("PPO clip", lambda: mean(ppo_clip(BASE)), -0.633333),
    ("clip-higher .28", lambda: mean(ppo_clip(BASE, high=0.28)), -0.686667),
    ("dual clip 3", lambda: mean(ppo_clip(batch([0.5, 1.0, 10.0], [1.0, -1.0, -4.0]), dual=3.0)), 4.166667),
    ("GSPO", lambda: mean(gspo(BASE, 0.2, 0.2)), -0.605707),
    ("GSPO with rollout weight", lambda: mean(gspo(BASE, 0.2, 0.2), corrected(Level.SEQUENCE)), -0.495911),
    (
        "GSPO with rollout weight truncated at .8",
        lambda: mean(gspo(BASE, 0.2, 0.2), corrected(Level.SEQUENCE, high=0.8)),
        -0.484565,
    ),
    ("token rollout weight", lambda: mean(ppo_clip(BASE), corrected(Level.TOKEN)), -0.206499),
    (
        "token rollout weight truncated at .8",
        lambda: mean(ppo_clip(BASE), corrected(Level.TOKEN, high=0.8)),
        -0.474422,
    ),
    ("CISPO within 1 +- .2", lambda: mean(cispo(BASE, 0.8, 1.2)), 0.593800),
    ("CISPO at most 5", lambda: mean(cispo(BASE, highest=5.0)), 0.543393),
    ("CISPO at most 1.272", lambda: mean(cispo(BASE, highest=1.272)), 0.453023),
    ("k3 at beta .1", lambda: 0.1 * kl([0.0, -1.0, -2.0], [-1.0] * 3, "k3").mean(), 0.036205),
    ("k1", lambda: kl([-1.0] * 3, [0.0, -15.0, -30.0], "k1"), [-1.0, 14.0, 29.0]),
    ("k2", lambda: kl([-1.0] * 3, [0.0, -15.0, -30.0], "k2"), [0.5, 98.0, 420.5]),
    ("k3", lambda: kl([-1.0] * 3, [0.0, -15.0, -30.0], "k3"), [0.718282, 13.000001, 28.0]),
    ("k3, clamped", lambda: kl([-1.0] * 3, [0.0, -15.0, -30.0], "k3", NEMO_CLAMP), [0.718282, 10.0, 10.0]),
    ("GRPO of verl", lambda: advantages("grpo@verl"), [1.499997] + [-0.499999] * 3),
    ("GRPO of TRL", lambda: advantages("grpo@trl"), [1.4997] + [-0.4999] * 3),
    ("GRPO of NeMo-RL", lambda: advantages("grpo@nemo"), [1.0] + [-0.577349] * 3),
    ("Dr.GRPO", lambda: advantages("dr_grpo"), [0.75] + [-0.25] * 3),
    ("RLOO", lambda: advantages("rloo"), [1.0] + [-0.333333] * 3),
    ("GAE advantages", lambda: gae(PLAIN)[0][0], [0.46575, 0.385, 0.3]),
    ("GAE returns", lambda: gae(PLAIN)[1][0], [0.96575, 0.985, 1.0]),
    ("GAE whitened", lambda: whiten(gae(PLAIN)[0], PLAIN.mask)[0], [0.991344, 0.017092, -1.008436]),
    ("GAE with a gap", lambda: gae(GAP, 0.99, 0.95)[0][0], [0.782324, 0.727618, 0.0, 0.56525, 0.5]),
    (
        "overlong penalty",
        lambda: overlong_penalty(torch.tensor([10, 22, 25, 30]), longest=25, buffer=5, penalty=0.5),
        [0.0, -0.2, -0.5, -0.5],
    ),
    ("token mean", lambda: averaged("token_mean"), 3.333333),
    ("sequence mean", lambda: averaged("sequence_mean"), 3.0),
    ("fixed length", lambda: averaged("fixed_length"), 2.5),
    ("token mean at micro-batch 1", lambda: averaged_by_the_trainer("token_mean"), 3.333333),
    ("sequence mean at micro-batch 1", lambda: averaged_by_the_trainer("sequence_mean"), 3.0),
    ("fixed length at micro-batch 1", lambda: averaged_by_the_trainer("fixed_length"), 2.5),
    ("value loss, clip .5", lambda: critic(0.5), 1.25),
    ("value loss, clip .2", lambda: critic(0.2), 1.5725),
    ("Bradley-Terry", lambda: bradley_terry(torch.tensor(1.0), torch.tensor(-0.5)), 0.201413),
    ("Bradley-Terry, margin .3", lambda: bradley_terry(torch.tensor(1.0), torch.tensor(-0.5), 0.3), 0.263282),
    ("DPO", lambda: preference("dpo", beta=0.1), 0.620957),
    ("conservative DPO", lambda: preference("conservative", beta=0.1, smoothing=0.1), 0.635957),
    ("robust DPO", lambda: preference("robust", beta=0.1, smoothing=0.1), 0.602207),
    ("hinge", lambda: preference("hinge", beta=0.1), 0.85),
    ("IPO, summed", lambda: preference("ipo", beta=0.1), 12.25),  # (1.5 - 5)^2
    ("IPO, per token", lambda: preference("ipo_mean", beta=0.1), 21.777778),  # (1/4 + 1/12 - 5)^2
    # Per token the log-probabilities are -.5 and -1, the log-odds .432752 and -.541325.
    ("ORPO", lambda: preference("orpo", beta=0.1), 0.532030),
    ("SimPO", lambda: preference("simpo", beta=2.0, margin=1.0), 0.693147),  # 2 (-.5 + 1) - 1 = 0
    ("DPO with SFT", lambda: preference("dpo", beta=0.1, sft_weight=0.5), 0.870957),  # + .5 * 2 / 4
    ("KTO at z0 = 0", lambda: kto_losses(0.0), [0.475021, 0.487503]),
    ("KTO at z0 = 2", lambda: kto_losses(2.0, undesirable_weight=1.5), [0.524979, 0.656734]),
    ("KTO's reference point", lambda: kl_reference_point((3.0 - 1.0) / 2), 1.0),
    ("KTO's reference point is not negative", lambda: kl_reference_point((-3.0 - 1.0) / 2), 0.0),
]


@pytest.mark.parametrize(("found", "expected"), [v[1:] for v in VECTORS], ids=[v[0] for v in VECTORS])
def test_vector(found: Callable[[], Any], expected: Any) -> None:
    value = torch.as_tensor(found(), dtype=torch.float32)
    torch.testing.assert_close(value, torch.as_tensor(expected, dtype=torch.float32), atol=2e-6, rtol=2e-6)
