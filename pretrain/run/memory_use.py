"""Sentence that ends a training run when memory is used up: the settings of its config that need less."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from configs.layout import Layout
from configs.loader import ConfigError, Failure, plain, validate
from configs.memory_errors import lack_of_memory
from configs.model import ModelConfig
from configs.train import TrainerConfig
from pretrain.parallel.groups import Mesh


@contextmanager
def lack_is_told(config: TrainerConfig, model: ModelConfig, mesh: Mesh) -> Iterator[None]:
    """Raises Failure in place of an error which says that memory is used up, on the rank that finds it."""
    try:
        yield
    except Exception as error:
        if (said := lack_of_memory(error)) is None:
            raise
        rank = f"rank {mesh.rank}: " if mesh.layout.world_size > 1 else ""
        raise Failure(f"{rank}{said}; {remedy(config, model, mesh.layout)}") from None


def remedy(config: TrainerConfig, model: ModelConfig, layout: Layout) -> str:
    """Names the settings that need less memory than the config's, each of which goes with all of its others."""
    train, found = config.train, []
    if train.micro_batch_size > 1 and _is_legal(config, model, layout, "train", "micro_batch_size", 1):
        found.append(f"train.micro_batch_size=1 (now {train.micro_batch_size})")
    if train.recompute != "full" and _is_legal(config, model, layout, "train", "recompute", "full"):
        found.append(f"train.recompute=full (now {train.recompute})")
    stages = [stage for stage in (2, 3) if stage > layout.zero and layout.dp * layout.cp > 1]
    if stages := [stage for stage in stages if _is_legal(config, model, layout, "parallel", "zero", stage)]:
        found.append(f"parallel.zero={stages[-1]} (now {layout.zero})")
    found.append(f"rows shorter than train.seq_length = {train.seq_length}")
    return f"less of it is needed with {', '.join(found[:-1])}{' or ' * (len(found) > 1)}{found[-1]}"


def _is_legal(config: TrainerConfig, model: ModelConfig, layout: Layout, section: str, key: str, value: Any) -> bool:
    tree = plain(config)
    tree[section][key] = value
    try:
        other = validate(type(config), tree)
        Layout.of(layout.world_size, other.parallel, model, other.train)
    except ConfigError:
        return False
    return True
