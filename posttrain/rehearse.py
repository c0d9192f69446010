"""`trivium rehearse CONFIG [--world N]`: rehearses a training step of a large job on this machine, of any command.

See `pretrain.rehearsal.rehearsed_training`. In fine-tuning and RL the step is the update of the weights, on rows that
stand in for data and rollouts: what goes before it, such as sampling and log-probabilities of a reference, is left out.
"""

import sys
from collections.abc import Sequence
from typing import Any

from configs.cli import entrypoint
from configs.config_kind import command_for
from configs.distill import DistillConfig
from configs.layout import Layout
from configs.method_layout import check_method
from configs.model import ModelConfig
from configs.preference import PreferenceConfig
from configs.reward_model import RewardModelConfig
from configs.rl import GRPOConfig, PPOConfig
from configs.sft import SFTConfig
from configs.train import TrainerConfig
from pretrain.rehearsal.rehearsed_training import PRETRAINING, Training, rehearse_training

STEPS = "posttrain.rehearsed_steps"
ROWS = "every row is one document or a pair of train.seq_length tokens, nothing is sampled"


def main(argv: Sequence[str] | None = None) -> int:
    """Rehearses a step of the training that a config is for, and returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words.pop(0) if words and words[0] in TRAININGS else command_of(words)
    return rehearse_training(TRAININGS[command], words)


def command_of(words: Sequence[str]) -> str:
    """Returns the command that the config among `words` is for, by its keys; "train" if there is no config."""
    file = next((word for word in words if word.endswith(".toml")), None)
    return command_for(file, words, TRAININGS, "trains nothing") if file else "train"


def opened(config: Any, world: int) -> tuple[ModelConfig, Layout]:
    """Returns model and layout of a run of fine-tuning or RL, as its command finds them."""
    from posttrain.initial_chat_model import InitialChatModel

    is_sft, is_rm = isinstance(config, SFTConfig), isinstance(config, RewardModelConfig)
    template = config.data.chat_template if isinstance(config, SFTConfig | DistillConfig) else None
    keeps = is_sft and config.adapter is None
    initial = InitialChatModel.open(
        config.init, config.run.dir, "auto", takes_values=is_rm, template=template, keeps_modules=keeps
    )
    initial.check_rows(config.train.seq_length)
    model = initial.model
    if is_rm:
        from posttrain.rm import model_with_values

        model = model_with_values(initial, config.reward_model)
    if isinstance(config, GRPOConfig | PPOConfig):
        return model, opened_policy(config, model, initial.given, world)
    layout = Layout.of(world, config.parallel, model, config.train, given=initial.given)
    if isinstance(config, DistillConfig):
        from posttrain.distillation.teacher import open_teacher

        open_teacher(config, initial, world)  # raises ConfigError if it does not fit
    return model, layout


def opened_policy(config: GRPOConfig | PPOConfig, model: ModelConfig, given: Sequence[str], world: int) -> Layout:
    """Returns the layout of a run of RL. Raises ConfigError if its way to sample, or its method, does not fit it."""
    section = config.ppo if isinstance(config, PPOConfig) else config.grpo
    layout = Layout.of(world, config.parallel, model, config.train, section.group_size, given)
    check_method(config, layout)
    return layout


def _training(schema: type[TrainerConfig], step: str) -> Training:
    return Training(schema, opened, f"{STEPS}:{step}", ROWS, _adds)


def _adds(config: TrainerConfig) -> str:
    """Returns the key by which a config adds micro-batches of text to those of rollouts, or ""."""
    return "ppo.text_plan" if isinstance(config, PPOConfig) and config.ppo.text_plan else ""


TRAININGS = {
    "train": PRETRAINING,
    "sft": _training(SFTConfig, "sft_step"),
    "rm": _training(RewardModelConfig, "reward_step"),
    "dpo": _training(PreferenceConfig, "preference_step"),
    "ppo": _training(PPOConfig, "ppo_step"),
    "grpo": _training(GRPOConfig, "grpo_step"),
    "distill": _training(DistillConfig, "distill_step"),
}


if __name__ == "__main__":
    entrypoint(main)
