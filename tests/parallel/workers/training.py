"""Functions run in the ranks: the real trainer on the rows of workers/layouts.py, with interruptions on demand."""

import contextlib
import hashlib
import io
import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from configs.checkpoints import CheckpointConfig
from configs.layout import Layout
from configs.loader import ConfigError, validate
from configs.model import ModelConfig
from configs.train import ParallelConfig, TrainerConfig, TrainSection
from data_pipeline.mixture.rows import Row
from launch.environment import ClusterEnvironment
from pretrain.checkpoint import resume as resume_choice
from pretrain.checkpoint import state, storage
from pretrain.checkpoint.lineage import Lineage, Pin
from pretrain.checkpoint.saving import Saver
from pretrain.checkpoint.storage import Reader, read_full, read_manifest
from pretrain.data.batch_source import BatchSource
from pretrain.heldout_loss import HeldoutLoss
from pretrain.model import build_single
from pretrain.model.losses import NextToken
from pretrain.parallel import groups, zero
from pretrain.parallel.engine import Engine
from pretrain.run.agreement import Agreement
from pretrain.trainer import Trainer
from tests.parallel.workers.layouts import GLOBAL_BATCH, MICRO_BATCH, SEQ_LENGTH, make_engine, rows
from tests.parallel.workers.sharing import Infinite
from tests.training_configs import training_config


class Rows(BatchSource):
    """Batch source that records the samples asked for; `at` has functions to call before steps, counted from 0."""

    num_samples, sources, reads_ahead = None, ["even", "odd"], True

    def __init__(self, vocab_size: int, fingerprint: str, at: dict[int, Callable[[Engine], None]]):
        self.vocab_size, self.fingerprint, self.at = vocab_size, fingerprint, at
        self.asked: list[range] = []

    def prepare(self, engine: Engine, step: int) -> None:
        if step in self.at:
            self.at[step](engine)

    def rows(self, samples: range) -> Sequence[Row]:
        self.asked.append(samples)
        return rows(samples.start, len(samples), self.vocab_size)


def train(
    run_dir: str,
    model: dict[str, Any],
    parallel: dict[str, Any],
    steps: int,
    fail_at: int | None = None,
    signal_at: int | None = None,
    signal_number: int = signal.SIGTERM,
    **options: Any,
) -> dict[str, Any]:
    """Starts or resumes the run in `run_dir`; returns the exit status, or the error's type and message."""

    def fail(_: Engine) -> None:
        raise RuntimeError("the node went away")

    def stop(engine: Engine) -> None:
        if engine.mesh.is_main:  # only one rank gets the signal
            os.kill(os.getpid(), signal_number)

    at = {step: action for step, action in ((fail_at, fail), (signal_at, stop)) if step is not None}
    try:
        return {"status": make_trainer(run_dir, model, parallel, steps, at, **options).fit()}
    except (RuntimeError, ValueError) as error:
        return {"error": str(error), "kind": type(error).__name__}


def votes(run_dir: str, model: dict[str, Any], steps: int, slow_from: int, signal_at: int) -> dict[str, Any]:
    """Trains until one rank gets a signal; returns the steps after which this rank asked all others for theirs.

    From step `slow_from` on, each step takes 0.4 seconds more on the last rank alone.
    """
    asked: list[int] = []
    right = Agreement.signal

    def noted(self: Agreement, step: int, *args: Any) -> int:
        asked.append(step)
        return right(self, step, *args)

    def slow(engine: Engine) -> None:
        if not engine.mesh.is_main:
            time.sleep(0.4)

    def stop(engine: Engine) -> None:
        slow(engine)
        if engine.mesh.is_main:
            os.kill(os.getpid(), signal.SIGTERM)

    at = {**dict.fromkeys(range(slow_from, steps), slow), signal_at: stop}
    few = {"micro_batch_size": GLOBAL_BATCH // 2}
    trainer = make_trainer(run_dir, model, {}, steps, at, every=steps, eval={"every": steps}, train=few)
    with mock.patch.object(Agreement, "signal", noted):
        return {"status": trainer.fit(), "asked": asked}


def train_with_an_infinite_step(
    run_dir: str, model: dict[str, Any], infinite: int, every: int, **options: Any
) -> dict[str, Any]:
    """Trains with an infinite loss on one rank in step `infinite` alone; returns the error and the steps begun."""

    def choose(engine: Engine, loss_fn: Any) -> None:
        trainer.loss_fn = loss_fn if engine.mesh.is_main else NextToken()

    at = {infinite - 1: partial(choose, loss_fn=Infinite()), infinite: partial(choose, loss_fn=NextToken())}
    trainer = make_trainer(run_dir, model, {}, 9, at, every=every, eval={"every": 100}, **options)
    try:
        return {"status": trainer.fit(), "ledger": trainer.tokens_by_source}
    except FloatingPointError as error:
        return {"error": str(error), "begun": trainer.step}


def chosen(run_dir: str, model: dict[str, Any], resume: str) -> dict[str, Any]:
    """Returns the checkpoint that `--resume` chooses, or the error, and the files that this rank read to check it."""
    read: list[str] = []
    right = hashlib.file_digest

    def digest(file: Any, name: str) -> Any:
        read.append(str(Path(file.name).relative_to(Path(run_dir) / "checkpoints")))
        return right(file, name)

    env = ClusterEnvironment.read()
    section = TrainSection(steps=1, global_batch_size=env.world_size, micro_batch_size=1, seq_length=SEQ_LENGTH)
    layout = Layout.of(env.world_size, ParallelConfig(), validate(ModelConfig, model), section)
    with groups.joined(env, layout) as mesh, mock.patch.object(hashlib, "file_digest", digest):
        try:
            return {"path": str(resume_choice.choose(mesh, Path(run_dir), resume)), "read": read}
        except (ConfigError, storage.CheckpointError) as error:
            return {"error": str(error), "read": read}


def train_and_listen(**options: Any) -> dict[str, Any]:
    """Calls `train` and adds what was printed to its answer, as `said`."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        answer = train(**options)
    return {**answer, "said": said.getvalue()}


def make_trainer(
    run_dir: str,
    model: dict[str, Any],
    parallel: dict[str, Any],
    steps: int,
    at: dict[int, Callable[[Engine], None]],
    fingerprint: str = "rows",
    seed: int = 3,
    every: int = 2,
    keep: int = 2,
    keep_every: int = 0,
    precision: str = "fp32",
    resume: str = "auto",
    profiled: Sequence[int] = (),
    init: str | None = None,
    adapter: dict[str, Any] | None = None,
    **sections: dict[str, Any],
) -> Trainer:
    """Builds a trainer; `sections` has, by section, the keys of the config that differ from those below.

    `profiled` are the first and the last step to profile, and `init` is the checkpoint to start from.
    """
    tree = training_config(
        run_dir,
        steps,
        (GLOBAL_BATCH, MICRO_BATCH),
        SEQ_LENGTH,
        run={"seed": seed},
        train={"precision": precision},
        optimizer={"lr": 0.01, "clip_grad": 0.1},
        schedule={"kind": "cosine", "warmup_steps": 2},
        parallel=parallel,
        checkpoint={"every": every, "keep": keep, "keep_every": keep_every},
        eval={"every": 3},
    )
    tree |= {name: {} for name in sections if name not in tree}
    tree = {name: {**section, **sections.get(name, {})} for name, section in tree.items()}
    config = validate(TrainerConfig, tree | ({"adapter": adapter} if adapter else {}))
    model_config = validate(ModelConfig, model)
    env = ClusterEnvironment.read()
    mesh = groups.start(env, Layout.of(env.world_size, config.parallel, model_config, config.train))
    source = Rows(model_config.vocab_size, fingerprint, at)
    steps_profiled = range(profiled[0], profiled[1] + 1) if profiled else range(0)
    heldout = HeldoutLoss({"even": rows(900, 3, model_config.vocab_size)})
    lineage = Lineage(init=Pin.of(Path(init)) if init else None)
    loss = NextToken()
    return Trainer(config, model_config, source, loss, mesh, [heldout], lineage, resume=resume, profiled=steps_profiled)


def compiled_code(run_dir: str, model: dict[str, Any], compiles: bool) -> str | None:
    """Returns where torch keeps compiled code once a trainer is made, in an environment that does not say so before."""
    with mock.patch.dict(os.environ):
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
        make_trainer(run_dir, model, {}, 2, {}, train={"compile": compiles})
        groups.stop()
        return os.environ.get("TORCHINDUCTOR_CACHE_DIR")


def train_on_slow_disk(
    run_dir: str, model: dict[str, Any], steps: int, seconds: float, fail_on_rank: int | None = None, every: int = 2
) -> dict[str, Any]:
    """Trains on a disk that takes no file while training goes on; returns the state of saving before each step.

    `seconds` after training has begun to wait for a save, or has failed, every rank's file is written. With
    `fail_on_rank`, training fails on that rank before the step after the first save begins.
    """
    write_rank, wait, seen, said = storage.write_rank, Saver.wait, [], io.StringIO()
    waited_for, failed = threading.Event(), Path(run_dir).with_suffix(".failed")

    def slow(*args: Any) -> Any:
        while not (waited_for.is_set() or failed.exists()):
            time.sleep(0.01)
        time.sleep(seconds)
        return write_rank(*args)

    def noted(saver: Saver) -> None:
        if saving():
            waited_for.set()
        wait(saver)

    def look(engine: Engine) -> None:
        seen.append({"saved": storage.steps(run_dir), "writing": saving()})
        if engine.mesh.rank == fail_on_rank and saving():
            failed.touch()
            raise RuntimeError("the node went away")

    trainer = make_trainer(run_dir, model, {}, steps, dict.fromkeys(range(steps), look), every=every, keep=9)
    storage.write_rank = slow
    setattr(Saver, "wait", noted)  # noqa: B010 - mypy knows the attribute as a method
    error = None
    try:
        with contextlib.redirect_stdout(said):
            trainer.fit()
    except RuntimeError as problem:
        error = str(problem)
    finally:
        storage.write_rank = write_rank
        setattr(Saver, "wait", wait)  # noqa: B010
    return {"seen": seen, "said": said.getvalue(), "error": error, "status": int(error is not None)}


def train_on_small_disk(run_dir: str, model: dict[str, Any], rank: int, limits: dict[str, int]) -> dict[str, Any]:
    """Trains six steps and saves after each; from step s on, files of rank `rank` may have at most limits[s] bytes.

    A write beyond the limit fails as on a full disk, but with EFBIG.
    """
    said, hard = io.StringIO(), resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def limit(engine: Engine, size: int) -> None:
        settle(engine)
        if engine.mesh.rank == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    at = {int(step): partial(limit, size=size) for step, size in limits.items()}
    trainer = make_trainer(run_dir, model, {}, 6, at, every=1)
    try:
        with contextlib.redirect_stdout(said):
            status = trainer.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return {"status": status, "said": said.getvalue()}


def train_on_full_disk(run_dir: str, model: dict[str, Any]) -> dict[str, Any]:
    """Trains six steps and saves after each, while the main rank fills and empties the run's file system.

    It is full before step 3, has room again before step 5, and is full before step 6; the main rank prints what it saw,
    and makes room at last.
    """
    ballast, left = Path(run_dir) / "ballast", 60_000  # bytes left free: enough for the log, too few for a checkpoint

    def fill(engine: Engine) -> None:
        settle(engine)
        if engine.mesh.is_main:
            with open(ballast, "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    file.truncate(file.tell() - left)

    def empty(engine: Engine) -> None:
        settle(engine)
        if engine.mesh.is_main:
            look()
            ballast.unlink()

    def look() -> None:
        names = sorted(path.name for path in (Path(run_dir) / "checkpoints").iterdir())
        lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines if "loss" in line]
        print(f"seen: {json.dumps({'checkpoints': names, 'steps': steps})}\n", end="")  # one write, so one line
        for step in storage.steps(run_dir):
            storage.verify(storage.directory(run_dir, step))

    trainer = make_trainer(run_dir, model, {}, 6, {2: fill, 4: empty, 5: fill}, every=1, keep=1)
    status = trainer.fit()
    if trainer.mesh.is_main:
        look()
        ballast.unlink()
    return {"status": status}


def saving() -> bool:
    return any(thread.name.startswith("save of step") for thread in threading.enumerate())


def settle(engine: Engine) -> None:
    """Waits until no rank is saving."""
    while saving():
        time.sleep(0.01)
    engine.mesh.gather_json(None)


def save_now(engine: Engine, run_dir: str, step: int, facts: dict[str, Any]) -> None:
    """Saves a checkpoint and waits until it is whole."""
    with Saver(engine, run_dir, CheckpointConfig(), print) as saver:
        saver.copy()
        saver.start(step, facts)
    assert saver.failure is None, saver.failure


def go_on(checkpoint: str, run_dir: str, out: str, model: dict[str, Any], parallel: dict[str, Any]) -> dict[str, Any]:
    """Resumes `checkpoint` in this call's layout, saves it into `out` as it was restored, and trains one step.

    Returns the exit status and the samples of that step.
    """
    step = read_manifest(checkpoint)["step"]

    def save_restored(engine: Engine) -> None:
        with Reader(checkpoint) as reader:
            for name, parameter in engine.module.named_global_parameters():
                own = engine.mesh.slices.cut(reader.read(name), zero.outline(parameter))
                assert torch.equal(zero.current_weight(parameter), own), name  # not only the optimizer has it
        save_now(engine, out, step, {})

    trainer = make_trainer(run_dir, model, parallel, step + 1, {step: save_restored}, resume=checkpoint)
    status = trainer.fit()
    assert isinstance(trainer.source, Rows)
    return {"status": status, "samples": [sample for part in trainer.source.asked for sample in part]}


def gathered(checkpoint: str, model: dict[str, Any], parallel: dict[str, Any]) -> bool:
    """Whether `gather_weights` gives each rank exactly the checkpoint's weights."""
    engine = make_engine(model, parallel)
    state.restore(engine, checkpoint)
    weights = state.gather_weights(engine)
    expected = read_full(checkpoint)
    assert weights.keys() == expected.keys()
    same = all(torch.equal(weights[name], expected[name]) for name in expected)
    # A whole model beside the split one in the same process computes the same as alone.
    decoder = build_single(engine.model_config, weights)
    tokens, steps = torch.arange(12).view(2, 6) % engine.model_config.vocab_size, torch.arange(6).expand(2, 6)
    logits = decoder(tokens, steps)
    groups.stop()
    return same and torch.equal(logits, build_single(engine.model_config, weights)(tokens, steps))
