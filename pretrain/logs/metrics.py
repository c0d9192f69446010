"""Output of a run while it trains, written by the main rank: metrics.jsonl, TensorBoard files and trackers."""

import json
import os
from pathlib import Path
from typing import Any

from configs.files import write_atomic
from pretrain.logs.metrics_file import numbers, read_metrics
from pretrain.tracking.trackers import Trackers


class MetricsLog:
    """Log of a run: one JSON object per step in metrics.jsonl, and TensorBoard files and trackers if asked for.

    When a run is resumed, lines after the checkpoint's step `first_step` are removed first, and broken lines are moved
    to metrics.broken. A run that begins again keeps none, since it also repeats the evaluation before its first step.
    A full disk does not stop training: lines wait in memory until there is room, and no more TensorBoard files are
    written.
    """

    def __init__(self, run_dir: Path, first_step: int, tensorboard: bool, trackers: Trackers | None = None):
        self.path, self._tensorboard, self._trackers = run_dir / "metrics.jsonl", tensorboard, trackers
        self._open(first_step or -1)

    def go_back(self, step: int) -> None:
        """Removes the lines after step `step`, from which the run goes on; trackers keep theirs."""
        self.close()
        self._open(step)

    def _open(self, first_step: int) -> None:
        run_dir = self.path.parent
        known = read_metrics(self.path)
        if known.broken:
            aside = run_dir / "metrics.broken"
            before = aside.read_bytes() if aside.is_file() else b""
            write_atomic(aside, before + b"".join(line + b"\n" for line in known.broken.values()))
            print(f"warning: {known.warning}: they are moved to {aside}", flush=True)
        kept = [record for record in known.records if record["step"] <= first_step]
        write_atomic(self.path, b"".join(_encode(line) for line in kept))
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        self._waiting = b""
        self._board: Any = None
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record; its "step" is the number of steps done, so the first is 1."""
        late = bool(self._waiting)
        self._waiting += _encode(record)
        try:
            self._flush()
        except OSError as error:
            if not late:
                print(
                    f"warning: {self.path} cannot be written ({error.strerror}); its lines wait in memory until there "
                    "is room",
                    flush=True,
                )
        values = numbers(record) if self._trackers or self._board else {}
        if self._trackers:
            self._trackers.write(record["step"], values)
        if self._board:
            try:
                for name, value in values.items():
                    self._board.add_scalar(name, value, record["step"])
            except OSError as error:
                print(f"warning: TensorBoard files are no longer written in this run ({error.strerror})", flush=True)
                self._board = None

    def close(self) -> None:
        """Writes waiting lines and closes all files. Raises OSError if there is still no room for the lines."""
        try:
            self._flush()
        finally:
            os.close(self._file)
            if self._board:
                self._board.close()

    def _flush(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[os.write(self._file, self._waiting) :]


def _encode(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"
