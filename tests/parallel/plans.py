"""Run in the ranks: the trainer on a real mixture plan, as `trivium train` has it."""

import contextlib
import io
from pathlib import Path
from typing import Any

from configs.layout import Layout
from configs.loader import validate
from configs.train import PretrainConfig
from launch.environment import ClusterEnvironment
from pretrain import data_check
from pretrain.data import PlanSource
from pretrain.model.losses import NextToken
from pretrain.parallel import groups
from pretrain.plan_choice import choose_plan
from pretrain.trainer import Trainer


def train_on_plan(tree: dict[str, Any], resume: str = "auto") -> dict[str, Any]:
    """Trains by the config `tree`. Returns the exit status or the error's text."""
    config = validate(PretrainConfig, tree)
    env = ClusterEnvironment.read()
    place = groups.start(env, Layout.of(env.world_size, config.parallel, config.model, config.train))
    try:
        choice = choose_plan(config.data.plan, Path(config.run.dir), resume)
        source = PlanSource(choice.plan, choice.same)
        return {"status": Trainer(config, config.model, source, NextToken(), place, resume=resume).fit()}
    except ValueError as error:
        return {"error": str(error)}


def train_and_listen(tree: dict[str, Any], first_bytes: int) -> dict[str, Any]:
    """As `train_on_plan`, and what it says; only so many bytes of data are looked at before the first step."""
    usual, said = data_check.FIRST_BYTES, io.StringIO()
    data_check.FIRST_BYTES = first_bytes
    try:
        with contextlib.redirect_stdout(said):
            answer = train_on_plan(tree)
    finally:
        data_check.FIRST_BYTES = usual
    return {**answer, "said": said.getvalue()}
