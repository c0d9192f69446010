"""Log-probabilities of the reference, computed once by the engine before the first step, and kept with the run.

The reference is the model that the run began from. The file's name has a hash of it and of the data, so a resumed run
finds what it began with, and no other run's values are ever taken for its own. It is needed until the run is finished:
by then the engine has other weights.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as as_file
from torch import Tensor

from configs.files import write_atomic
from posttrain.preference.group_packing import PackedRow
from posttrain.preference.trained_loss import REFERENCE
from pretrain.heldout_loss import batches_of_rank
from pretrain.model.batch import Batch
from pretrain.parallel.engine import Engine

ROWS_AT_ONCE = 256  # of each data-parallel rank, so that what ranks exchange stays small


def file_of(run_dir: str, model_sha256: str, data: str) -> Path:
    """Returns where a run keeps the log-probabilities of the reference with this hash on data with this fingerprint."""
    name = hashlib.sha256(f"{model_sha256} {data}".encode()).hexdigest()[:16]
    return Path(run_dir, "reference", f"{name}.safetensors")


def load(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """Returns log-probabilities [rows, tokens] from a file, None if there is no whole and undamaged one of this shape.

    The file has a checksum of the numbers, as safetensors itself has none.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            found, sha256 = file.get_tensor("logprobs"), (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    return found if found.shape == shape and sha256 == hashlib.sha256(found.tobytes()).hexdigest() else None


def save(path: Path, logprobs: np.ndarray) -> None:
    """Writes log-probabilities and their checksum to a file, whole or not at all."""
    logprobs = np.ascontiguousarray(logprobs)
    metadata = {"sha256": hashlib.sha256(logprobs.tobytes()).hexdigest()}
    write_atomic(path, as_file({"logprobs": logprobs}, metadata=metadata))


def with_reference(rows: Sequence[PackedRow], logprobs: np.ndarray) -> list[PackedRow]:
    """Returns the rows with their reference log-probabilities."""
    return [replace(row, extra={**row.extra, REFERENCE: of}) for row, of in zip(rows, logprobs, strict=True)]


def compute(engine: Engine, rows: Sequence[PackedRow]) -> np.ndarray:
    """Returns log-probabilities of the labels of all rows, float32 [rows, tokens], 0 where nothing is trained.

    Collective: all ranks pass the same rows and get the same values.
    """
    dp, rows = engine.mesh.layout.dp, [replace(row, extra={}) for row in rows]
    parts = [rows[i : i + ROWS_AT_ONCE * dp] for i in range(0, len(rows), ROWS_AT_ONCE * dp)]
    return np.concatenate([_part(engine, part) for part in parts]) if parts else np.zeros((0, 0), np.float32)


def _part(engine: Engine, rows: Sequence[PackedRow]) -> np.ndarray:
    recorder = _Recorder()
    engine.evaluate(batches_of_rank(rows, engine), recorder)
    found = torch.zeros(len(rows), len(rows[0].tokens))
    if engine.mesh.counts_in_sums:
        for sample, logprobs in recorder.rows.items():
            if sample < len(rows):
                found[sample] = logprobs
    # Every row comes from one rank and is 0 on the others, so the sum changes no bit.
    return engine.mesh.sum_on_host(found).astype(np.float32)


class _Recorder:
    """A loss function that keeps the log-probabilities of each row it sees, by the row's number."""

    metrics: tuple[str, ...] = ()
    temperature = 1.0
    is_linear = False

    def __init__(self) -> None:
        self.rows: dict[int, Tensor] = {}

    def __call__(self, logprobs_BS: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.samples is not None
        if len(batch.trained):  # copies that only fill up a pipeline have nothing to train
            for sample, logprobs in zip(batch.samples, logprobs_BS.detach().float().cpu(), strict=True):
                self.rows[sample] = logprobs
        return -logprobs_BS, {}
