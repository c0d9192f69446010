"""The critic of PPO: a model with a scalar head that estimates, before each token, the reward still to come.

It has an engine of its own, in the layout of the policy's, and is trained on the same minibatches. Its values give the
advantages of a rollout by generalized advantage estimation, whitened over the rollout.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.differences import words
from configs.loader import ConfigError, plain
from configs.model import ModelConfig
from configs.rl import PPOSection, RLSection
from data_pipeline.tokens.tokenizer import difference
from posttrain.algorithms.normalisation import whiten
from posttrain.algorithms.token_batch import TokenBatch, sequences_of
from posttrain.algorithms.value_loss import gae, value_loss
from posttrain.initial_chat_model import NamedModel
from posttrain.rl.group_credit import token_batch
from posttrain.rl.rollout import Rollout
from posttrain.rl.rollout_rows import rollout_rows
from posttrain.rl.token_values import token_values
from pretrain.checkpoint import state, storage
from pretrain.checkpoint.adapter_base import base_facts
from pretrain.checkpoint.lineage import Pin
from pretrain.checkpoint.resume import model_changes
from pretrain.model.batch import Batch
from pretrain.parallel.engine import Engine
from pretrain.precision import choose_dtype
from pretrain.run.initial_model import InitialModel, initial_weights
from pretrain.schedule import learning_rate
from pretrain.trainer import Trainer


def critic_start(named: str | None, policy: InitialModel) -> Pin:
    """Returns the model that the critic begins from: the one that ppo.critic names, or the policy's.

    Raises ConfigError if it has another shape or tokenizer than the policy, or the run's critic began from another.
    """
    if policy.own is not None:  # the critic goes on from the run's own checkpoint
        began = storage.read_manifest(policy.own)["config"].get("ppo", {}).get("critic")
        if began != named:
            given = f"ppo.critic = {named!r}" if named else "ppo.critic is left out"
            raise ConfigError(
                f"{given}, and the run's critic began from {began or 'the model of the policy'}; "
                f"{f'set ppo.critic={began}' if began else 'leave it out'}, or choose another run.dir"
            )
        return policy.pin
    if named is None:
        return policy.pin
    critic = InitialModel.open(NamedModel.at(Path(named), "ppo.critic"), run_dir=f"{named}/none", resume="no")
    shape, own = policy.model.with_values(), critic.model
    if critic.tokenizer and policy.tokenizer and (said := difference(critic.tokenizer, policy.tokenizer)):
        raise ConfigError(
            f"ppo.critic = {named!r} has another tokenizer than the policy: {said}; name a reward model "
            "that was trained from the policy's model, or leave ppo.critic out"
        )
    if own.has_logits:
        own = own.with_values()
    if found := model_changes("ppo.critic", plain(shape), plain(own), ("init_std",), starts=True):
        raise ConfigError(
            f"ppo.critic = {named!r} is of another shape than the policy: {'; '.join(words(found))}; name a reward "
            "model that was trained from the policy's model, or leave ppo.critic out"
        )
    return critic.pin


class ValueLoss:
    """PPO's value loss per token, as a loss function that gets the critic's values in place of log-probabilities."""

    metrics: tuple[str, ...] = ("value_clipped", "value_error")
    temperature = 1.0
    is_linear = False

    def __init__(self, clip: float | None) -> None:
        self._clip = clip

    def __call__(self, logprobs_BS: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns the loss of the values [B, S], which stand in place of log-probabilities, and metrics."""
        values_BS, extra = logprobs_BS, batch.extra
        tokens = TokenBatch(
            values_BS.detach(),
            mask=batch.loss_mask > 0,
            sequences=sequences_of(batch.segments),
            values=values_BS,
            old_values=extra["old_values"],
            returns=extra["returns"],
        )
        loss_BS, clipped_BS = value_loss(tokens, self._clip)
        share = extra.get("share", torch.ones_like(values_BS))
        error_BS = (values_BS.detach() - extra["returns"]).abs()
        return loss_BS * share, {"value_clipped": clipped_BS.float() * share, "value_error": error_BS * share}


class Critic:
    """The critic, as a companion of the policy in the train loop, and as what gives its rollouts advantages."""

    name = "critic"
    names = ("advantages", "returns", "old_values")
    engine: Engine

    def __init__(self, model: ModelConfig, pin: Pin, section: PPOSection, settings: RLSection, max_length: int) -> None:
        self._model, self._pin, self._section, self._settings = model, pin, section, settings
        self._max_length, self._loss = max_length, ValueLoss(section.value_clip)

    def beside(self, trainer: Trainer) -> "Critic":
        """Builds the critic's engine beside the policy's, with adapters of its own if the policy has some."""
        config, mesh = trainer.config, trainer.mesh
        dtype = choose_dtype(config.train.precision, mesh.device)
        self._config = config
        self.engine = Engine(
            self._model,
            config.train,
            config.optimizer,
            mesh,
            config.run.seed,
            dtype,
            max(1, len(trainer.source.sources)),
            config.adapter,
        )
        self.engine.base = base_facts(config, self._pin)
        return self

    def begin(self) -> None:
        """Gives the critic the weights that it starts from; its head is new unless they are a reward model's."""
        with initial_weights(self._pin) as tensors:
            state.begin_from(self.engine, tensors)

    def train_step(self, batches: Sequence[Batch], step: int) -> dict[str, Any]:
        """Trains on this rank's micro-batches; returns the critic's loss, gradient norm and metrics."""
        config = self._config
        peak = self._section.critic_lr or config.optimizer.lr
        sums = self.engine.train_step(
            [replace(batch, experts=None) for batch in batches],  # those are the policy's
            self._loss,
            learning_rate(step, config.train.steps, peak, config.schedule),
        )
        return {"value_loss": sums.mean_loss, "value_grad_norm": sums.grad_norm, **sums.metrics}

    def equal_groups(self, rollout: Rollout) -> np.ndarray:
        """Returns bool [groups], True for those without a score: rewards are compared with values, not in groups."""
        return rollout.unscored_groups()

    def __call__(self, rollout: Rollout, engine: Engine) -> Rollout:
        """Returns the rollout with the critic's values, and the advantages and returns that follow from them."""
        values = token_values(self.engine, rollout_rows(rollout, range(len(rollout))))
        rollout = rollout.plus(old_values=values.numpy())
        batch = token_batch(rollout, self._settings, self._max_length)
        advantages, returns = gae(batch, self._section.gamma, self._section.gae_lambda)
        whitened = whiten(advantages, batch.mask).float().numpy()
        return rollout.plus(advantages=whitened, returns=returns.float().numpy())
