"""Functions run in the ranks: training with a mirror of its checkpoints, which is slow or out of reach on demand."""

import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

from pretrain.checkpoint import mirror
from tests.parallel.workers import training


def train(environment: dict[str, str], **options: Any) -> dict[str, Any]:
    """Trains with these environment variables, and with short pauses between tries; the answer has what was printed."""
    import fsspec

    fsspec.get_filesystem_class("s3").clear_instance_cache()
    variables = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | environment
    with mock.patch.dict(os.environ, variables, clear=True), mock.patch.object(mirror, "FIRST_PAUSE", 0.01):
        return training.train_and_listen(**options)


def train_with_slow_copies(run_dir: str, slow_from: int, **options: Any) -> dict[str, Any]:
    """Trains, and spends a minute on the copy of the checkpoints from step `slow_from` on, after their files."""
    right = mirror.Mirror.write

    def slow(self: mirror.Mirror, name: str, content: bytes) -> None:
        step = Path(name).parent.name.removeprefix("step_")
        if step.isdecimal() and int(step) >= slow_from:
            time.sleep(60)
        right(self, name, content)

    with mock.patch.object(mirror.Mirror, "write", slow):
        return training.train(run_dir, **options)
