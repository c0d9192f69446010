"""Rollouts that are replayed: whether they fit the run, and what of them is as if it had just been sampled."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.differences import changes, flat, words
from configs.loader import ConfigError
from configs.model import ModelConfig
from posttrain.rl.phases import Phases
from posttrain.rl.rollout import EXPERTS, PART, Rollout
from posttrain.rl.rollout_file import Recorded
from posttrain.rl.rollout_rows import check_experts

SAMPLED = ("tokens", "labels", "mask", "lengths", "prompts", "scores", "stopped", "rollout_logprobs")


def check_middle(checkpoint: Path, manifest: Mapping[str, Any], phases: Phases, settled: Mapping[str, Any]) -> None:
    """Raises ConfigError if a run cannot go on in the middle of a rollout with its settings.

    The rest of the rollout's updates need the batch size, and what it was sampled and scored by: the values of
    `settled`, by config keys.
    """
    number = phases.rollout_of(manifest["step"])
    until = f"at least until step {(number + 1) * phases.steps}"
    batch = manifest.get("source", {}).get("batch")
    if batch != phases.batch_size:
        raise ConfigError(
            f"{checkpoint} is in the middle of rollout {number}, whose minibatches have {batch} samples, and "
            f"train.global_batch_size = {phases.batch_size}; set it back to {batch}, {until}"
        )
    before = {key: value for key, value in flat(manifest.get("config", {})).items() if key in settled}
    if changed := words(changes(before, {key: settled[key] for key in before})):
        raise ConfigError(
            f"{checkpoint} is in the middle of rollout {number}, which was sampled and scored with other settings: "
            f"{'; '.join(changed)}; set back what differs, {until}"
        )


def check_replayed(
    recorded: Recorded, folder: str, tokenizer: str, samples: int, group_size: int, seq_length: int, method: str
) -> None:
    """Raises ConfigError if a rollout has other tokens or sizes than a run takes.

    `tokenizer` is the SHA-256 of the run's, and `method` the section of its config that has `group_size`.
    """
    number, rollout = recorded.number, recorded.rollout
    if recorded.tokenizer != tokenizer:
        raise ConfigError(
            f"rl.replay: rollout {number} of {folder} was recorded with another tokenizer than the model's, so its "
            "token ids stand for other text; replay rollouts of a model with the same tokenizer"
        )
    have = len(rollout), rollout.group_size, rollout.tokens.shape[1]
    if have != (samples, group_size, seq_length):
        raise ConfigError(
            f"rl.replay: rollout {number} has {have[0]} samples in groups of {have[1]} and rows of {have[2]} tokens, "
            f"and this run takes {samples} in groups of {group_size} and rows of {seq_length}; set "
            f"{method}.group_size={have[1]}, train.seq_length={have[2]}, and train.global_batch_size and "
            f"rl.rollout_batch so that their product is {have[0]}"
        )


def check_staleness(recorded: Recorded, folder: str, phases: Phases, staleness: int) -> None:
    """Raises ConfigError unless a rollout was sampled with the weights that the staleness names."""
    wanted = phases.sampled_with(recorded.number, staleness)
    if recorded.step != wanted:
        found = "an unknown step" if recorded.step is None else f"step {recorded.step}"
        raise ConfigError(
            f"rl.replay: rollout {recorded.number} of {folder} was sampled with the weights of {found}, and with "
            f"rl.staleness = {staleness} it comes from those of step {wanted}; give the command that samples the same "
            "rl.staleness and an empty rl.record"
        )


def as_sampled(rollout: Rollout, number: int, model: ModelConfig | None) -> Rollout:
    """Returns what a sampler gives of rollout `number`, without what a trainer has added to it.

    Choices of experts stay if a model is given; raises ConfigError if they are not those of its routers.
    """
    parts = [name for name in rollout.arrays if name.startswith(PART)]
    choices = rollout.arrays.get(EXPERTS) if model else None
    if model and choices is not None:
        check_experts(choices, number, model)
        parts.append(EXPERTS)
    return Rollout({name: rollout.arrays[name] for name in (*SAMPLED, *parts)}, rollout.group_size)
