"""Tests that a reader of a run's report finds words and a unit for each number that post-training logs."""

from posttrain.distillation.distill_loss import DistillLoss
from posttrain.preference.trained_loss import AnswerPreference, PairPreference
from posttrain.reward_model.reward_losses import PreferenceLoss
from posttrain.rl.critic import ValueLoss
from posttrain.rl.rollout_source import DRAWN
from pretrain.report.drawn_metrics import titled
from pretrain.report.run_report import charts


def test_every_number_of_post_training_has_a_title_and_a_unit() -> None:
    losses = (DistillLoss, PairPreference, AnswerPreference, PreferenceLoss, ValueLoss)
    names = [*DRAWN, *(name for loss in losses for name in loss.metrics)]
    names += ["logprob_difference", "kl_rollout", "clipped", "kl_reference", "kl_to_reference", "correction_weight"]
    names += ["corrected", "ptx_loss", "turns", "value_loss", "value_grad_norm", "reward/sort/accuracy", "mtp_loss_1"]
    names += ["pairs", "drawn_prompts"]
    assert [name for name in names if not titled(name)[1]] == []
    assert titled("reward/sort/accuracy") == ("Mean reward: sort/accuracy", "reward")
    assert titled("mtp_loss_1") == ("Loss of multi-token prediction, head 1", "nats per token")
    assert titled("moe_max_load_by_layer")[0] == "Tokens of the busiest expert, by layer"
    assert titled("of_mine") == ("Of mine", "")


def test_a_loss_is_in_nats_per_token_where_it_is_one_of_tokens() -> None:
    assert "nats per token" in "".join(charts([{"step": 1, "loss": 2.0}]))
    for other in ("reward", "accuracy", "rewards/accuracy"):
        assert "nats per token" not in "".join(charts([{"step": 1, "loss": 2.0, other: 1.0}])), other
