"""Rollouts: reproducible draws, rows aligned with the trainer's log-probabilities, records, unusable completions."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.loader import ConfigError, Failure
from configs.rl import EnvironmentConfig, GRPORollouts, GRPOSection, RLSection, checked_rollouts
from configs.train import TrainSection
from data_pipeline.tokens.tokenizer import Tokenizer
from posttrain.algorithms.advantages import batch_normalised, decoupled_sums
from posttrain.algorithms.aggregation import Aggregation
from posttrain.algorithms.dialects import DIALECTS
from posttrain.algorithms.reward_shaping import overlong_penalty
from posttrain.algorithms.token_batch import TokenBatch
from posttrain.chat.chat_format import ChatFormat
from posttrain.rewards.attempt import Problem, TaskScore
from posttrain.rl import rollout_file
from posttrain.rl.group_credit import GroupCredit, token_batch
from posttrain.rl.logprob_check import LogprobCheck
from posttrain.rl.method import chosen_dialect
from posttrain.rl.phases import Phases
from posttrain.rl.policy_copy import PolicyCopy
from posttrain.rl.policy_loss import PolicyLoss
from posttrain.rl.rollout import Rollout, judge, sample
from posttrain.rl.rollout_rows import rollout_rows
from posttrain.rl.rollout_source import RolloutSource, SamplingPlan
from posttrain.rl.text_sampler import DecoderSampler
from posttrain.tasks.sorting import SortTask
from pretrain.data.batch_source import collate
from pretrain.generation.sampling import Completion
from pretrain.model import Decoder
from tests.tiny_models import wide_decoder

TASK = SortTask(3, max_new_tokens=6)
TEMPERATURE = 0.7
LENGTH = 32
RL = RLSection()


@pytest.fixture(scope="module")
def decoder(tokenizer: Tokenizer) -> Decoder:
    return wide_decoder(tokenizer.vocab_size)


def sampled(decoder: Decoder, chat: ChatFormat, samples: range, seed: int = 9, length: int = LENGTH) -> Rollout:
    return sample(DecoderSampler(decoder), TASK, chat, TEMPERATURE, seed, samples, 4, length)


@pytest.fixture(scope="module")
def rollout(decoder: Decoder, chat: ChatFormat) -> Rollout:
    return sampled(decoder, chat, range(8, 16))


@pytest.mark.parametrize(
    ("chosen", "rl", "words"),
    [
        ("1", {}, r"rl\.record is left out; set rl\.record=FOLDER"),
        ("none", {"record": "x"}, "--rollouts-only none is no number"),
        ("0", {"record": "x"}, "--rollouts-only 0 is no number"),
        ("1", {"record": "x", "replay": "y"}, r"rl\.replay = 'y'; leave rl\.replay out"),
        (
            "",
            {"record": "x", "staleness": 1, "correction": "mask"},
            "is of the command that samples; add --rollouts-only",
        ),
    ],
)
def test_rollouts_alone_need_a_folder(chosen: str, rl: dict[str, Any], words: str) -> None:
    assert checked_rollouts("", GRPORollouts()) == 0 and checked_rollouts("2", GRPORollouts(record="x")) == 2
    with pytest.raises(ConfigError, match=words):
        checked_rollouts(chosen, GRPORollouts(**rl))


def test_what_is_sampled_depends_on_seed_and_number_alone(rollout: Rollout, decoder: Decoder, chat: ChatFormat) -> None:
    parts = [sampled(decoder, chat, part) for part in (range(8, 9), range(9, 14), range(14, 14), range(14, 16))]
    for part in parts[1:]:
        parts[0] = parts[0].followed_by(part)
    for name, array in rollout.arrays.items():
        np.testing.assert_array_equal(parts[0].arrays[name], array) if array.dtype != np.float32 else (
            np.testing.assert_allclose(parts[0].arrays[name], array, atol=1e-6)
        )
    assert rollout.prompts.tolist() == [2] * 4 + [3] * 4  # groups of four share a prompt
    assert len({tuple(labels) for labels in rollout.labels[:4].tolist()}) > 1  # and have different random numbers
    assert not np.array_equal(sampled(decoder, chat, range(8, 16), seed=10).tokens, rollout.tokens)


def trainer_logprobs(decoder: Decoder, batch: Any, temperature: float) -> torch.Tensor:
    logits = decoder(batch.tokens, batch.positions, batch.segments, wanted=batch.trained) / temperature
    logprobs = torch.zeros_like(batch.loss_mask)
    labels = batch.labels[batch.loss_mask > 0]
    logprobs[batch.loss_mask > 0] = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    return logprobs


def loss(rl: RLSection = RL) -> PolicyLoss:
    return PolicyLoss(DIALECTS["grpo@trl"].policy, rl, TEMPERATURE)


def with_scores(rollout: Rollout, values: list[float]) -> Rollout:
    return rollout.plus(scores=np.array(values, np.float32))


def credited(rollout: Rollout, name: str = "grpo@trl", rl: RLSection = RL) -> Rollout:
    return GroupCredit(DIALECTS[name], rl, TASK.max_new_tokens)(rollout, None)  # type: ignore[arg-type]


def batch_of(rollout: Rollout, *names: str) -> Any:
    return collate(rollout_rows(rollout, range(len(rollout)), None, ["rollout_logprobs", "advantages", *names]))


def test_rows_line_up_with_the_trainers_logprobs(rollout: Rollout, decoder: Decoder) -> None:
    batch = batch_of(credited(rollout))
    new = trainer_logprobs(decoder, batch, TEMPERATURE)
    trained = batch.loss_mask > 0
    torch.testing.assert_close(new[trained], batch.extra["rollout_logprobs"][trained], atol=1e-5, rtol=0)
    assert trained.sum(1).tolist() == rollout.completion_lengths().tolist()

    check, sampled = LogprobCheck(1e-3), batch.extra["rollout_logprobs"]
    LogprobCheck(1e-3)((new - sampled).abs(), trained)  # they agree, so no error
    untempered = trainer_logprobs(decoder, batch, temperature=1.0)  # as of a trainer that ignores the temperature
    with pytest.raises(Failure, match=r"differ by 0\.\d+ nats a token .* = 0\.001"):
        check((untempered - sampled).abs(), trained)
    check((untempered - sampled).abs(), trained)  # after an update they may differ


def test_advantages_and_metrics(rollout: Rollout) -> None:
    scored = with_scores(rollout, [1.0, 0.0, np.nan, 0.0, 1.0, 1.0, 1.0, 1.0])
    found = credited(scored).advantages
    expected = (2 / 3) / ((1 / 3) ** 0.5 + 1e-4)  # rewards 1, 0, 0 have mean 1/3 and sigma sqrt(1/3)
    on = scored.mask
    assert found[0][on[0]].tolist() == pytest.approx([expected] * int(on[0].sum()), rel=1e-6)
    assert found[1][on[1]][0] == pytest.approx(-expected / 2, rel=1e-6)
    assert not found[2].any()  # unscorable, which is not a reward of 0
    assert not found[4:].any() and not found[~on].any()  # equal rewards; prompts and padding
    metrics, lengths = scored.metrics(), rollout.completion_lengths()
    assert metrics["reward"] == (5.0, 7) and metrics["unscorable"] == (1, 8)
    assert metrics["equal_reward_groups"] == (1, 2) and metrics["completion_tokens"] == (lengths.sum(), 8)


def test_gdpo_compares_each_reward_by_itself(rollout: Rollout) -> None:
    """Compares two groups of four: the first differs in reward a alone, the second in b, which has half the weight.

    Half of a group have 1 and half 0, so each is +-.5 / sqrt(1/3) = +-.866 after its own normalisation. The sums are
    +-.866 and +-.433, and their deviation over the rollout is sqrt((4 * .75 + 4 * .1875) / 7) = .7319.
    """
    a, b = [1.0, 0.0, 1.0, 0.0] * 2, [1.0] * 4 + [0.0, 1.0, 0.0, 1.0]
    parts = {"reward/a": np.array(a, np.float32), "reward/b": np.array(b, np.float32)}

    def by(dialect: str, weight: float, rl: RLSection = RL, scores: list[float] | None = None) -> tuple[Rollout, Any]:
        sums = [x + weight * y for x, y in zip(a, b, strict=True)]
        credit = GroupCredit(DIALECTS[dialect], rl, TASK.max_new_tokens, {"a": 1.0, "b": weight})
        scored = with_scores(rollout, scores or sums).plus(**parts)
        return credit(scored, None), credit.equal_groups(scored).tolist()  # type: ignore[arg-type]

    def per_sample(found: Rollout) -> list[float]:
        assert not found.advantages[~found.mask].any()
        assert all(len(set(row[on])) == 1 for row, on in zip(found.advantages, found.mask, strict=True))
        return [float(row[on][0]) for row, on in zip(found.advantages, found.mask, strict=True)]

    found, equal = by("gdpo", 0.5)
    assert per_sample(found) == pytest.approx([1.1832, -1.1832] * 2 + [0.5916, -0.5916] * 2, abs=1e-3)
    assert equal == [False, False]
    of_sums, equal = by("grpo@trl", 0.5)
    assert per_sample(of_sums) == pytest.approx([0.866, -0.866] * 4, abs=1e-3) and equal == [False, False]
    assert by("grpo@trl", 1.0)[1] == [False, True] and by("gdpo", 1.0)[1] == [False, False]  # the sums are equal
    # Without its second sample the first group's a is 1, 1, 0, normalised .577, .577, -1.155; over the seven samples
    # the deviation is sqrt((2 * .3333 + 1.3333 + 4 * .1875) / 6) = .677.
    gap = [1.5, float("nan"), 1.5, 0.5, 1.0, 0.5, 1.0, 0.5]
    expected = [0.8528, 0.0, 0.8528, -1.7056, 0.6396, -0.6396, 0.6396, -0.6396]
    assert per_sample(by("gdpo", 0.5, scores=gap)[0]) == pytest.approx(expected, abs=1e-3)
    # What a long completion loses is a third reward, of weight 1.
    buffer = TASK.max_new_tokens - 1
    rewards = torch.tensor(
        [a, b, overlong_penalty(torch.from_numpy(rollout.completion_lengths()), 6, buffer, 1.0).tolist()]
    )
    rewards_PGK = rewards.t().reshape(2, 4, 3)
    known = torch.ones_like(rewards_PGK, dtype=torch.bool)
    third = batch_normalised(decoupled_sums(rewards_PGK, known, torch.tensor([1.0, 0.5, 1.0])), known[..., 0])
    shortened = per_sample(by("gdpo", 0.5, RLSection(overlong_buffer=buffer))[0])
    assert shortened == pytest.approx(third.flatten().tolist(), abs=1e-5)


def test_length_and_divergence_cost_reward(rollout: Rollout) -> None:
    scored = with_scores(rollout, [1.0] * 7 + [np.nan])
    rl = RLSection(overlong_buffer=2, overlong_penalty=0.5, kl="reward", kl_coef=0.1)
    with pytest.raises(ValueError, match="no ref_logprobs"):
        token_batch(scored, rl, TASK.max_new_tokens)
    apart = scored.plus(ref_logprobs=np.where(scored.mask, scored.rollout_logprobs - 2.0, 0.0).astype(np.float32))
    rewards = token_batch(apart, rl, TASK.max_new_tokens).need("rewards").sum(1)
    for i, length in enumerate(rollout.completion_lengths()[:7].tolist()):
        overlong = {5: -0.25, 6: -0.5}.get(length, 0.0)
        assert float(rewards[i]) == pytest.approx(1.0 + overlong - 0.1 * 2.0 * length, abs=1e-5)
    assert float(rewards[7]) == 0.0


def test_a_completion_that_never_stops_is_wrong(chat: ChatFormat) -> None:
    digits = chat.tokenizer.encode("123")
    stopped = Completion([*digits, chat.end_id], [0.0] * 4, True)
    cut = Completion(digits, [0.0] * 3, False)
    hidden = Completion([*digits, chat.ids["<|user|>"], chat.end_id], [0.0] * 5, True)
    right, truncated, wrong = judge(TASK, chat, [Problem("one", "Sort 321")] * 3, [stopped, cut, hidden])
    assert right == TaskScore(1.0, "right") and truncated == TaskScore(0.0, "truncated")
    assert wrong.value == 0.0  # an answer with a control token is wrong


def test_a_row_that_is_too_short_is_named(decoder: Decoder, chat: ChatFormat) -> None:
    with pytest.raises(ValueError, match=r"do not fit into train\.seq_length = 9"):
        sampled(decoder, chat, range(4), length=9)


def test_the_loss_ignores_what_is_outside_completions(rollout: Rollout) -> None:
    batch = batch_of(credited(with_scores(rollout, [1.0, 0, 0, 0, 1, 0, 1, 0])))
    on = batch.loss_mask > 0
    noise = torch.where(on, batch.extra["rollout_logprobs"], -1e4)
    function = loss()
    token_losses, metrics = function(noise.requires_grad_(), batch)
    (token_losses * batch.loss_mask).sum().backward()
    assert noise.grad is not None and torch.isfinite(token_losses).all()
    # On policy the gradient by a token's log-probability is minus its advantage, and 0 at other tokens.
    torch.testing.assert_close(noise.grad, -batch.extra["advantages"] * on)
    assert sorted(metrics) == sorted(function.metrics)
    assert all(value.isfinite().all() for value in metrics.values())


def test_a_sampler_that_differs_is_corrected_and_the_divergence_charged(rollout: Rollout) -> None:
    rollout = credited(with_scores(rollout, [1.0, 0, 0, 0, 1, 0, 1, 0]))
    old = np.where(rollout.mask, rollout.rollout_logprobs + np.float32(np.log(3.0)), 0.0).astype(np.float32)
    batch = batch_of(rollout.plus(old_logprobs=old, ref_logprobs=old - np.float32(1.0)), "old_logprobs", "ref_logprobs")
    plain, metrics = loss()(batch.extra["old_logprobs"], batch)  # far apart, and only reported
    assert float(metrics["logprob_difference"][batch.loss_mask > 0].mean()) == pytest.approx(np.log(3.0), rel=1e-5)
    truncated, metrics = loss(rl=RLSection(correction="truncate"))(batch.extra["old_logprobs"], batch)
    torch.testing.assert_close(truncated, 2.0 * plain)
    masked, _ = loss(rl=RLSection(correction="mask"))(batch.extra["old_logprobs"], batch)
    assert not masked.any() and plain.any() and metrics["corrected"][batch.loss_mask > 0].all()
    charged, _ = loss(rl=RLSection(kl="loss", kl_coef=0.5))(batch.extra["old_logprobs"], batch)
    expected = 0.5 * (np.exp(-1.0) + 1.0 - 1.0)  # k3 at x = 1
    torch.testing.assert_close(charged, plain + expected * (batch.loss_mask > 0))


def test_a_record_is_read_as_it_was_written_and_damage_is_found(rollout: Rollout, tmp_path: Path) -> None:
    recorded = rollout_file.Recorded(credited(rollout), 3, 4, {"reward": (1.5, 8)}, "b00c")
    recorded.write(tmp_path)
    found = rollout_file.read(tmp_path, 3, "give up")
    assert found.sha256 == recorded.sha256 and found.next_prompt == 4 and found.metrics == {"reward": (1.5, 8)}
    assert found.rollout.arrays.keys() == recorded.rollout.arrays.keys()
    batch = TokenBatch.load(rollout_file.path_of(tmp_path, 3))  # what `trivium rl compare` reads
    assert torch.equal(batch.mask, torch.from_numpy(rollout.mask)) and batch.groups is not None
    assert batch.sequence_sum(batch.need("rewards"))[batch.first_and_last()[1]].tolist() == rollout.scores.tolist()

    whole = rollout_file.path_of(tmp_path, 3).read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    for at in range(begin, len(whole), 97):  # in all arrays, also those that only `trivium rl compare` reads
        content = bytearray(whole)
        content[at] ^= 1
        rollout_file.path_of(tmp_path, 3).write_bytes(content)
        with pytest.raises(ConfigError, match=r"does not match its own SHA-256.*restore it, or give up"):
            rollout_file.read(tmp_path, 3, "give up")
        with pytest.raises(ValueError, match="does not match its own SHA-256"):
            TokenBatch.load(rollout_file.path_of(tmp_path, 3))
    for part in (b'"facts"', b'"all_sha256"', b'\\"number\\"', b'\\"metrics\\"'):  # names in the header
        assert part in whole
        rollout_file.path_of(tmp_path, 3).write_bytes(whole.replace(part, part.swapcase()))
        with pytest.raises(ConfigError, match=r"damaged; restore it, or give up|no rollout of this version"):
            rollout_file.read(tmp_path, 3, "give up")
    rollout_file.path_of(tmp_path, 3).write_bytes(whole[:99])
    with pytest.raises(ConfigError, match="cannot be read as a recorded rollout"):
        rollout_file.read(tmp_path, 3, "give up")
    with pytest.raises(ConfigError, match=r"rollout 7 is needed \(.* has rollouts 3 to 3\); restore it, or give up"):
        rollout_file.read(tmp_path, 7, "give up")


def test_every_epoch_takes_each_sample_once_in_an_order_of_its_own() -> None:
    phases = Phases(batches=3, epochs=2, batch_size=4, seed=5)
    epochs = [[phases.minibatch(step) for step in range(first, first + 3)] for first in (12, 15, 18)]
    assert [phases.rollout_of(step) for step in (12, 17, 18)] == [2, 2, 3] and phases.begins(12)
    flat = [[i for minibatch in epoch for i in minibatch] for epoch in epochs]
    assert all(sorted(order) == list(range(12)) for order in flat) and flat[0] != flat[1] != flat[2]
    assert phases.minibatch(13) == Phases(3, 2, 4, 5).minibatch(13) != Phases(3, 2, 4, 6).minibatch(13)
    assert Phases(1, 1, 4, 5).minibatch(9) == [0, 1, 2, 3]  # one update keeps the order of the samples


def source(chat: ChatFormat, run_dir: Path, task: SortTask = TASK, group_size: int = 4, **rl: Any) -> RolloutSource:
    train = TrainSection(steps=2, global_batch_size=8, micro_batch_size=4, seq_length=LENGTH)
    sampling = SamplingPlan(task, chat, group_size, TEMPERATURE, 3)
    credit = GroupCredit(DIALECTS["grpo@trl"], RL, 6)
    settings, mean = RLSection(**rl), Aggregation.TOKEN_MEAN
    return RolloutSource(sampling, settings, train, run_dir, credit, mean, PolicyCopy(), LogprobCheck(1.0))


def test_a_run_may_change_how_it_learns_but_not_what(chat: ChatFormat, tmp_path: Path) -> None:
    first = source(chat, tmp_path)
    assert source(chat, tmp_path, kl="loss", correction="mask").fingerprint == first.fingerprint
    for other, words in (
        (source(chat, tmp_path, SortTask(4, max_new_tokens=6)), "task.digits 3 -> 4"),
        (source(chat, tmp_path, SortTask(3, max_new_tokens=9)), "task.max_new_tokens 6 -> 9"),
        (source(chat, tmp_path, group_size=8), "grpo.group_size 4 -> 8"),
    ):
        assert other.fingerprint != first.fingerprint and other.difference(first.facts) == words
    more = source(chat, tmp_path, group_size=8, epochs=2)
    more.sampling = replace(more.sampling, method="ppo", environment=EnvironmentConfig(max_calls=2))
    words = "ppo.group_size 4 -> 8; rl.epochs 1 -> 2; rl.environment.tools unset -> ['calculator']; rl.environment."
    assert more.fingerprint != first.fingerprint and more.difference(first.facts) == f"{words}max_calls unset -> 2"


def test_rollouts_stay_while_a_checkpoint_may_need_them(chat: ChatFormat, rollout: Rollout, tmp_path: Path) -> None:
    """Records four rollouts of two steps; the checkpoint of step 3 is written in the background until the last."""
    own = source(chat, tmp_path, epochs=2)
    own._rollout = rollout
    for number in range(3):
        own._record(number, writes=True)
    assert rollout_file.numbers(tmp_path / "rollouts") == [0, 1, 2]
    (tmp_path / "checkpoints" / "step_3").mkdir(parents=True)
    own._record(3, writes=True)
    assert rollout_file.numbers(tmp_path / "rollouts") == [1, 2, 3]


def test_a_checkpoint_in_a_rollout_needs_that_very_rollout(chat: ChatFormat, rollout: Rollout, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step_3"
    own = source(chat, tmp_path, epochs=2)
    state = {"next_prompt": 4, "rollout": "0" * 64, "batch": 8}
    with pytest.raises(ConfigError, match=r"rollout_000001\.safetensors does not exist, and rollout 1 is needed"):
        own.go_on(checkpoint, {"step": 3, "samples": 24, "source": state})
    rollout_file.Recorded(rollout, 1, 4, {}, "").write(tmp_path / "rollouts")
    words = (
        r"is not the rollout that .*; restore the file, or remove the checkpoints after step 2 in .*checkpoints to go"
    )
    with pytest.raises(ConfigError, match=words):
        own.go_on(checkpoint, {"step": 3, "samples": 24, "source": state})
    with pytest.raises(ConfigError, match=r"set it back to 16, at least until step 4"):
        own.go_on(checkpoint, {"step": 3, "samples": 24, "source": {**state, "batch": 16}})
    own.go_on(checkpoint, {"step": 4, "samples": 32, "source": state})  # the rollout is used up
    assert own.state()["next_prompt"] == 4


def test_rollouts_of_another_tokenizer_or_of_other_groups_are_not_replayed(
    chat: ChatFormat, rollout: Rollout, decoder: Decoder, tmp_path: Path
) -> None:
    """Replays rollouts whose ids would stand for other text, or whose rewards would meet those of other prompts."""
    record, sha256 = tmp_path / "record", chat.tokenizer.sha256
    for number, tokenizer in enumerate([sha256, "b00c"]):
        rollout_file.Recorded(rollout, number, 4, {}, tokenizer).write(record)
    own = source(chat, tmp_path, replay=str(record))
    assert np.array_equal(own._replayed(0, decoder.model_config).tokens, rollout.tokens)
    with pytest.raises(ConfigError, match="recorded with another tokenizer than the model's"):
        own._replayed(1, decoder.model_config)
    words = "8 samples in groups of 4 and rows of 32 tokens, and this run takes 8 in groups of 8 and rows of 32"
    with pytest.raises(ConfigError, match=words):
        source(chat, tmp_path, group_size=8, replay=str(record))._replayed(0, decoder.model_config)
    with pytest.raises(ConfigError, match=r"rollout 2 is needed .*or leave out rl\.replay to sample new ones"):
        own._replayed(2, decoder.model_config)


def test_rollouts_are_recorded_over_no_others(rollout: Rollout, tmp_path: Path) -> None:
    record = tmp_path / "record"
    rollout_file.check_owner(None, tmp_path / "run")
    rollout_file.check_owner(str(record), tmp_path / "run")  # not there yet
    rollout_file.Recorded(rollout, 0, 4, {}, "").write(record)
    with pytest.raises(ConfigError, match="has rollouts of another run already"):
        rollout_file.check_owner(str(record), tmp_path / "run")
    rollout_file.note_owner(record, tmp_path / "run")
    rollout_file.check_owner(str(record), tmp_path / "run")  # the same run, killed before its first checkpoint
    with pytest.raises(ConfigError, match=r"has rollouts of .*/run already; name another folder, or remove it"):
        rollout_file.check_owner(str(record), tmp_path / "other")
    rollout_file.check_owner(str(tmp_path / "another"), tmp_path / "other")


def test_the_note_of_who_records_moves_with_the_run_and_shows_damage(rollout: Rollout, tmp_path: Path) -> None:
    inside, outside = tmp_path / "run/rollouts", tmp_path / "record"
    for folder in (inside, outside):
        rollout_file.note_owner(folder, tmp_path / "run")
        rollout_file.Recorded(rollout, 0, 4, {}, "").write(folder)
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match=r"has rollouts of .*/run already"):
        rollout_file.check_owner(str(outside), tmp_path / "other", continues=True)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    rollout_file.check_owner(str(moved / "rollouts"), moved)
    rollout_file.check_owner(str(outside), moved, continues=True)
    with pytest.raises(ConfigError, match=r"has rollouts of .*/run already"):
        rollout_file.check_owner(str(outside), moved)
    note = outside / rollout_file.RECORDED_BY
    whole = note.read_bytes()
    for at in range(len(whole.strip())):
        note.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ConfigError, match=r"recorded_by (is damaged|has (format|version)).*; name another folder"):
            rollout_file.check_owner(str(outside), moved, continues=True)


def test_settings_that_a_dialect_does_not_have_are_refused() -> None:
    chosen = chosen_dialect("dapo", GRPOSection(clip_low=0.1, aggregation="fixed_length"), "grpo")
    assert chosen.aggregation == Aggregation.FIXED_LENGTH
    with pytest.raises(ConfigError, match=r"grpo\.clip_low = 0\.1 has no meaning in grpo\.dialect = 'cispo@minimax'"):
        chosen_dialect("cispo@minimax", GRPOSection(clip_low=0.1), "grpo")
    names = GRPOSection.model_fields["dialect"].annotation.__args__  # type: ignore[union-attr]
    assert {name for name in DIALECTS if not name.startswith("ppo")} == set(names)
    assert all(chosen_dialect(name, GRPOSection(), "grpo") for name in names)
