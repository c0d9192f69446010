"""The kinds of config that there are, and the schema of each. Imports no schema before it is asked for."""

import importlib

from configs.loader import ConfigError
from configs.section import Section

# The schema of each kind of config, by its name in `trivium config`.
SCHEMAS = {
    "data": "configs.data:DataConfig",
    "pretrain": "configs.train:PretrainConfig",
    "sft": "configs.sft:SFTConfig",
    "rm": "configs.reward_model:RewardModelConfig",
    "dpo": "configs.preference:PreferenceConfig",
    "ppo": "configs.rl:PPOConfig",
    "grpo": "configs.rl:GRPOConfig",
    "distill": "configs.distill:DistillConfig",
    "sample": "configs.sample:SampleConfig",
    "export": "configs.export:ExportConfig",
    "recipe": "configs.recipe:RecipeConfig",
    "tokenizer": "configs.tokenizer:TokenizerTrainConfig",
    "launch": "configs.launch:LaunchConfig",
}


def schema_of(name: str) -> type[Section]:
    """Returns the root schema of a kind of config. Raises ConfigError if there is no such kind."""
    if name not in SCHEMAS:
        raise ConfigError(f"there is no config {name!r}; choose one of: {', '.join(SCHEMAS)}")
    module, _, schema = SCHEMAS[name].partition(":")
    found: type[Section] = getattr(importlib.import_module(module), schema)
    return found
