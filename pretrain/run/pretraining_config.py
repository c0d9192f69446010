"""Config files of commands that try a pretraining run in small: they take no other config."""

from typing import Any

from configs.loader import ConfigError

# Sections of configs of other commands that a pretraining config lacks.
OTHERS = ("distill", "grpo", "keep", "online", "ppo", "preference", "reward_model", "rl", "sample", "task", "teacher")


def with_initial_model(tree: dict[str, Any], file: str, command: str) -> dict[str, Any]:
    """Returns the tree of the pretraining config in `file`; one with [init] has the keys of that model.

    Raises ConfigError for a config that fine-tunes or aligns a model.
    """
    data = tree.get("data")
    found = [f"[{name}]" for name in OTHERS if name in tree]
    if tree.get("init") and isinstance(data, dict) and "plan" not in data:
        found.append("[data] without a plan")
    if found:
        raise ConfigError(
            f"{file} has {', '.join(found)}: it is no pretraining config, and {command} takes no other. Fine-tuning "
            "and RL train by the same engine: write a pretraining config with the same [parallel] and [train], and "
            "with the model in [init] or [model], and give that"
        )
    if not tree.get("init"):
        return tree
    from pretrain.run.initial_model import with_model

    return with_model(tree, "auto")[0]
