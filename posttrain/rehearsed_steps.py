"""Steps of fine-tuning and RL for a rehearsal: the real loss functions, on rows that stand in for data and rollouts.

A row is full: one document, or both sides of a pair, every token of which is trained on unless the loss is of chosen
positions. Values are never looked at. What a step does before its update is left out, but for the teacher's forward
pass, without which the loss of distillation has nothing to compare.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from configs.distill import DistillConfig
from configs.model import ModelConfig
from configs.preference import PreferenceConfig
from configs.reward_model import RewardModelConfig
from configs.rl import GRPOConfig, PPOConfig
from configs.sft import SFTConfig
from posttrain.distillation.distill_loss import DistillLoss
from posttrain.distillation.teacher import Teacher, frozen, open_teacher
from posttrain.initial_chat_model import InitialChatModel
from posttrain.preference.preference_examples import DESIRABLE
from posttrain.preference.preference_source import PreferenceLoss
from posttrain.preference.trained_loss import REFERENCE, AnswerPreference, PairPreference
from posttrain.reward_model.reward_losses import MARGIN, loss_of
from posttrain.rl.critic import ValueLoss
from posttrain.rl.method import chosen_dialect
from posttrain.rl.phases import Phases
from posttrain.rl.policy_loss import PTX, PolicyLoss
from posttrain.rl.rollout_rows import RolloutRow
from pretrain.data.batch_source import collate
from pretrain.model.losses import LossFunction, NextToken
from pretrain.parallel.engine import Engine
from pretrain.parallel.groups import Mesh
from pretrain.rehearsal.rehearsal_rank import MakeEngine, PreparedStep, stand_in_batches, stand_in_row

LEARNING_RATE = 1e-3


def sft_step(config: SFTConfig, model: ModelConfig, mesh: Mesh, make: MakeEngine) -> PreparedStep:
    """Prepares a step on dialogues."""
    return _step(make(model, mesh), NextToken(), full_row(config.train.seq_length))


def reward_step(config: RewardModelConfig, model: ModelConfig, mesh: Mesh, make: MakeEngine) -> PreparedStep:
    """Prepares a step of a reward model, which judges the last token of each document."""
    row = full_row(config.train.seq_length, sides=2, extra=(MARGIN,))
    row.loss_mask[: len(row.tokens) // 2 - 1] = 0
    row.loss_mask[len(row.tokens) // 2 : -1] = 0
    return _step(make(model, mesh), loss_of(config.reward_model), row)


def preference_step(config: PreferenceConfig, model: ModelConfig, mesh: Mesh, make: MakeEngine) -> PreparedStep:
    """Prepares a step on pairs of answers, or single ones."""
    row = full_row(config.train.seq_length, sides=2, extra=(REFERENCE, DESIRABLE))
    kind = AnswerPreference if config.preference.loss == "kto" else PairPreference
    loss: PreferenceLoss = kind(config.preference)
    return _step(make(model, mesh), loss, row)


def grpo_step(config: GRPOConfig, model: ModelConfig, mesh: Mesh, make: MakeEngine) -> PreparedStep:
    """Prepares an update on a rollout."""
    return _step(make(model, mesh), _policy_loss(config), _rollout_row(config, model))


def ppo_step(config: PPOConfig, model: ModelConfig, mesh: Mesh, make: MakeEngine) -> PreparedStep:
    """Prepares an update on a rollout, of the policy, with rows of text if it has some, and then of the critic."""
    row = _rollout_row(config, model)
    text = config.ppo.text_rows // (mesh.layout.dp * config.train.micro_batch_size)
    policy = _step(make(model, mesh), _policy_loss(config), row, [_text_row(row)] * text)
    of_critic = full_row(config.train.seq_length, extra=("old_values", "returns"))
    critic = _step(make(model.with_values(), mesh), ValueLoss(config.ppo.value_clip), of_critic)

    def take() -> None:
        policy.take()
        critic.take()

    return PreparedStep([*policy.engines, *critic.engines], take)


def distill_step(config: DistillConfig, model: ModelConfig, mesh: Mesh, make: MakeEngine) -> PreparedStep:
    """Prepares a step on the teacher's predictions, after the teacher's forward pass on the same micro-batches."""
    student = InitialChatModel.open(config.init, config.run.dir, "auto", template=config.data.chat_template)
    opened = open_teacher(config, student, mesh.layout.world_size)
    teacher = Teacher(opened, make(opened.initial.model, opened.mesh_beside(mesh), frozen(config.train)))
    engine = make(model, mesh)
    batches = stand_in_batches(engine, full_row(config.train.seq_length))
    loss = DistillLoss(config.distill, teacher, model.vocab_size)

    def take() -> None:
        teacher.see(batches)
        engine.train_step(batches, loss, LEARNING_RATE)

    return PreparedStep([engine, teacher.engine], take)


def full_row(length: int, sides: int = 1, extra: Sequence[str] = ()) -> RolloutRow:
    """Returns a row of `sides` documents of equal length with the arrays in `extra`."""
    row = stand_in_row(length)
    side = -(-length // sides)
    return RolloutRow(
        tokens=row.tokens,
        labels=row.labels,
        loss_mask=row.loss_mask.astype(np.float32),
        positions=row.positions % side,
        segments=row.positions // side,
        source=0,
        extra={name: np.zeros(length, np.float32) for name in extra},
    )


def _step(engine: Engine, loss: LossFunction, row: RolloutRow, further: Sequence[RolloutRow] = ()) -> PreparedStep:
    """Prepares a step on micro-batches of `row`, and one of each of the `further` rows, which are of other sources."""
    engine.num_sources = 1 + max((one.source for one in further), default=0)
    batches = stand_in_batches(engine, row)
    batches += [collate([one] * engine.train_config.micro_batch_size, 0) for one in further]
    return PreparedStep([engine], lambda: engine.train_step(batches, loss, LEARNING_RATE))


def _rollout_row(config: GRPOConfig | PPOConfig, model: ModelConfig) -> RolloutRow:
    """Returns a row of a completion with what the policy's loss needs, and the experts chosen by the sampler."""
    settings, train = config.rl, config.train
    updates = Phases(settings.rollout_batch, settings.epochs, train.global_batch_size, config.run.seed).steps
    recomputes = updates > 1 or settings.correction != "report"
    extra = ["rollout_logprobs", "advantages"] + ["old_logprobs"] * recomputes
    if isinstance(config, PPOConfig) and config.ppo.text_rows:
        extra += ["factor", "share", "text_factor"]
    row = full_row(train.seq_length, extra=[*extra, *["ref_logprobs"] * (settings.kl == "loss")])
    layers = sum(layer.moe is not None for layer in model.layers)
    if model.moe is None or not (settings.replay_experts and layers):
        return row
    in_turn = np.arange(train.seq_length * model.moe.top_k).reshape(train.seq_length, 1, -1) % model.moe.num_experts
    return replace(row, experts=np.repeat(in_turn, layers, axis=1).astype(np.int16))


def _text_row(row: RolloutRow) -> RolloutRow:
    """Returns a row of text beside rollouts' rows; where those name experts, its routers choose by themselves."""
    experts = None if row.experts is None else np.full_like(row.experts, -1)
    return replace(row, source=PTX, experts=experts)


def _policy_loss(config: GRPOConfig | PPOConfig) -> PolicyLoss:
    section, name = (config.ppo, "ppo") if isinstance(config, PPOConfig) else (config.grpo, "grpo")
    dialect = chosen_dialect(section.dialect, section, name)
    has_text = isinstance(config, PPOConfig) and config.ppo.text_rows > 0
    return PolicyLoss(dialect.policy, config.rl, section.temperature, has_ptx=has_text)
