"""Parts of the check share this: their command line, their result file, and an engine of one rank."""

import argparse
import gc
import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.files import write_atomic
from configs.layout import Layout
from configs.model import ModelConfig
from configs.train import OptimizerConfig, ParallelConfig, TrainSection
from data_pipeline.mixture.rows import Row
from launch.environment import ClusterEnvironment
from pretrain.data.batch_source import micro_batches
from pretrain.model.batch import Batch
from pretrain.parallel import groups
from pretrain.parallel.engine import Engine

DOCUMENTS = 4  # of a row


def run(part: Callable[[argparse.Namespace], dict[str, Any]]) -> int:
    """Runs a part and writes what it returns, or why it failed, to --result; returns the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} finds no GPU; install a CUDA build, or give --device cpu")
        result = part(args)
    except Exception as error:
        traceback.print_exc()
        result = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    write_atomic(args.result, json.dumps(result, indent=1).encode())
    return 1 if "failed" in result else 0


@cache
def environment() -> ClusterEnvironment:
    """Returns this process's environment as it was before its first engine.

    An engine sets torchrun's variables, with which a second one would open the port that torchrun would have chosen.
    """
    return ClusterEnvironment.read()


@contextmanager
def engine(model: ModelConfig, train: TrainSection, dtype: torch.dtype) -> Iterator[Engine]:
    """Context manager with an engine of one rank."""
    with groups.joined(environment(), Layout.of(1, ParallelConfig(), model, train)) as mesh:
        made = Engine(model, train, OptimizerConfig(lr=1e-4), mesh, 1234, dtype)
        yield made
        del made
        gc.collect()


def batches(model: ModelConfig, train: TrainSection, step: int) -> list[Batch]:
    """Makes the micro-batches of a step, whose rows have DOCUMENTS documents of uneven lengths."""
    first = step * train.global_batch_size
    rows = [_row(i, model.vocab_size, train.seq_length) for i in range(first, first + train.global_batch_size)]
    return micro_batches(rows, train.micro_batch_size, first)


def cuts(length: int) -> list[int]:
    """Returns where the documents of a row begin, and the row's length."""
    return [0, length // 8, length // 2, length * 3 // 4, length]


def _row(index: int, vocab_size: int, length: int) -> Row:
    tokens = np.random.default_rng(index).integers(0, vocab_size, length + 1)
    edges = cuts(length)
    lengths = np.diff(edges)
    segments = np.repeat(np.arange(DOCUMENTS), lengths)
    positions = np.concatenate([np.arange(n) for n in lengths])
    mask = np.ones(length, dtype=bool)
    mask[np.array(edges[1:]) - 1] = False  # the next document's first token is no label
    return Row(tokens[:-1], tokens[1:], mask, positions, segments, source=0)
