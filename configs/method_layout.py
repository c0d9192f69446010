"""Checks of a layout for methods that sample, and for text beside rollouts; they need no model."""

from typing import Any, Literal

from configs.adapters import AdapterConfig
from configs.distill import DistillConfig
from configs.layout import Layout
from configs.loader import ConfigError
from configs.preference import PreferenceConfig
from configs.rl import GRPOConfig, PPOConfig

Way = Literal["whole", "split"]


def check_method(config: Any, layout: Layout) -> None:
    """Raises ConfigError if the method of a run, or its way to sample, does not go with the layout."""
    if isinstance(config, GRPOConfig | PPOConfig):
        _check_rl(config, layout)
    elif isinstance(config, PreferenceConfig) and config.online:
        check_way(config.online.sampler, layout, config.adapter, "online")
    elif isinstance(config, DistillConfig) and config.distill.on_policy:
        check_way(config.distill.sampler, layout, config.adapter, "distill")


def check_way(way: Way, layout: Layout, adapter: AdapterConfig | None, section: str = "rl") -> None:
    """Raises ConfigError if completions cannot be sampled in this way at this layout, or with these adapters.

    `section` is that of the config whose `sampler` is the way.
    """
    if way == "split" and adapter is not None and adapter.base != "full":
        raise ConfigError(
            f"{section}.sampler = 'split' samples with the slices that are trained, and those of adapter.base = "
            f"{adapter.base!r} are in 4 bits; set {section}.sampler=whole"
        )
    if way == "split" and (layout.pp > 1 or layout.cp > 1 or layout.sp or layout.zero == 3):
        raise ConfigError(
            f"{section}.sampler = 'split' samples with the slices of tensor and expert parallel alone, and the layout "
            f"is {layout}; set {section}.sampler=whole, or parallel.pp=1, parallel.cp=1, parallel.sp=false and "
            "parallel.zero=1"
        )


def check_text_rows(count: int, layout: Layout, micro_batch_size: int) -> None:
    """Raises ConfigError if `count` rows of text in each step do not fill micro-batches on every data-parallel rank."""
    parts = layout.dp * micro_batch_size
    if count % parts:
        raise ConfigError(
            f"ppo.text_rows = {count} do not fill micro-batches on every data-parallel rank; set a multiple of "
            f"{parts}, such as ppo.text_rows={-(-count // parts) * parts}"
        )


def _check_rl(config: GRPOConfig | PPOConfig, layout: Layout) -> None:
    if isinstance(config, PPOConfig) and config.parallel.zero > 1:
        raise ConfigError(
            f"parallel.zero = {config.parallel.zero}: policy and critic are two models in one process, which train at "
            "ZeRO stage 1; set parallel.zero=1"
        )
    if config.rl.sampler != "vllm":
        check_way(config.rl.sampler, layout, config.adapter)
    if isinstance(config, PPOConfig) and config.ppo.text_plan:
        check_text_rows(config.ppo.text_rows, layout, config.train.micro_batch_size)
    if isinstance(config, GRPOConfig) and config.grpo.dialect == "gspo" and config.parallel.cp > 1:
        raise ConfigError(
            f"parallel.cp = {config.parallel.cp} divides sequences, whose whole probability ratio grpo.dialect = "
            "'gspo' takes; set parallel.cp=1, or another dialect"
        )
