"""Counts where a training step waits for the device, by the line of this repository that waits.

On a GPU torch itself warns of each wait. On a CPU, which has nothing to wait for, values that are read are counted.
"""

import argparse
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from configs.loader import validate
from configs.model import ModelConfig
from configs.train import TrainSection
from pretrain.model.losses import NextToken
from pretrain.proof.devices import CASES
from tests.gpu import common

ROOT = Path(__file__).parents[2]
TRAIN = TrainSection(steps=1, global_batch_size=4, micro_batch_size=1, seq_length=64)
_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


def _code_line() -> str:
    """Returns the innermost line of the repository's packages that is being run, as file:line function."""
    ours = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(ROOT / "pretrain"))]
    if not ours:
        return "elsewhere"
    return f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno} {ours[-1].name}"


class _Reads(TorchDispatchMode):
    def __init__(self, lines: Counter[str]) -> None:
        super().__init__()
        self._lines = lines

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in _READS:
            self._lines[_code_line()] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def _counted(device: str, lines: Counter[str]) -> Iterator[None]:
    if device == "cpu":
        with _Reads(lines):
            yield
        return

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing" in str(message):
            lines[_code_line()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.set_warn_always(True)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.set_warn_always(False)


def part(args: argparse.Namespace) -> dict[str, Any]:
    lines: Counter[str] = Counter()
    by_model: dict[str, int] = {}
    for name in ("packed", "deepseek"):
        model = validate(ModelConfig, CASES[name][0])
        with common.engine(model, TRAIN, torch.bfloat16) as engine:
            prepared = [common.batches(model, TRAIN, step) for step in range(3)]
            for step in range(2):
                engine.train_step(prepared[step], NextToken(), 1e-3)
            before = lines.total()
            with _counted(args.device, lines):
                engine.train_step(prepared[2], NextToken(), 1e-3)
            by_model[name] = lines.total() - before
    return {"count": by_model["packed"], "by_model": by_model, "lines": dict(lines.most_common())}


if __name__ == "__main__":
    sys.exit(common.run(part))
