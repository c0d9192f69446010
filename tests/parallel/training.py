"""Run in the ranks: the real trainer on rows of tests/parallel/layouts.py, with interruptions on demand."""

import os
import signal
from collections.abc import Sequence
from typing import Any

import torch

from configs.layout import Layout
from configs.loader import validate
from configs.train import ModelConfig, TrainerConfig
from data_pipeline.rows import Row
from launch.environment import ClusterEnvironment
from pretrain.checkpoint import state
from pretrain.checkpoint.storage import Reader
from pretrain.data import BatchSource
from pretrain.evaluate import HeldoutLoss
from pretrain.model import build_single
from pretrain.model.losses import NextToken
from pretrain.parallel import groups, zero
from pretrain.trainer import Trainer
from tests.parallel.layouts import GLOBAL_BATCH, MICRO_BATCH, SEQ_LENGTH, make_engine, rows


class Rows(BatchSource):
    """Rows by number; `at` maps a step's first sample to what is done when it is asked for."""

    num_samples, sources = None, ["even", "odd"]

    def __init__(self, vocab_size: int, fingerprint: str, fail_at: int | None, signal_at: int | None):
        self.vocab_size, self.fingerprint = vocab_size, fingerprint
        self.fail_at, self.signal_at = fail_at, signal_at

    def prepare(self, engine: Any, step: int) -> None:
        if step == self.fail_at:
            raise RuntimeError("the node went away")
        if step == self.signal_at and engine.place.is_main:  # one rank alone is told to stop
            os.kill(os.getpid(), signal.SIGTERM)

    def rows(self, samples: range) -> Sequence[Row]:
        return rows(samples.start, len(samples), self.vocab_size)


def train(
    run_dir: str,
    model: dict[str, Any],
    parallel: dict[str, Any],
    steps: int,
    fail_at: int | None = None,
    signal_at: int | None = None,
    fingerprint: str = "rows",
    seed: int = 3,
    every: int = 2,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Trains, or goes on training, in `run_dir`. Returns the exit status or the error's text."""
    config = validate(
        TrainerConfig,
        {
            "run": {"dir": run_dir, "seed": seed},
            "train": {
                "steps": steps,
                "global_batch_size": GLOBAL_BATCH,
                "micro_batch_size": MICRO_BATCH,
                "seq_length": SEQ_LENGTH,
                "precision": precision,
            },
            "optimizer": {"lr": 0.01, "clip_grad": 0.1},
            "schedule": {"kind": "cosine", "warmup_steps": 2},
            "parallel": parallel,
            "checkpoint": {"every": every, "keep": 2},
            "eval": {"every": 3},
            "log": {"tensorboard": False},
        },
    )
    model_config = validate(ModelConfig, model)
    env = ClusterEnvironment.read()
    place = groups.start(env, Layout.of(env.world_size, config.parallel, model_config, config.train))
    source = Rows(model_config.vocab_size, fingerprint, fail_at, signal_at)
    heldout = HeldoutLoss({"even": rows(900, 3, model_config.vocab_size)})
    try:
        trainer = Trainer(config, model_config, source, NextToken(), place, [heldout])
        return {"status": trainer.fit()}
    except (RuntimeError, ValueError) as error:
        return {"error": str(error), "kind": type(error).__name__}


def restore_and_save(checkpoint: str, out: str, model: dict[str, Any], parallel: dict[str, Any]) -> int:
    """Restores a checkpoint in this call's layout and saves it again at once."""
    engine = make_engine(model, parallel)
    state.restore(engine, checkpoint)
    with Reader(checkpoint) as reader:
        for name, parameter in engine.module.named_global_parameters():
            if not getattr(parameter, "tensor_model_parallel", False):  # the model has it too, not only ZeRO
                assert torch.equal(zero.current_weight(parameter), reader.read(name)), name
        steps = reader.manifest["optimizer_steps"]
    state.save(engine, out, step=steps, state={}, keep=1)
    return steps


def gathered(checkpoint: str, model: dict[str, Any], parallel: dict[str, Any]) -> bool:
    """Whether `gather_weights` gives each rank exactly what the checkpoint holds."""
    engine = make_engine(model, parallel)
    state.restore(engine, checkpoint)
    weights = state.gather_weights(engine)
    with Reader(checkpoint) as reader:
        assert sorted(weights) == sorted(reader.names)
        same = all(torch.equal(weights[name], reader.read(name)) for name in reader.names)
    # A whole model stands beside the split one in the same process, and computes as it would alone.
    decoder = build_single(engine.model_config, weights)
    tokens, steps = torch.arange(12).view(2, 6), torch.arange(6).expand(2, 6)
    logits = decoder(tokens, steps)
    groups.stop()
    return same and torch.equal(logits, build_single(engine.model_config, weights)(tokens, steps))
