"""Properties of the losses and advantages that no single number shows: gradients, packing, ranks, unusable values."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.loader import ConfigError
from posttrain.algorithms import compare_dialects
from posttrain.algorithms.advantages import (
    AdvantageDialect,
    batch_normalised,
    decoupled_sums,
    equal_groups,
    group_advantages,
)
from posttrain.algorithms.aggregation import aggregate
from posttrain.algorithms.dialects import DIALECTS
from posttrain.algorithms.kl import KLEstimator, Sampling, kl_estimate, kl_penalty, rewards_with_kl
from posttrain.algorithms.normalisation import Moments, whiten
from posttrain.algorithms.policy import cispo, gspo, ppo_clip
from posttrain.algorithms.reward_shaping import overlong_penalty, reward_at_last_token
from posttrain.algorithms.rollout_correction import Correction, Level, rollout_weights
from posttrain.algorithms.token_batch import TokenBatch, file_of, sequences_of
from posttrain.algorithms.value_loss import discounted_returns, gae, value_loss

LENGTHS = (5, 3, 4, 2)  # of the completions of two prompts


def advantages_of(rewards: list[list[float]], dialect: str, scored: list[list[bool]] | None = None) -> Tensor:
    rewards_PG = torch.tensor(rewards)
    known = torch.ones_like(rewards_PG, dtype=torch.bool) if scored is None else torch.tensor(scored)
    return group_advantages(rewards_PG, known, AdvantageDialect(dialect))


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
    with pytest.raises(ValueError, match=r"rewards \[4\] and scored \[4\] must both be \[groups, group size\]$"):
        group_advantages(torch.zeros(4), torch.ones(4, dtype=torch.bool), AdvantageDialect.RLOO)


def tokens(**values: list[float]) -> TokenBatch:
    """Returns one sequence with these tensors."""
    found = {name: torch.tensor([row]) for name, row in values.items()}
    mask = torch.ones_like(next(iter(found.values())), dtype=torch.bool)
    return TokenBatch(mask=mask, sequences=torch.zeros(mask.shape, dtype=torch.int64), **found)


def random_batch(layout: list[list[int]], length: int) -> TokenBatch:
    """Returns the same completions whatever the layout, which lists the completions of each row.

    Each completion has a prompt of one token before it and, if it is long enough, a gap at its third token.
    """
    names = ("logprobs", "old_logprobs", "rollout_logprobs", "ref_logprobs", "rewards", "old_values", "returns")
    found = {name: torch.full((len(layout), length), torch.nan) for name in names}
    mask = torch.zeros(len(layout), length, dtype=torch.bool)
    segments, groups = torch.full((2, len(layout), length), -1)
    for row, completions in enumerate(layout):
        start = 0
        for segment, number in enumerate(completions):
            end = start + 1 + LENGTHS[number]
            noise = torch.Generator().manual_seed(number)
            for name in names:
                found[name][row, start + 1 : end] = torch.randn(LENGTHS[number], generator=noise) - 1
            mask[row, start + 1 : end] = True
            mask[row, start + 3] &= LENGTHS[number] < 4
            found["rewards"][row, start + 1 : end - 1] = 0
            segments[row, start:end], groups[row, start:end] = segment, number // 2
            start = end
    found["values"] = found["old_values"] + 0.3
    return TokenBatch(mask=mask, sequences=sequences_of(segments), groups=groups, **found)


@pytest.mark.parametrize("name", DIALECTS)
def test_packing_rows_changes_no_dialect(name: str) -> None:
    """Packs four completions into one row, two and four: loss and gradients are the same, whatever padding holds."""
    results = []
    for layout, length in (([[0], [1], [2], [3]], 6), ([[3, 1], [2, 0]], 13), ([[2, 0, 3, 1]], 20)):
        found = random_batch(layout, length)
        found = found.but(logprobs=found.logprobs.requires_grad_())
        loss, parts = DIALECTS[name].loss(found, max_length=8)
        loss.backward()
        grad = found.logprobs.grad
        assert grad is not None and not grad[~found.mask].any(), "no gradient outside the mask"
        assert not parts.loss[~found.mask].any() and not parts.clipped[~found.mask].any()
        results.append((loss.detach(), grad.square().sum(), parts.clipped.sum()))
    assert results[0][1] > 0
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", DIALECTS)
def test_on_policy_the_gradient_is_minus_the_advantage(name: str) -> None:
    """Tests the sign: a token's loss falls with its log-probability exactly where its advantage is positive."""
    found = random_batch([[0, 1], [2, 3]], 12)
    dialect = DIALECTS[name]
    lp = torch.where(found.mask, found.logprobs, -1.0).requires_grad_()
    found = found.but(logprobs=lp, old_logprobs=lp.detach())
    advantages = dialect.advantages(found)
    loss = dialect.policy(found.but(advantages=advantages)).loss
    loss.sum().backward()
    torch.testing.assert_close(lp.grad, torch.where(found.mask, -advantages, 0.0))


def test_past_the_bound_ppo_has_no_gradient_and_cispo_has() -> None:
    found = tokens(logprobs=[-0.5, -2.0, -1.0], old_logprobs=[-1.0, -1.0, -1.0], advantages=[1.0, -2.0, 3.0])
    for method, expected in ((ppo_clip, [0.0, 0.0, -3.0]), (cispo, [-1.2, 1.6, -3.0])):
        lp = found.logprobs.clone().requires_grad_()
        options = (0.8, 1.2) if method is cispo else ()
        parts = method(found.but(logprobs=lp), *options)
        parts.loss.sum().backward()
        torch.testing.assert_close(lp.grad, torch.tensor([expected]))
        assert parts.clipped.tolist() == [[True, True, False]]


def test_a_token_that_became_impossible_makes_no_nan() -> None:
    found = tokens(logprobs=[-200.0, -0.1], old_logprobs=[-0.1, -200.0], advantages=[1.0, 1.0])
    for method in (ppo_clip, gspo, cispo):
        lp = found.logprobs.clone().requires_grad_()
        loss = method(found.but(logprobs=lp)).loss
        loss.sum().backward()
        assert loss.isfinite().all() and lp.grad is not None and lp.grad.isfinite().all(), method


def test_gspo_of_two_sequences() -> None:
    """Compares two sequences of equal probabilities, of which the second's were lower before (NeMo-RL's test)."""
    lp = torch.tensor([[0.5, 1.0, 1.5]] * 2).log() - 1
    found = TokenBatch(
        lp,
        torch.ones(2, 3, dtype=torch.bool),
        torch.tensor([[0] * 3, [1] * 3]),
        old_logprobs=torch.tensor([[-1.0] * 3, [-2.0] * 3]),
        advantages=torch.tensor([[1.0, -1.0, 2.0]] * 2),
    )
    parts = gspo(found, 0.2, 0.2)
    s = 0.75 ** (1 / 3)
    expected = [[-s, s, -2 * s], [-1.2, 2.4697, -2.4]]
    torch.testing.assert_close(parts.loss, torch.tensor(expected), atol=1e-4, rtol=0)
    assert parts.loss.mean().item() == pytest.approx(-0.4912, abs=1e-4)
    assert parts.clipped.tolist() == [[False] * 3, [True, False, True]]


def test_without_old_logprobs_the_ratio_is_one() -> None:
    found = tokens(logprobs=[-0.3, -2.0], advantages=[1.0, -3.0])
    assert ppo_clip(found).loss.tolist() == [[-1.0, 3.0]]


def test_an_empty_mask_has_loss_zero() -> None:
    found = random_batch([[0, 1]], 12)
    found = found.but(mask=torch.zeros_like(found.mask), advantages=torch.ones_like(found.logprobs))
    for name, dialect in DIALECTS.items():
        assert aggregate(dialect.policy(found).loss, found, dialect.aggregation, 8) == 0, name
        assert not dialect.advantages(found).any(), name
        assert dialect.loss(found, 8)[0] == 0, name


def test_the_gradient_of_the_kl_with_and_without_the_sampling_term() -> None:
    """Compares with the slope of k3 by x = log(policy / reference), 1 - exp(-x); the sampling term adds k3."""
    lp = torch.tensor([[-1.2, -0.7]])
    found = tokens(
        logprobs=[-1.2, -0.7], old_logprobs=[-1.0, -0.8], rollout_logprobs=[-1.5, -0.4], ref_logprobs=[-0.9, -1.1]
    )
    x = lp - found.need("ref_logprobs")
    k3, slope = torch.exp(-x) + x - 1, 1 - torch.exp(-x)
    factor = {"none": 1.0, "score": 1.0}
    factor |= {name: torch.exp(lp - found.need(f"{name}_logprobs")) for name in ("old", "rollout")}
    for sampling in Sampling:
        free = lp.clone().requires_grad_()
        kl = kl_penalty(found.but(logprobs=free), sampling=sampling)
        kl.sum().backward()
        torch.testing.assert_close(kl.detach(), k3 * factor[sampling])
        expected = factor[sampling] * (slope + (0 if sampling == Sampling.NONE else k3))
        torch.testing.assert_close(free.grad, expected)


def test_as_losses_k1_averages_to_nothing_and_k2_to_the_kl() -> None:
    """Averages over all tokens of a distribution: E[d k1] = 0, E[d k2] = d KL, and E[k3] = KL."""
    logits, reference = torch.tensor([0.3, -0.2, 1.0]), torch.tensor([0.1, 0.4, -0.5]).log_softmax(0)
    grads = {}
    for name in ("kl", *KLEstimator):
        free = logits.clone().requires_grad_()
        lp = free.log_softmax(0)
        p = lp.exp() if name == "kl" else lp.exp().detach()
        value = (p * (lp - reference if name == "kl" else kl_estimate(lp, reference, KLEstimator(name)))).sum()
        value.backward()
        grads[name] = free.grad
        if name == "k3":
            torch.testing.assert_close(value, (lp.exp() * (lp - reference)).sum())
    torch.testing.assert_close(grads["k1"], torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(grads["k2"], grads["kl"])


def test_rewards_with_kl_and_returns_by_hand() -> None:
    found = tokens(
        logprobs=[0.0] * 3, old_logprobs=[-1.0, -2.0, -1.0], ref_logprobs=[-2.0, -1.0, -1.5], rewards=[0.0, 0.0, 1.0]
    )
    shaped = rewards_with_kl(found, beta=0.1)  # k1 is 1, -1, .5
    torch.testing.assert_close(shaped, torch.tensor([[-0.1, 0.1, 0.95]]))
    torch.testing.assert_close(discounted_returns(found, shaped), torch.tensor([[0.95, 1.05, 0.95]]))
    torch.testing.assert_close(discounted_returns(found, shaped, 0.5), torch.tensor([[0.1875, 0.575, 0.95]]))


def test_sequences_in_one_row_do_not_bootstrap_from_each_other() -> None:
    packed, apart = random_batch([[0, 1]], 12), random_batch([[0], [1]], 12)
    for together, alone in zip(gae(packed, 0.9, 0.8), gae(apart, 0.9, 0.8), strict=True):
        torch.testing.assert_close(together[packed.mask], alone[apart.mask])


def test_rollout_weights_out_of_bounds() -> None:
    """Drops a token as IcePop does (weights .61, 12.2, .82 within .5 to 5), and whole sequences by a geometric band."""
    found = tokens(logprobs=[-1.0] * 3, rollout_logprobs=[-0.5, -3.5, -0.8])
    weights = torch.exp(torch.tensor([[-0.5, 2.5, -0.2]]))
    masked = rollout_weights(found, Correction.MASK, low=0.5, high=5.0)
    torch.testing.assert_close(masked.factor, weights * torch.tensor([[1.0, 0.0, 1.0]]))
    torch.testing.assert_close(masked.measured, weights)
    assert masked.out_of_bounds.tolist() == [[False, True, False]]
    band = rollout_weights(found, Correction.MASK, low=0.5, high=2.0, bounds_of=Level.GEOMETRIC)  # exp(.6) = 1.82
    torch.testing.assert_close(band.factor, weights)
    assert not rollout_weights(found, Correction.MASK, low=0.5, high=1.8, bounds_of=Level.GEOMETRIC).factor.any()
    reported = rollout_weights(found, Correction.REPORT, high=5.0)
    assert reported.factor.eq(1).all() and reported.out_of_bounds.sum() == 1
    low = rollout_weights(found, Correction.TRUNCATE, low=0.7, high=2.0).factor
    torch.testing.assert_close(low, torch.tensor([[0.7, 2.0, 0.8187308]]))
    impossible = found.but(rollout_logprobs=torch.tensor([[-0.5, -torch.inf, -0.8]]))
    for level in Level:
        assert rollout_weights(impossible, Correction.TRUNCATE, level).factor.isfinite().all()
    with pytest.raises(ValueError, match=r"5.0, is above the upper one, 0.5; swap"):
        rollout_weights(found, low=5.0, high=0.5)


def test_moments_of_parts_are_those_of_the_whole() -> None:
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 1e-2 + 1e3
    mask = torch.rand(4, 50, generator=torch.Generator().manual_seed(1)) > 0.3
    none = torch.zeros(1, 50, dtype=torch.bool)
    parts = [Moments.of(x[:1], mask[:1]), Moments.of(x[:1], none), Moments.of(x[1:], mask[1:])]
    whole = Moments.of(x, mask)
    assert Moments.together(parts).variance() == pytest.approx(whole.variance(), rel=1e-9)
    assert whole.variance() == pytest.approx(float(x.double()[mask].var()), rel=1e-9)
    white = whiten(x, mask, Moments.together(parts))
    assert white[mask].std().item() == pytest.approx(1.0, abs=0.01) and not white[~mask].any()
    assert not whiten(torch.full((1, 9), 0.1), torch.ones(1, 9, dtype=torch.bool)).any(), "equal numbers stay 0"


def test_gdpo_keeps_apart_what_a_sum_of_rewards_mixes() -> None:
    """Compares the paper's example: rewards (0, 1) and (0, 2), with equal advantages in GRPO and not in GDPO."""
    both = torch.tensor([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]])
    known, weights = torch.ones_like(both, dtype=torch.bool), torch.ones(2)
    summed = group_advantages(both.sum(2), known[..., 0], AdvantageDialect.GRPO_TRL)
    torch.testing.assert_close(summed[0], summed[1], atol=1e-3, rtol=0)
    sums = decoupled_sums(both, known, weights)
    half = 0.5**0.5
    torch.testing.assert_close(sums, torch.tensor([[-half, half], [-2 * half, 2 * half]]), atol=1e-3, rtol=0)
    weighted = decoupled_sums(both, known, torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(weighted[1], torch.tensor([-1.5 * half, 1.5 * half]), atol=1e-3, rtol=0)
    everything = torch.ones(2, 2, dtype=torch.bool)
    normal = batch_normalised(sums, everything)
    assert normal.std().item() == pytest.approx(1.0, abs=1e-3) and normal.mean().abs() < 1e-6
    parts = [Moments.of(sums[:1], everything[:1]), Moments.of(sums[1:], everything[1:])]
    split = batch_normalised(sums[1:], everything[1:], Moments.together(parts))
    torch.testing.assert_close(split, normal[1:])
    unknown = known.clone()
    unknown[0, 0, 0] = False  # alone in its group, the other one's reward teaches nothing
    assert not decoupled_sums(both, unknown, weights)[0].any()
    with pytest.raises(ValueError, match=r"number of rewards\], with one weight for each reward, not \[3\]"):
        decoupled_sums(both, known, torch.ones(3))


def test_overlong_penalty_needs_a_buffer_within_the_length() -> None:
    for buffer in (0, 30):
        with pytest.raises(
            ValueError, match=f"buffer of {buffer} tokens must be at least 1 and at most the longest, 25"
        ):
            overlong_penalty(torch.tensor([1]), longest=25, buffer=buffer, penalty=1.0)


def test_rewards_are_put_at_last_tokens() -> None:
    rewards = reward_at_last_token(torch.tensor([2.0, 3.0]), torch.tensor([1, 3]), 3)
    assert rewards.tolist() == [[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]]


def test_a_batch_comes_back_from_its_file(tmp_path: Path) -> None:
    found = random_batch([[0, 1], [2, 3]], 12)
    found.save(tmp_path / "batch.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["batch.safetensors"]
    again = TokenBatch.load(tmp_path / "batch.safetensors")
    assert again.tensors().keys() == found.tensors().keys()
    for name, tensor in found.tensors().items():
        assert torch.equal(again.tensors()[name].nan_to_num(), tensor.nan_to_num()), name


def test_bad_batches_are_refused_in_words(tmp_path: Path) -> None:
    found = random_batch([[0]], 6)
    with pytest.raises(ValueError, match=r"advantages \[1, 3\] must be \[rows, tokens\], as logprobs \[1, 6\] are"):
        found.but(advantages=torch.zeros(1, 3))
    with pytest.raises(
        ValueError, match=r"mask is torch.float32, not bool; weights of tokens belong to the aggregation"
    ):
        found.but(mask=torch.ones(1, 6))
    with pytest.raises(ValueError, match=r"has no advantages, which this formula needs"):
        ppo_clip(found)
    with pytest.raises(ValueError, match="the batch has no values, which the critic's loss needs"):
        value_loss(replace(found, values=None))
    (tmp_path / "torn").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"torn cannot be read as a recorded batch"):
        TokenBatch.load(tmp_path / "torn")
    with pytest.raises(ValueError, match=r"none cannot be read"):
        TokenBatch.load(tmp_path / "none")
    found.but(sequences=found.sequences + 100).save(tmp_path / "far")
    with pytest.raises(ValueError, match=r"sequence numbers outside 0 to 5"):
        TokenBatch.load(tmp_path / "far")
    arrays = {name: np.zeros(shape) for name, shape in (("logprobs", (1, 6)), ("mask", 6), ("sequences", (1, 6)))}
    for name, taken, words in (
        ("part", ["logprobs"], "part has no mask, sequences, so it is no recorded batch; record one again"),
        ("odd", list(arrays), r"odd is no recorded batch: mask \[6\] must be"),
    ):
        (tmp_path / name).write_bytes(file_of({key: arrays[key] for key in taken}, {}))
        with pytest.raises(ValueError, match=words):
            TokenBatch.load(tmp_path / name)
        found.save(tmp_path / name)
        TokenBatch.load(tmp_path / name)


def test_a_batch_is_compared_under_every_dialect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Compares dialects on two completions of a prompt, of 2 and 4 tokens and rewards 1 and 0, before an update."""
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    groups, sequences = torch.zeros(2, 4, dtype=torch.int64), torch.tensor([[0] * 4, [1] * 4])
    rewards = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0] * 4])
    lp = torch.full((2, 4), -1.0)
    batch = TokenBatch(lp, mask, sequences, old_logprobs=lp, rollout_logprobs=lp, rewards=rewards, groups=groups)
    found = {one.dialect: one for one in compare_dialects.compare(batch, max_length=4)}
    assert found.keys() == DIALECTS.keys()
    # Advantages of Dr.GRPO are +.5 and -.5: (-.5 * 2 + .5 * 4) / (2 * 4), a slope of .5 / 8 for each of 6 tokens.
    assert found["dr_grpo"].loss == pytest.approx(0.125)
    assert found["dr_grpo"].grad_norm == pytest.approx(0.5 / 8 * 6**0.5)
    assert (found["dr_grpo"].clipped, found["dr_grpo"].live) == (0.0, 1.0)
    assert found["rloo"].loss == pytest.approx((-2 + 4) / 6)
    assert "has no values" in found["ppo"].lacks
    batch.save(tmp_path / "batch.safetensors")
    assert compare_dialects.main([str(tmp_path / "batch.safetensors"), "--drift", "1"]) == 0
    said = capsys.readouterr().out
    assert (
        all(name in said for name in DIALECTS)
        and "6 sampled tokens in 2 completions; trainer / sampler: mean 1.0" in said
    )
    moved = {one.dialect: one for one in compare_dialects.compare(compare_dialects.drifted(batch, 1.0))}
    assert moved["grpo@trl"].clipped > 0 and moved["cispo@minimax"].live == 1 > moved["grpo@trl"].live
    batch.but(mask=torch.zeros_like(mask)).save(tmp_path / "empty.safetensors")
    for argv, message in (
        ([str(tmp_path / "empty.safetensors")], "no sampled token: its mask is all False; record another batch"),
        ([str(tmp_path / "none")], "cannot be read as a recorded batch"),
        ([str(tmp_path)], r"cannot be read as a recorded batch \(it is a folder\)"),
        ([str(tmp_path / "batch.safetensors"), "--drift", "-1"], "--drift -1.0 is no distance"),
        ([str(tmp_path / "batch.safetensors"), "--max-length", "0"], "--max-length 0 is no number of tokens"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare_dialects.main(argv)
