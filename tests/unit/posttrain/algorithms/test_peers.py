"""Losses and their gradients on random tokens, beside the formulas of TRL, verl, OpenRLHF and NeMo-RL written out.

Rows have completions, some of them empty, one token long, far from the old policy, or at it.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from posttrain.algorithms.aggregation import Aggregation, aggregate
from posttrain.algorithms.normalisation import whiten
from posttrain.algorithms.policy import TokenLoss, cispo, gspo, ppo_clip
from posttrain.algorithms.token_batch import TokenBatch
from posttrain.algorithms.value_loss import gae, value_loss

ROWS, LENGTH = 8, 9
KINDS = ("plain", "gap", "far", "on policy")
Formula = Callable[[Tensor, TokenBatch], Tensor]  # of the trained numbers and the batch, to losses of tokens


def drawn(kind: str) -> TokenBatch:
    """Returns random numbers; those outside the mask are NaN, which no loss may read."""
    noise = torch.Generator().manual_seed(len(kind))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise, dtype=torch.float64)

    lengths = torch.tensor([0, 1, 1, 9, 4, 7, 2, 0])
    mask = torch.arange(LENGTH) < lengths[:, None]
    if kind == "gap":
        mask &= torch.rand(ROWS, LENGTH, generator=noise) > 0.3
    old = -normal(ROWS, LENGTH).abs()
    apart = {"far": 60.0 * normal(ROWS, LENGTH).sign(), "on policy": torch.zeros(ROWS, LENGTH)}
    logprobs = old + apart.get(kind, 0.3 * normal(ROWS, LENGTH))
    names = ("advantages", "rewards", "values", "old_values", "returns")
    numbers = {"logprobs": logprobs, "old_logprobs": old} | {name: normal(ROWS, LENGTH) for name in names}
    sequences = (torch.arange(ROWS) * LENGTH)[:, None].expand(ROWS, LENGTH)
    return TokenBatch(
        mask=mask, sequences=sequences, **{name: torch.where(mask, x, torch.nan) for name, x in numbers.items()}
    )


def log_ratio(x: Tensor, batch: TokenBatch) -> Tensor:
    return (x - batch.need("old_logprobs")).clamp(-20, 20)  # as verl limits it


def of_ppo(dual: float | None) -> Formula:
    def formula(x: Tensor, batch: TokenBatch) -> Tensor:
        advantages, ratio = batch.need("advantages"), log_ratio(x, batch).exp()
        larger = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.28))
        if dual is None:
            return larger
        return torch.where(advantages < 0, torch.minimum(-advantages * dual, larger), larger)

    return formula


def of_gspo(x: Tensor, batch: TokenBatch) -> Tensor:
    """Computes one ratio for each row, as TRL does, in place of a ratio whose gradient is that of each token."""
    mask, advantages, free = batch.mask, batch.need("advantages")[:, :1], x - batch.need("old_logprobs")
    limited = free + (log_ratio(x, batch) - free).detach()  # the limit is on the ratio, and not on its gradient
    ratio = ((limited * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).expand_as(x)


def of_cispo(x: Tensor, batch: TokenBatch) -> Tensor:
    return -log_ratio(x, batch).exp().clamp(0.0, 5.0).detach() * batch.need("advantages") * x


def of_values(x: Tensor, batch: TokenBatch) -> Tensor:
    old, returns = batch.need("old_values"), batch.need("returns")
    clipped = old + (x - old).clamp(-0.2, 0.2)
    return torch.maximum((x - returns).square(), (clipped - returns).square()) / 2


CASES: dict[str, tuple[Callable[[TokenBatch], TokenLoss], Formula]] = {
    "PPO": (lambda batch: ppo_clip(batch, 0.2, 0.28), of_ppo(None)),
    "PPO with dual clip": (lambda batch: ppo_clip(batch, 0.2, 0.28, 3.0), of_ppo(3.0)),
    "GSPO": (lambda batch: gspo(batch, 0.2, 0.2), of_gspo),
    "CISPO": (cispo, of_cispo),
    "values": (value_loss, of_values),
}


def mean_of(losses: Tensor, mask: Tensor, aggregation: Aggregation) -> Tensor:
    losses, lengths = torch.where(mask, losses, 0.0), mask.sum(1)
    if aggregation == Aggregation.TOKEN_MEAN:
        return losses.sum() / lengths.sum()
    rows = (lengths > 0).sum()
    if aggregation == Aggregation.SEQUENCE_MEAN:
        return (losses.sum(1) / lengths.clamp(min=1)).sum() / rows
    return losses.sum() / (rows * LENGTH)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_the_formula(name: str, kind: str) -> None:
    own, formula = CASES[name]
    batch, trained = drawn(kind), "values" if name == "values" else "logprobs"
    if name == "GSPO":  # one advantage for each row, as a ratio of a row has
        batch = batch.but(advantages=batch.need("advantages").sum(1, keepdim=True).expand(ROWS, LENGTH))
    for aggregation in Aggregation:
        ours, theirs = (batch.need(trained).clone().requires_grad_() for _ in range(2))
        loss = aggregate(own(batch.but(**{trained: ours})).loss, batch, aggregation, LENGTH)
        expected = mean_of(formula(theirs, batch), batch.mask, aggregation)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs))


@pytest.mark.parametrize("kind", ["plain", "gap"])
def test_advantages_of_a_critic_are_those_of_the_loop(kind: str) -> None:
    batch = drawn(kind)
    values, rewards, found = batch.need("old_values"), batch.need("rewards"), torch.zeros(ROWS, LENGTH).double()
    for row in range(ROWS):
        later_value = later = 0.0
        for t in reversed(batch.mask[row].nonzero()[:, 0].tolist()):
            delta = float(rewards[row, t]) + 0.99 * later_value - float(values[row, t])
            later_value, later = float(values[row, t]), delta + 0.99 * 0.95 * later
            found[row, t] = later
    advantages, returns = gae(batch, 0.99, 0.95)
    torch.testing.assert_close(advantages, found)
    torch.testing.assert_close(returns, torch.where(batch.mask, found + values, 0.0))
    kept = found[batch.mask]
    torch.testing.assert_close(
        whiten(advantages, batch.mask)[batch.mask], (kept - kept.mean()) * (kept.var() + 1e-8).rsqrt()
    )
