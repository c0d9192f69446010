"""Functions run in the ranks: the trainer on a real mixture plan, set up as by `trivium train`."""

import contextlib
import io
import os
import signal
import threading
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from configs.layout import Layout
from configs.loader import ConfigError, validate
from configs.train import PretrainConfig
from data_pipeline.core.integrity import Expected
from launch.environment import ClusterEnvironment
from pretrain import replay, train
from pretrain.checkpoint.lineage import Pin
from pretrain.checkpoint.resume import check_ranks
from pretrain.data import data_check
from pretrain.data.batch_source import PlanSource
from pretrain.model.losses import NextToken
from pretrain.parallel import groups
from pretrain.parallel.engine import Engine
from pretrain.run.plan_choice import choose_plan
from pretrain.trainer import Trainer
from tests.small_training import last_step


class StoppedInStep3(PlanSource):
    """Source of a plan's rows that sends SIGTERM to its own process before the third step."""

    def prepare(self, engine: Engine, step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def train_on_plan(
    tree: dict[str, Any],
    resume: str = "auto",
    kind: type[PlanSource] = PlanSource,
    seen: list[str] | None = None,
) -> dict[str, Any]:
    """Trains with the config `tree`; returns the exit status or the error's message. `seen`: each rank's data.plan."""
    config = validate(PretrainConfig, tree)
    env = ClusterEnvironment.read()
    mesh = groups.start(env, Layout.of(env.world_size, config.parallel, config.model, config.train))
    try:
        choice = choose_plan(seen[mesh.rank] if seen else config.data.plan, Path(config.run.dir), resume)
        source = kind(choice.plan, choice.common_samples)
        return {"status": Trainer(config, config.model, source, NextToken(), mesh, resume=resume).fit()}
    except data_check.DamagedTrainingData as error:  # as in `trivium train`
        if mesh.is_main:
            print(f"error: {error}")
        return {"status": 1}
    except ValueError as error:
        return {"error": str(error)}


def train_and_listen(tree: dict[str, Any], first_bytes: int, stopped: str = "") -> dict[str, Any]:
    """Calls `train_on_plan` with `first_bytes` as data_check.FIRST_BYTES; returns its answer and what was printed.

    If `stopped` is given, the check of the data never ends, and the run gets SIGTERM: for "third step" before that
    step, for "last step" on the second rank after that step.
    """
    usual, check, said = data_check.FIRST_BYTES, data_check.check_files, io.StringIO()
    data_check.FIRST_BYTES = first_bytes
    if stopped:
        last = tree["train"]["steps"] if stopped == "last step" else None
        data_check.check_files = partial(_never_done, Path(tree["run"]["dir"]), last)
    try:
        with contextlib.redirect_stdout(said):
            answer = train_on_plan(tree, kind=StoppedInStep3 if stopped == "third step" else PlanSource)
    finally:
        data_check.FIRST_BYTES, data_check.check_files = usual, check
    return {**answer, "said": said.getvalue()}


def train_command(args: list[str]) -> dict[str, Any]:
    """Runs `trivium train` itself. Returns its exit status and all that it prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = train.main(args)
    return {"status": status, "said": said.getvalue()}


def replay_command(args: list[str]) -> dict[str, Any]:
    """Runs `trivium replay` itself. Returns its exit status and all that it prints, or the error."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            return {"status": replay.main(args), "said": said.getvalue()}
    except ConfigError as error:
        return {"error": str(error)}


def settings_of_ranks(
    tree: dict[str, Any], settings: list[dict[str, Any]], identities: list[dict[str, Any]], pin: dict[str, Any] | None
) -> str:
    """Returns the error's message, else "", if rank r has `settings[r]` and `identities[r]`."""
    config, env = validate(PretrainConfig, tree), ClusterEnvironment.read()
    with groups.joined(env, Layout.of(env.world_size, config.parallel, config.model, config.train)) as mesh:
        try:
            check_ranks(mesh, settings[mesh.rank], identities[mesh.rank], Pin(**pin) if pin else None)
        except ValueError as error:
            return str(error)
    return ""


def _never_done(run_dir: Path, last: int | None, files: Iterable[Expected], stop: threading.Event) -> list[str]:
    """Stands in for check_files and never ends; on rank 1 it sends SIGTERM once step `last` of the run is done."""
    while last is not None and ClusterEnvironment.read().rank == 1 and not stop.wait(0.05):
        if last_step(run_dir) == last:
            os.kill(os.getpid(), signal.SIGTERM)
            break
    stop.wait()
    return []
