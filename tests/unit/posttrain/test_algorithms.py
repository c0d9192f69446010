"""Policy optimization compared with published test vectors and with numbers computed by hand."""

import pytest
import torch

from posttrain.algorithms.advantages import AdvantageDialect, equal_groups, group_advantages
from posttrain.algorithms.aggregation import Aggregation, step_factor, token_weight
from posttrain.algorithms.policy import KLEstimator, clipped_policy_loss, clipped_share, kl_estimate

OLD = torch.tensor([-1.0, -1.0, -1.0])


def logprobs_at(*ratios: float) -> torch.Tensor:
    return OLD + torch.tensor(ratios).log()


def advantages_of(rewards: list[list[float]], dialect: str, scored: list[list[bool]] | None = None) -> torch.Tensor:
    rewards_PG = torch.tensor(rewards)
    known = torch.ones_like(rewards_PG, dtype=torch.bool) if scored is None else torch.tensor(scored)
    return group_advantages(rewards_PG, known, AdvantageDialect(dialect))


@pytest.mark.parametrize(
    ("dialect", "winner", "loser"),
    [
        ("grpo@verl", 1.499997, -0.499999),
        ("grpo@trl", 1.4997, -0.4999),
        ("grpo@nemo", 1.0, -0.577349),
        ("dr_grpo", 0.75, -0.25),
        ("rloo", 1.0, -0.333333),
    ],
)
def test_advantages_of_one_winner_in_four(dialect: str, winner: float, loser: float) -> None:
    advantages = advantages_of([[1.0, 0.0, 0.0, 0.0]], dialect)
    torch.testing.assert_close(advantages, torch.tensor([[winner, loser, loser, loser]]), atol=2e-6, rtol=0)


def test_advantages_by_hand() -> None:
    # r = [3, 1, 2]: mean 2, deviations [1, -1, 0], variance (1 + 1 + 0) / 2 = 1, so sigma = 1.
    trl = advantages_of([[3.0, 1.0, 2.0]], "grpo@trl")
    torch.testing.assert_close(trl, torch.tensor([[1.0, -1.0, 0.0]]) / 1.0001, atol=1e-7, rtol=0)
    # RLOO: 3 - (1+2)/2, 1 - (3+2)/2, 2 - (3+1)/2.
    rloo = advantages_of([[3.0, 1.0, 2.0]], "rloo")
    torch.testing.assert_close(rloo, torch.tensor([[1.5, -1.5, 0.0]]), atol=1e-7, rtol=0)
    # NeMo: the others of 3 are [1, 2]: mean 1.5, sigma sqrt(.5); of 1: [3, 2], 2.5, sqrt(.5); of 2: mean 2,
    # so 0.
    nemo = advantages_of([[3.0, 1.0, 2.0]], "grpo@nemo")
    expected = 1.5 / (0.5**0.5 + 1e-6)
    torch.testing.assert_close(nemo, torch.tensor([[expected, -expected, 0.0]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dialect", list(AdvantageDialect))
def test_groups_of_equal_reward_teach_nothing(dialect: AdvantageDialect) -> None:
    # 0.1 has no exact mean in fp32: divided by an epsilon of 1e-6 its rounding error would be an advantage
    # of 0.007.
    rewards = [[0.1] * 7, [0.0] * 7, [1.0] * 7]
    assert advantages_of(rewards, dialect).eq(0).all()
    known = torch.ones(3, 7, dtype=torch.bool)
    assert equal_groups(torch.tensor(rewards), known).all()


@pytest.mark.parametrize("dialect", list(AdvantageDialect))
def test_groups_do_not_touch_each_other(dialect: AdvantageDialect) -> None:
    together = advantages_of([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.25, 0.5]], dialect)
    alone = torch.cat([advantages_of([[1.0, 0.0, 0.0, 1.0]], dialect), advantages_of([[0.0, 0.0, 0.25, 0.5]], dialect)])
    torch.testing.assert_close(together, alone, atol=0, rtol=0)


@pytest.mark.parametrize("dialect", list(AdvantageDialect))
def test_an_unscorable_sample_is_not_a_zero(dialect: AdvantageDialect) -> None:
    with_gap = advantages_of([[1.0, 0.0, 0.0, 0.0]], dialect, [[True, True, False, True]])
    without = advantages_of([[1.0, 0.0, 0.0]], dialect)
    assert with_gap[0, 2] == 0
    torch.testing.assert_close(with_gap[:, [0, 1, 3]], without, atol=1e-6, rtol=0)
    alone = advantages_of([[1.0, 0.0]], dialect, [[True, False]])
    assert alone.eq(0).all()


def test_shapes_of_advantages_are_checked() -> None:
    with pytest.raises(ValueError, match=r"\[4\]"):
        group_advantages(torch.zeros(4), torch.ones(4, dtype=torch.bool), AdvantageDialect.RLOO)


def test_ppo_clip() -> None:
    ratios, advantages = (0.5, 1.0, 1.5), torch.tensor([1.0, -1.0, 2.0])
    loss = clipped_policy_loss(logprobs_at(*ratios), OLD, advantages)
    # token by token: min(.5, .8) = .5; -1; min(3, 1.2 * 2) = 2.4
    torch.testing.assert_close(loss, torch.tensor([-0.5, 1.0, -2.4]), atol=1e-6, rtol=0)
    assert loss.mean().item() == pytest.approx(-0.6333, abs=5e-5)
    higher = clipped_policy_loss(logprobs_at(*ratios), OLD, advantages, clip_high=0.28)
    assert higher.mean().item() == pytest.approx(-0.686667, abs=1e-6)
    clipped = clipped_share(logprobs_at(*ratios), OLD, advantages, 0.2, 0.2)
    assert clipped.tolist() == [False, False, True]


def test_dual_clip() -> None:
    lp, advantages = logprobs_at(0.5, 1.0, 10.0), torch.tensor([1.0, -1.0, -4.0])
    assert clipped_policy_loss(lp, OLD, advantages, dual_clip=3.0).mean().item() == pytest.approx(4.1667, abs=5e-5)
    assert clipped_policy_loss(lp, OLD, advantages).mean().item() == pytest.approx((-0.5 + 1 + 40) / 3, abs=1e-4)


def test_policy_gradient_on_policy_is_minus_advantage() -> None:
    # At ratio 1, d loss / d logprob = -A: the plain policy gradient. Past the clip it is 0.
    advantages = torch.tensor([1.0, -2.0, 3.0])
    lp = OLD.clone().requires_grad_()
    clipped_policy_loss(lp, OLD, advantages).sum().backward()
    torch.testing.assert_close(lp.grad, -advantages)
    far = logprobs_at(1.5, 0.5, 1.5).requires_grad_()
    clipped_policy_loss(far, OLD, advantages).sum().backward()
    assert far.grad is not None and far.grad.eq(0).all()


def test_kl_estimators() -> None:
    lp, reference = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([0.0, -15.0, -30.0])
    expected = {"k1": [-1, 14, 29], "k2": [0.5, 98, 420.5], "k3": [0.7183, 13, 28]}
    for name, values in expected.items():
        kl = kl_estimate(lp, reference, KLEstimator(name))
        torch.testing.assert_close(kl, torch.tensor(values, dtype=torch.float32), atol=5e-5, rtol=0)
    clamped = kl_estimate(lp, reference, KLEstimator.K3, clamp=10.0)
    torch.testing.assert_close(clamped, torch.tensor([0.7183, 10.0, 10.0]), atol=5e-5, rtol=0)
    k3 = kl_estimate(torch.tensor([0.0, -1.0, -2.0]), torch.full((3,), -1.0), KLEstimator.K3)
    assert 0.1 * k3.mean().item() == pytest.approx(0.0362, abs=5e-5)


ROWS = [[1.0, 3.0], [4.0, 4.0, 4.0, 4.0]]


@pytest.mark.parametrize(("mode", "expected"), [("token_mean", 10 / 3), ("sequence_mean", 3.0), ("fixed_length", 2.5)])
def test_aggregation(mode: str, expected: float) -> None:
    aggregation = Aggregation(mode)
    # As in the trainer, numerator and denominator are summed over all rows before the division.
    weights = [token_weight(len(row), aggregation) for row in ROWS]
    weighted = sum(weight * sum(row) for weight, row in zip(weights, ROWS, strict=True))
    mean = weighted / sum(weight * len(row) for weight, row in zip(weights, ROWS, strict=True))
    factor = step_factor(tokens=6, completions=2, max_length=4, aggregation=aggregation)
    assert mean * factor == pytest.approx(expected, abs=1e-6)
