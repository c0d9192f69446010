"""Takes real training steps as one rank of a layout, and writes all tensors of the first one to files.

    torchrun --nproc-per-node 2 -m pretrain.proof.recorded_step CONFIG run.dir=OUT parallel.tp=2 --precision fp64

`--precision` replaces the config's train.precision. In fp64 everything but the rotary angles is computed in fp64, from
the weights (drawn in fp32, then widened) to Adam's moments; `model.losses` and `parallel.distributed_optimizer` say
what differs from training for that.

The steps write step.json (losses, grad norms, and facts that must hold exactly) and, for each rank, rank_N.safetensors
into run.dir. Names begin with `forward/` for a layer's output, `backward/` for the loss's gradient with respect to that
output, `grad/` for a parameter's gradient, and `state` for what a checkpoint would hold after the first step. Each
tensor is a slice of a whole one; the file's metadata holds its offset and the whole shape.
"""

import argparse
import gc
import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

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
from pretrain.data.batch_source import micro_batches, share_of_rank
from pretrain.model import Decoder, Slices, init_weights, initial_weights
from pretrain.model.adapters import is_state
from pretrain.model.batch import Batch
from pretrain.model.losses import NextToken, SquaredValues
from pretrain.model.slices import marks_of
from pretrain.parallel import expert_balance, groups, zero
from pretrain.parallel.engine import Engine
from pretrain.proof.activation_hooks import ExpertChoices, NormTerms, Recorder, Slice, Trace
from pretrain.proof.bounds import COMPANION, companion_of
from pretrain.proof.exact_facts import differing_copies, gathered_norm, moment
from pretrain.proof.injections import INJECTIONS
from pretrain.proof.step_reader import RecordedStep

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
SOURCES = 2
STEPS = 3  # the first is compared with one rank's; after all three, copies of weights are compared
CLIP = 0.05  # a norm that initial gradients exceed, so that clipping takes part in every step
MOMENTS = ("exp_avg", "exp_avg_sq")
ADAPTER_STD = 0.02  # of what adapters add: at zero, where training begins, most of their gradients would be zero
SPREAD = 0.1  # standard deviation of weights around the constant at which training begins them
ROWS_PERIOD = 8
WHOLE_ROWS = (4, 5)  # of each period; attention of micro-batches of such rows takes another way

RowsOf = Callable[[int, int, int, int], Sequence[Row]]  # (first, count, vocabulary size, length) to rows


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
        if i % ROWS_PERIOD in (2, 3):
            mask[:] = False
        tokens, labels = draw.integers(0, vocab_size, (2, seq_length))
        rows.append(Row(tokens, labels, mask, positions, segments, source=i % SOURCES))
    return rows


def rows_a_step(global_batch_size: int) -> int:
    """Returns how many rows lie between the first rows of two steps, so that in every step some are trained on."""
    return -(-global_batch_size // ROWS_PERIOD) * ROWS_PERIOD


def proof_rows(first: int, count: int, vocab_size: int, seq_length: int) -> list[Row]:
    """Makes rows as `packed_rows` does, and two of eight that are one document without padding."""
    rows = packed_rows(first, count, vocab_size, seq_length)
    for i, row in enumerate(rows):
        if (first + i) % ROWS_PERIOD in WHOLE_ROWS:
            rows[i] = replace(row, segments=np.zeros(seq_length, int), positions=np.arange(seq_length))
    return rows


def run_steps(
    engine: Engine,
    config: PretrainConfig,
    precision: str,
    recorded: RecordedStep | None,
    steps: int,
    rows_of: RowsOf = proof_rows,
) -> None:
    """Evaluates, takes `steps` steps, and writes the tensors of the first one into run.dir.

    With 0 steps it stops after the gradients of the first, and also records how much cancels in those of norm weights.
    `recorded` is the run whose choices of experts are replayed.
    """
    mesh, train = engine.mesh, config.train
    loss_fn = NextToken() if config.model.has_logits else SquaredValues()
    recorder = Recorder(mesh)
    choices = ExpertChoices(engine, recorder, train.micro_batch_size, recorded)
    stride = rows_a_step(train.global_batch_size)
    share = share_of_rank(0, train.global_batch_size, mesh.dp_rank, mesh.layout.dp)
    first_micro_batch = share.start // train.micro_batch_size

    def batches(step: int) -> list[Batch]:
        first = step * stride + share.start
        rows = rows_of(first, len(share), config.model.vocab_size, train.seq_length)
        return micro_batches(rows, train.micro_batch_size, first)

    _unbalance(engine)
    choices.begin("heldout", first_micro_batch)
    facts: dict[str, Any] = {"precision": precision, "heldout": engine.evaluate(batches(STEPS), loss_fn).mean_loss}
    trace = Trace(engine, recorder, first_micro_batch, train.micro_batch_size)
    norms, gathered, losses = [], [], []
    terms = NormTerms(engine) if not steps else None
    for step in range(max(1, steps)):
        choices.begin(f"step{step}", first_micro_batch)
        engine.accumulate(batches(step), loss_fn)
        trace.stop()
        if step == 0:
            _keep_parameters(engine, recorder, "grad", zero.full_gradient)
        gathered.append(gathered_norm(engine))
        losses.append(engine._sums.mean_loss)
        if steps:
            sums = engine.update(config.optimizer.lr)
            norms.append(sums.grad_norm)
        if step == 0:
            facts |= {"loss": losses[0], "grad_norm": norms[0] if norms else gathered[0]}
        if step == 0 and steps:
            _keep_state(engine, recorder)
            facts |= expert_balance.stats(engine.module, engine.mesh, engine.model_config)
    facts |= {"gathered_norms": gathered, "losses": losses, "clip_grad": config.optimizer.clip_grad}
    facts["norm_terms"] = {name: math.sqrt(total) for name, total in terms.squares.items()} if terms else {}
    facts["norms"] = mesh.gather_json(norms)
    facts["optimizer_steps"] = max(mesh.gather_json(zero.steps_done(engine.zero)))
    facts["differing_copies"] = differing_copies(engine)
    out = Path(config.run.dir)
    out.mkdir(parents=True, exist_ok=True)
    metadata = {key: json.dumps(own) for key, own in recorder.slices.items()}
    save_file(recorder.tensors, str(out / f"rank_{mesh.rank:05d}.safetensors"), metadata)
    if mesh.is_main:
        write_atomic(out / "step.json", json.dumps(facts, indent=1).encode())


def _unbalance(engine: Engine) -> None:
    """Gives routers the uneven load and bias of a run in progress: at its start a bug in either may not show."""
    for name, tensor in engine.module.named_balance().items():
        ramp = torch.linspace(-1, 1, len(tensor), device=tensor.device)
        tensor.copy_(0.01 * ramp if name.endswith(".bias") else tensor * (1 + 0.5 * ramp))


def _keep_parameters(engine: Engine, recorder: Recorder, kind: str, value: Callable[[nn.Parameter], Any]) -> None:
    mesh = engine.mesh
    for chunk in engine.module.chunks:
        for name, parameter in chunk.named_parameters():
            if not parameter.requires_grad:
                continue  # it has no gradient, and its weights are those that were drawn
            tensor = value(parameter)  # collective
            outline = zero.outline(parameter)
            if mesh.is_first_holder(parameter) and 0 not in mesh.slices.shape(outline):
                tensor = mesh.slices.without_padding(tensor, outline)
                own = Slice(mesh.slices.offset(outline), mesh.slices.global_shape(outline))
                recorder.keep(f"{kind}/{name}", tensor, own)


def _keep_state(engine: Engine, recorder: Recorder) -> None:
    """Records what a checkpoint holds: master weights, Adam's moments, and the balance of experts on every rank."""
    _keep_parameters(engine, recorder, "state", zero.full_weight)
    for kind in MOMENTS:
        _keep_parameters(engine, recorder, f"state.{kind}", partial(moment, engine, kind=kind))
    for name, tensor in engine.module.named_balance().items():
        recorder.keep(f"state.balance/{name}", tensor, Slice((0,), tuple(tensor.shape)))


def prove_step(
    config: PretrainConfig, mesh: groups.Mesh, precision: str, inject: str | None = None, reference: Path | None = None
) -> None:
    """Builds an engine, with the bug `inject` planted if one is named, and takes its steps; collective.

    `reference` is the folder in which one rank recorded the same steps. In fp64 no rounding changes a choice of
    experts, so there every layout makes its own. One rank without a reference computes the first step once more in
    another precision, into run.dir/companion, which shows how far its own numbers are from exact ones.
    """
    config = with_clipping(config)
    with INJECTIONS[inject]() if inject else nullcontext():
        recorded = None if reference is None or precision == "fp64" else RecordedStep(reference)
        _run(config, mesh, precision, recorded, STEPS)
    if reference is None and mesh.layout.world_size == 1:
        out = Path(config.run.dir)
        run = config.run.model_copy(update={"dir": str(out / COMPANION)})
        layout = replace(mesh.layout, offload_optimizer=False)  # fp64 is not built for it
        rounded = init_rounded_to_bf16() if precision == "bf16" else nullcontext()
        with rounded:
            config = config.model_copy(update={"run": run})
            _run(config, replace(mesh, layout=layout), companion_of(precision), RecordedStep(out), steps=0)


def with_clipping(config: PretrainConfig) -> PretrainConfig:
    """Returns the config with a norm, above which gradients are clipped, that every step's gradients exceed."""
    optimizer = config.optimizer
    clip = min(optimizer.clip_grad, CLIP) if optimizer.clip_grad else CLIP
    return config.model_copy(update={"optimizer": optimizer.model_copy(update={"clip_grad": clip})})


def _run(config: PretrainConfig, mesh: groups.Mesh, precision: str, recorded: RecordedStep | None, steps: int) -> None:
    dtype = DTYPES[precision]
    run = config.run
    with constants_spread():
        engine = Engine(
            config.model, config.train, config.optimizer, mesh, run.seed, dtype, SOURCES, config.adapter, ADAPTER_STD
        )
    run_steps(engine, config, precision, recorded, steps)
    if hasattr(engine.zero, "destroy"):  # DeepSpeed's engines hook into autograd, where no garbage collector looks
        engine.zero.destroy()
    del engine
    gc.collect()


def constants_spread() -> AbstractContextManager[Any]:
    """Context manager in which engines draw biases and weights of norms around the constant that they begin at.

    A bias of zero adds nothing, however wrongly a layout adds it, and it has the right gradient meanwhile.
    """
    right = initial_weights._fill

    def spread(chunk: Decoder, name: str, parameter: nn.Parameter, seed: int, slices: Slices) -> None:
        marks = marks_of(parameter)
        if marks.constant is None or is_state(name):
            right(chunk, name, parameter, seed, slices)
            return
        with mock.patch.dict(vars(parameter), marks=replace(marks, constant=None, std=SPREAD)):
            right(chunk, name, parameter, seed, slices)
        slices.without_padding(parameter, parameter).add_(marks.constant)

    return mock.patch.object(initial_weights, "_fill", spread)


def init_rounded_to_bf16() -> AbstractContextManager[Any]:
    """Context manager in which engines draw weights that are rounded to bf16 but kept in the engine's precision."""

    def rounded(chunk: Decoder, *args: Any) -> None:
        init_weights(chunk, *args)
        with torch.no_grad():
            for parameter in chunk.parameters():
                parameter.copy_(parameter.to(torch.bfloat16))

    return mock.patch("pretrain.parallel.engine.init_weights", rounded)


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
    layout = Layout.of(env.world_size, config.parallel, config.model, config.train)
    with groups.joined(env, layout, config.parallel.backend) as mesh:
        prove_step(config, mesh, args.precision, args.inject)
    return 0


if __name__ == "__main__":
    entrypoint(main, prints_errors=is_main(), on_error=report_to_torchrun)
