"""Takes the steps of a proof from weights and rows in a file, so that two devices begin from the same ones.

See `proof.devices`. The file is made from the config where there is none: weights are drawn as training draws them.
"""

import gc
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from configs.train import PretrainConfig
from data_pipeline.mixture.rows import Row
from pretrain.model import Decoder, LayerContext, Slices, init_weights
from pretrain.model.initial_weights import Drawing
from pretrain.model.slices import WHOLE
from pretrain.parallel import groups, zero
from pretrain.parallel.engine import Engine
from pretrain.proof.bounds import COMPANION, companion_of
from pretrain.proof.devices import FINAL
from pretrain.proof.injections import INJECTIONS
from pretrain.proof.recorded_step import (
    DTYPES,
    SOURCES,
    STEPS,
    RowsOf,
    packed_rows,
    rows_a_step,
    run_steps,
    with_clipping,
)
from pretrain.proof.step_reader import RecordedStep

_ARRAYS = ("tokens", "labels", "loss_mask", "positions", "segments")  # of a row; its source is a number


def whole_rows(first: int, count: int, vocab_size: int, seq_length: int) -> list[Row]:
    """Makes rows of one document each, all of whose tokens are trained on. Row i depends on i alone."""
    rows = []
    for i in range(first, first + count):
        tokens, labels = np.random.default_rng(i).integers(0, vocab_size, (2, seq_length))
        zeros = np.zeros(seq_length, dtype=np.int64)
        mask = np.ones(seq_length, dtype=bool)
        rows.append(Row(tokens, labels, mask, np.arange(seq_length), zeros, source=i % SOURCES))
    return rows


ROWS: dict[str, RowsOf] = {"whole": whole_rows, "packed": packed_rows}


def write_start(path: Path, config: PretrainConfig) -> None:
    """Writes the initial weights and all rows of a case, whose data.plan names the kind of rows."""
    model = Decoder(config.model, context=LayerContext())
    init_weights(model, config.run.seed)
    tensors = {f"weight/{name}": parameter.detach() for name, parameter in model.named_global_parameters()}
    count = (STEPS + 1) * rows_a_step(config.train.global_batch_size)  # an evaluation comes after the steps
    rows = ROWS[config.data.plan](0, count, config.model.vocab_size, config.train.seq_length)
    for name in _ARRAYS:
        tensors[f"row/{name}"] = torch.from_numpy(np.stack([getattr(row, name) for row in rows]))
    tensors["row/source"] = torch.tensor([row.source for row in rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(path))


def prove_device(
    config: PretrainConfig, mesh: groups.Mesh, precision: str, inject: str | None, reference: Path | None, start: Path
) -> None:
    """Takes the steps that begin from the file `start`, as `recorded_step.prove_step` does from a config.

    Without a `reference` the steps are taken once more in another precision, into run.dir/companion.
    """
    if not start.exists():
        write_start(start, config)
    config, out = with_clipping(config), Path(config.run.dir)
    with INJECTIONS[inject]() if inject else nullcontext():
        recorded = None if reference is None or precision == "fp64" else RecordedStep(reference)
        _run(config, mesh, precision, recorded, start, rounded=False)
    if reference is None:
        run = config.run.model_copy(update={"dir": str(out / COMPANION)})
        config = config.model_copy(update={"run": run})
        _run(config, mesh, companion_of(precision), RecordedStep(out), start, rounded=precision == "bf16")


def _run(
    config: PretrainConfig,
    mesh: groups.Mesh,
    precision: str,
    recorded: RecordedStep | None,
    start: Path,
    rounded: bool,
) -> None:
    with _weights_from(start, rounded):
        dtype = DTYPES[precision]
        engine = Engine(config.model, config.train, config.optimizer, mesh, config.run.seed, dtype, SOURCES)
    run_steps(engine, config, precision, recorded, STEPS, _rows_from(start))
    weights = {name: zero.full_weight(p).detach() for name, p in engine.module.named_global_parameters()}
    on_host = {name: weight.to("cpu", copy=True).contiguous() for name, weight in weights.items()}
    save_file(on_host, str(Path(config.run.dir) / FINAL))
    del engine, weights
    gc.collect()


def _weights_from(start: Path, rounded: bool) -> AbstractContextManager[Any]:
    """Context manager in which engines get the weights of the file, which may be rounded to bf16 first."""

    def read(chunk: Decoder, seed: int, slices: Slices = WHOLE, drawing: Drawing = nullcontext) -> None:
        with safe_open(start, framework="pt") as file, torch.no_grad():
            for name, parameter in chunk.named_global_parameters():
                weight = file.get_tensor(f"weight/{name}")
                weight = weight.to(torch.bfloat16) if rounded else weight
                with drawing(parameter):
                    parameter.copy_(slices.cut(weight, parameter))

    return mock.patch("pretrain.parallel.engine.init_weights", read)


def _rows_from(start: Path) -> RowsOf:
    with safe_open(start, framework="pt") as file:
        arrays = {name: file.get_tensor(f"row/{name}").numpy() for name in (*_ARRAYS, "source")}

    def rows(first: int, count: int, vocab_size: int, seq_length: int) -> list[Row]:
        taken = (arrays[name][first : first + count] for name in (*_ARRAYS, "source"))
        return [
            Row(tokens, labels, loss_mask, positions, segments, int(source))
            for tokens, labels, loss_mask, positions, segments, source in zip(*taken, strict=True)
        ]

    return rows
