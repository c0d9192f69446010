"""Run in the ranks: the trainer on a real mixture plan, as `trivium train` has it."""

from typing import Any

from configs.layout import Layout
from configs.loader import validate
from configs.train import PretrainConfig
from data_pipeline.mixture.rows import Plan
from launch.environment import ClusterEnvironment
from pretrain.data import PlanSource
from pretrain.model.losses import NextToken
from pretrain.parallel import groups
from pretrain.trainer import Trainer


def train_on_plan(tree: dict[str, Any], resume: str = "auto") -> dict[str, Any]:
    """Trains by the config `tree`. Returns the exit status or the error's text."""
    config = validate(PretrainConfig, tree)
    env = ClusterEnvironment.read()
    place = groups.start(env, Layout.of(env.world_size, config.parallel, config.model, config.train))
    try:
        source = PlanSource(Plan.open(config.data.plan))
        return {"status": Trainer(config, config.model, source, NextToken(), place, resume=resume).fit()}
    except ValueError as error:
        return {"error": str(error)}
