"""Takes one real training step as one rank of a layout, and writes all tensors of that step to files.

    torchrun --nproc-per-node 2 -m pretrain.proof.recorded_step CONFIG run.dir=OUT parallel.tp=2 --precision fp64

`--precision` replaces the config's train.precision. In fp64 everything but the rotary angles is computed in fp64, from
the weights (drawn in fp32, then widened) to Adam's moments; `model.losses` and
`parallel.distributed_optimizer` say what differs from training for that.

The step writes step.json (loss, grad norm, loss by source) and, for each rank, rank_N.safetensors into run.dir. Names
begin with `forward/` for a layer's output, `backward/` for the loss's gradient with respect to that output, and `grad/`
and `weight/` for a parameter's gradient and its value after the step. Each tensor is a slice of a whole one; the file's
metadata holds its offset and the whole shape.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from configs.cli import entrypoint
from configs.files import write_atomic
from configs.layout import Layout
from configs.loader import load
from configs.train import PretrainConfig
from data_pipeline.mixture.rows import Row
from launch.environment import ClusterEnvironment, is_main, report_to_torchrun
from pretrain.batch_source import micro_batches, share_of_rank
from pretrain.model.losses import NextToken
from pretrain.model.recompute import is_recomputing
from pretrain.parallel import expert_balance, groups, zero
from pretrain.parallel.engine import Engine
from pretrain.proof.injections import INJECTIONS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
SOURCES = 2


def packed_rows(first: int, count: int, vocab_size: int, seq_length: int) -> list[Row]:
    """Makes rows that are hard on a layout: uneven documents and masks, padding, and two of eight rows untrained.

    Row i depends on i alone.
    """
    rows = []
    for i in range(first, first + count):
        draw = np.random.default_rng(i)
        cut, end = sorted(draw.choice(np.arange(3, seq_length + 1), 2, replace=False))
        steps = np.arange(seq_length)
        segments = np.where(steps < cut, 0, np.where(steps < end, 1, -1))
        positions = np.where(steps < cut, steps, np.where(steps < end, steps - cut, 0))
        mask = (segments >= 0) & (draw.random(seq_length) < draw.random())
        mask[0] = True
        if i % 8 in (2, 3):
            mask[:] = False
        tokens, labels = draw.integers(0, vocab_size, (2, seq_length))
        rows.append(Row(tokens, labels, mask, positions, segments, source=i % SOURCES))
    return rows


class Slice(NamedTuple):
    offset: tuple[int, ...]
    whole: tuple[int, ...]


class Trace:
    """Copies, by hooks, every layer's output and the gradient with respect to it, for each micro-batch."""

    def __init__(self, engine: Engine, first_micro_batch: int):
        self.tensors: dict[str, torch.Tensor] = {}
        self.slices: dict[str, Slice] = {}
        self._first, self._mesh, self._calls = first_micro_batch, engine.mesh, Counter[str]()
        self._factor = engine.loss_factor
        for chunk in engine.module.chunks:
            if chunk.stage.is_first:
                self._watch("embedding", chunk.embedding)
            for layer, block in chunk.blocks.items():
                self._watch(f"layers.{layer}.attention", block.attention)
                kind = "moe" if block.is_moe else "mlp"
                self._watch(f"layers.{layer}.{kind}", getattr(block, kind))
                self._watch(f"layers.{layer}", block)
            if chunk.stage.is_last:
                self._watch("final_norm", chunk.final_norm)

    def _watch(self, name: str, module: nn.Module) -> None:
        def forward(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            if is_recomputing():
                return
            key = f"{name}/{self._first + self._calls[name]}"
            self._calls[name] += 1
            self._keep(f"forward/{key}", output)
            # The engine multiplies its loss by this factor, which its sums over ranks undo.
            output.register_hook(lambda gradient: self._keep(f"backward/{key}", gradient / self._factor))

        module.register_forward_hook(forward)

    def _keep(self, key: str, tensor: torch.Tensor) -> None:
        self.tensors[key] = _at_least_fp32(tensor.detach()).contiguous().clone()
        part, parts = self._mesh.sequence_part
        length, *rest = tensor.shape
        self.slices[key] = Slice((part * length, *[0] * len(rest)), (parts * length, *rest))


def _at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu", torch.promote_types(tensor.dtype, torch.float32))


def run_step(engine: Engine, config: PretrainConfig, precision: str, out: Path) -> None:
    """Takes one step on the first global batch of `packed_rows`, and writes its files into `out`."""
    mesh, train = engine.mesh, config.train
    share = share_of_rank(0, train.global_batch_size, mesh.dp_rank, mesh.layout.dp)
    rows = packed_rows(share.start, len(share), config.model.vocab_size, train.seq_length)
    trace = Trace(engine, share.start // train.micro_batch_size)
    engine.accumulate(micro_batches(rows, train.micro_batch_size, share.start), NextToken())
    named = [pair for chunk in engine.module.chunks for pair in chunk.named_parameters()]
    tensors, slices = trace.tensors, trace.slices

    def keep(key: str, parameter: nn.Parameter, value: torch.Tensor) -> None:
        outline = zero.outline(parameter)
        if mesh.is_first_holder(parameter) and 0 not in mesh.slices.shape(outline):
            value = mesh.slices.without_padding(value, outline)
            tensors[key] = _at_least_fp32(value).contiguous().clone()
            slices[key] = Slice(mesh.slices.offset(outline), mesh.slices.global_shape(outline))

    for name, parameter in named:
        keep(f"grad/{name}", parameter, zero.full_gradient(parameter))
    sums = engine.update(config.optimizer.lr)
    for name, parameter in named:
        keep(f"weight/{name}", parameter, zero.full_weight(parameter))
    out.mkdir(parents=True, exist_ok=True)
    metadata = {key: json.dumps(own) for key, own in slices.items()}
    save_file(tensors, str(out / f"rank_{mesh.rank:05d}.safetensors"), metadata)
    facts = {
        "precision": precision,
        "loss": sums.mean_loss,
        "grad_norm": sums.grad_norm,
        "by_source": (sums.loss / sums.weight).tolist(),
        **expert_balance.stats(engine.module, engine.mesh, engine.model_config),
    }
    if mesh.is_main:
        write_atomic(out / "step.json", json.dumps(facts, indent=1).encode())


def prove_step(config: PretrainConfig, mesh: groups.Mesh, precision: str, inject: str | None = None) -> None:
    """Builds an engine, with the bug `inject` planted if one is named, and takes its step; collective."""
    with INJECTIONS[inject]() if inject else nullcontext():
        dtype = DTYPES[precision]
        engine = Engine(config.model, config.train, config.optimizer, mesh, config.run.seed, dtype, SOURCES)
        run_step(engine, config, precision, Path(config.run.dir))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.proof.recorded_step",
        description="Takes one step in a layout and writes its tensors to files, for `trivium prove` to compare.",
    )
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--inject", choices=sorted(INJECTIONS))
    args = parser.parse_intermixed_args(argv)
    config = load(PretrainConfig, args.config, args.overrides)
    env = ClusterEnvironment.read()
    with groups.joined(env, Layout.of(env.world_size, config.parallel, config.model, config.train)) as mesh:
        prove_step(config, mesh, args.precision, args.inject)
    return 0


if __name__ == "__main__":
    entrypoint(main, prints_errors=is_main(), on_error=report_to_torchrun)
