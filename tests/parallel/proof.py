"""Run in the ranks: a proof's step, with a bug planted on demand."""

from typing import Any

from configs.layout import Layout
from configs.loader import validate
from configs.train import PretrainConfig
from launch.environment import ClusterEnvironment
from pretrain.parallel import groups
from pretrain.proof.step import prove_step


def prove(config: dict[str, Any], precision: str, inject: str | None = None) -> None:
    checked = validate(PretrainConfig, config)
    env = ClusterEnvironment.read()
    place = groups.start(env, Layout.of(env.world_size, checked.parallel, checked.model, checked.train))
    prove_step(checked, place, precision, inject)
    groups.stop()
