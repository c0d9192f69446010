"""Rollouts: reproducible draws, rows aligned with the trainer's log-probabilities, unusable completions."""

from typing import Any

import numpy as np
import pytest
import torch

from configs.model import ModelConfig
from configs.rl import GRPOSection
from data_pipeline.tokens.tokenizer import Tokenizer
from posttrain.chat.chat_format import ChatFormat
from posttrain.rl.grpo_source import GRPOLoss, RolloutSource
from posttrain.rl.rollout import Rollout, judge, sample_rollout, training_rows
from posttrain.tasks.task import Problem, TaskScore
from posttrain.tasks.verifiable_tasks import SortTask
from pretrain.batch_source import collate
from pretrain.model import Decoder, init_weights
from pretrain.sampling import Completion

TASK = SortTask(3, max_new_tokens=6)
SETTINGS = GRPOSection(group_size=4, temperature=0.7)
LENGTH = 32


@pytest.fixture(scope="module")
def decoder(tokenizer: Tokenizer) -> Decoder:
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=64,
        num_heads=4,
        num_kv_heads=2,
        init_std=0.3,  # wide, so that the distribution is far from uniform
    )
    model = Decoder(config)
    init_weights(model, seed=1)
    return model.eval()


@pytest.fixture(scope="module")
def rollout(decoder: Decoder, chat: ChatFormat) -> Rollout:
    return sample_rollout(decoder, TASK, chat, SETTINGS, 9, range(8, 16))


def test_what_is_sampled_depends_on_seed_and_number_alone(rollout: Rollout, decoder: Decoder, chat: ChatFormat) -> None:
    second = sample_rollout(decoder, TASK, chat, SETTINGS, 9, range(12, 16))
    assert second.prompts == rollout.prompts[4:]
    assert [c.tokens for c in second.completions] == [c.tokens for c in rollout.completions[4:]]
    assert rollout.prompts[0] == rollout.prompts[3] != rollout.prompts[4]  # groups of four share a prompt
    assert len({tuple(c.tokens) for c in rollout.completions[:4]}) > 1  # and have different random numbers
    other = sample_rollout(decoder, TASK, chat, SETTINGS, 10, range(8, 16))
    assert other.prompts != rollout.prompts
    with pytest.raises(ValueError, match=r"8 to 14 are not whole groups of grpo\.group_size = 4"):
        sample_rollout(decoder, TASK, chat, SETTINGS, 9, range(8, 14))


def trainer_logprobs(decoder: Decoder, batch: Any, temperature: float) -> torch.Tensor:
    logits = decoder(batch.tokens, batch.positions, batch.segments, wanted=batch.trained) / temperature
    logprobs = torch.zeros_like(batch.loss_mask)
    labels = batch.labels[batch.loss_mask > 0]
    logprobs[batch.loss_mask > 0] = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    return logprobs


def test_rows_line_up_with_the_trainers_logprobs(rollout: Rollout, decoder: Decoder, chat: ChatFormat) -> None:
    rows = training_rows(rollout, SETTINGS, LENGTH, chat.ids["<pad>"], factor=1.0)
    for row, completion in zip(rows, rollout.completions, strict=True):
        assert row.labels[row.loss_mask > 0].tolist() == completion.tokens
    batch = collate(rows)
    assert batch.logprobs is not None and batch.advantages is not None
    new = trainer_logprobs(decoder, batch, SETTINGS.temperature)
    trained = batch.loss_mask > 0
    torch.testing.assert_close(new[trained], batch.logprobs[trained], atol=2e-5, rtol=0)
    assert int(trained.sum()) == sum(len(c.tokens) for c in rollout.completions)

    GRPOLoss(SETTINGS)(new, batch)  # the log-probabilities agree, so no error
    tight = SETTINGS.model_copy(update={"max_logprob_difference": 1e-3})
    GRPOLoss(tight)(new, batch)
    untempered = trainer_logprobs(decoder, batch, temperature=1.0)  # as of a trainer that ignores the temperature
    with pytest.raises(ValueError, match=r"differ by 0\.\d+ nats a token .* = 0\.001"):
        GRPOLoss(tight)(untempered, batch)


def with_scores(rollout: Rollout, values: list[float | None]) -> Rollout:
    return Rollout(rollout.prompts, rollout.completions, [TaskScore(v, "given") for v in values], 4)


def test_advantages_weights_and_metrics(rollout: Rollout) -> None:
    scored = with_scores(rollout, [1.0, 0.0, None, 0.0, 1.0, 1.0, 1.0, 1.0])
    rows = training_rows(scored, SETTINGS, LENGTH, 3, factor=2.0)
    # Rewards 1, 0, 0 have mean 1/3 and sigma sqrt(1/3); the factor doubles the advantages.
    expected = 2 * (2 / 3) / ((1 / 3) ** 0.5 + 1e-4)
    on = rows[0].loss_mask > 0
    assert rows[0].advantages[on].tolist() == pytest.approx([expected] * int(on.sum()), rel=1e-6)
    assert rows[1].advantages[rows[1].loss_mask > 0][0] == pytest.approx(-expected / 2, rel=1e-6)
    assert not rows[2].loss_mask.any() and not rows[2].advantages.any()  # unscorable, which is not a reward of 0
    assert all(not row.advantages.any() for row in rows[4:])  # equal rewards
    assert not rows[0].advantages[~on].any() and not rows[0].logprobs[~on].any()
    metrics = scored.metrics()
    assert metrics["reward"] == (5.0, 7) and metrics["unscorable"] == (1, 8)
    assert metrics["equal_reward_groups"] == (1, 2)
    lengths = [len(c.tokens) for c in rollout.completions]
    assert metrics["completion_tokens"] == (sum(lengths), 8)
    assert scored.trained() == (sum(lengths) - lengths[2], 7)

    by_sequence = SETTINGS.model_copy(update={"aggregation": "sequence_mean"})
    for row in training_rows(scored, by_sequence, LENGTH, 3, factor=1.0)[3:]:
        assert row.loss_mask.sum() == pytest.approx(1.0, abs=1e-6)


def test_a_completion_that_never_stops_is_wrong(chat: ChatFormat) -> None:
    digits = chat.tokenizer.encode("123")
    stopped = Completion([*digits, chat.end_id], [0.0] * 4, True)
    cut = Completion(digits, [0.0] * 3, False)
    hidden = Completion([*digits, chat.ids["<|user|>"], chat.end_id], [0.0] * 5, True)
    right, truncated, wrong = judge(TASK, chat, [Problem("one", "Sort 321")] * 3, [stopped, cut, hidden])
    assert right == TaskScore(1.0, "right") and truncated == TaskScore(0.0, "truncated")
    assert wrong.value == 0.0  # an answer with a control token is wrong


def test_a_row_that_is_too_short_is_named(rollout: Rollout) -> None:
    with pytest.raises(ValueError, match=r"do not fit into train\.seq_length = 9"):
        training_rows(rollout, SETTINGS, 9, 3, factor=1.0)


def test_the_loss_ignores_what_is_outside_completions(rollout: Rollout, chat: ChatFormat) -> None:
    rows = training_rows(with_scores(rollout, [1.0, 0, 0, 0, 1, 0, 1, 0]), SETTINGS, LENGTH, 3, factor=1.0)
    batch = collate(rows)
    assert batch.logprobs is not None and batch.advantages is not None
    noise = torch.where(batch.loss_mask > 0, batch.logprobs, torch.full_like(batch.logprobs, -1e4))
    loss, metrics = GRPOLoss(SETTINGS)(noise.requires_grad_(), batch)
    (loss * batch.loss_mask).sum().backward()
    assert noise.grad is not None and torch.isfinite(loss).all()
    # On policy the gradient by a token's log-probability is minus its advantage, and 0 at other tokens.
    torch.testing.assert_close(noise.grad, -batch.advantages * (batch.loss_mask > 0))
    assert sorted(metrics) == sorted(GRPOLoss.metrics)
    assert all(not np.isnan(value.detach().numpy()).any() for value in metrics.values())


def test_a_run_may_change_how_it_learns_but_not_what(chat: ChatFormat) -> None:
    def source(task: SortTask = TASK, **changes: Any) -> RolloutSource:
        return RolloutSource(SETTINGS.model_copy(update=changes), task, chat, 3, LENGTH)

    first = source()
    learning = {"temperature": 1.0, "clip_low": 0.1, "advantage": "rloo", "aggregation": "fixed_length"}
    assert source(**learning).fingerprint == first.fingerprint
    for other, words in (
        (source(SortTask(4, max_new_tokens=6)), "task.digits 3 -> 4"),
        (source(SortTask(3, max_new_tokens=9)), "task.max_new_tokens 6 -> 9"),
        (source(group_size=8), "grpo.group_size 4 -> 8"),
    ):
        assert other.fingerprint != first.fingerprint and other.difference(first.facts) == words
