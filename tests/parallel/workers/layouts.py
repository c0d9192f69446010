"""Functions run in the ranks: a few steps of the real engine in a layout; what it computed, as whole tensors."""

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file

from configs.adapters import AdapterConfig
from configs.layout import Layout
from configs.loader import validate
from configs.model import ModelConfig
from configs.train import OptimizerConfig, ParallelConfig, Precision, TrainSection
from data_pipeline.mixture.rows import Row
from launch.environment import ClusterEnvironment
from pretrain.data.batch_source import micro_batches, share_of_rank
from pretrain.model import head_loss, tensor_parallel
from pretrain.model.losses import NextToken, SquaredValues
from pretrain.parallel import details, expert_balance, groups, staged_gloo, zero
from pretrain.parallel.engine import Engine
from pretrain.proof.recorded_step import packed_rows

SEQ_LENGTH, GLOBAL_BATCH, MICRO_BATCH = 24, 8, 2


def make_engine(
    model: dict[str, Any],
    parallel: dict[str, Any],
    dtype: str = "float32",
    adapter: dict[str, Any] | None = None,
    micro_batch: int = MICRO_BATCH,
    **train: Any,
) -> Engine:
    """Builds an engine over all ranks of the call; adapters begin with something to add, so that all of them learn."""
    model_config, parallel_config = validate(ModelConfig, model), validate(ParallelConfig, parallel)
    # What is built beside the engine, as a teacher is, takes its precision from the section.
    precision = Precision.BF16 if dtype == "bfloat16" else Precision.FP32
    section = TrainSection(
        steps=10,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=micro_batch,
        seq_length=SEQ_LENGTH,
        precision=precision,
        **train,
    )
    env = ClusterEnvironment.read()
    mesh = groups.start(env, Layout.of(env.world_size, parallel_config, model_config, section))
    # clip_grad is far below the gradient norm, so that every step is clipped. Adam divides a gradient by its own size,
    # so eps is far above the rounding noise (1e-9 here): a weight moves by lr / eps of that noise at most. With an eps
    # of 1e-6 a single weight's noise came to 1e-5 of the tensor that it is in.
    optimizer = OptimizerConfig(lr=1e-2, clip_grad=0.1, eps=1e-5)
    with mock.patch.object(zero, "REUSE_DISTANCE", 0):  # else stage 3 would keep so small a model gathered
        tuned = None if adapter is None else validate(AdapterConfig, adapter)
        return Engine(model_config, section, optimizer, mesh, 7, getattr(torch, dtype), 2, tuned, adapter_std=0.1)


def rows(first: int, count: int, vocab_size: int) -> list[Row]:
    return packed_rows(first, count, vocab_size, SEQ_LENGTH)


def _columns_apart(x: torch.Tensor, region: tensor_parallel.Region, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Computes column layers one by one, as with ZeRO stage 3, which rounds the gradient of x once for each."""
    x = region.enter(x)
    return tuple(F.linear(x, weight) for weight in weights)


# The head takes a micro-batch in chunks of seven tokens, the last of which is short.
@mock.patch.multiple(head_loss, CHUNK_CPU=1, LEAST_TOKENS=7)
def run_layout(
    model: dict[str, Any],
    parallel: dict[str, Any],
    out: str,
    steps: int = 2,
    dtype: str = "float32",
    compile_blocks: bool = False,
    recompute: str = "none",
    dropout: float = 0.0,
    columns_apart: bool = False,
    lr: float = 1e-2,
    adapter: dict[str, Any] | None = None,
    freeze: Sequence[str] = (),
    micro_batch: int | None = None,
) -> dict[str, Any]:
    """Trains `steps` steps; the first rank of each stage writes the first step's gradients and the final weights.

    Frozen weights have no gradient, but are among the final weights. Unless `micro_batch` is given, a rank without a
    pipeline has two micro-batches a step and one in an evaluation, where only their sums count; others have more.
    """
    of_sums = parallel.get("pp", 1) == 1 and (model.get("moe") or {}).get("aux_loss") != "micro_batch"
    dp = ClusterEnvironment.read().world_size // (parallel.get("tp", 1) * parallel.get("cp", 1) * parallel.get("pp", 1))
    micro_batch = micro_batch or (max(GLOBAL_BATCH // (2 * dp), MICRO_BATCH) if of_sums else MICRO_BATCH)
    train: dict[str, Any] = {
        "compile": compile_blocks,
        "recompute": recompute,
        "dropout": dropout,
        "freeze": tuple(freeze),
    }
    engine = make_engine(model, parallel, dtype, adapter, micro_batch, **train)
    mesh, layout = engine.mesh, engine.mesh.layout
    loss_fn = NextToken() if engine.model_config.has_logits else SquaredValues()
    losses, norms, by_source, tensors, stats = [], [], [], {}, {}
    measured: dict[str, Any] = {}
    named = [pair for chunk in engine.module.chunks for pair in chunk.named_parameters()]
    for step in range(steps):
        share = share_of_rank(step * GLOBAL_BATCH, GLOBAL_BATCH, mesh.dp_rank, layout.dp)
        numbered = rows(share.start, len(share), engine.model_config.vocab_size)
        batches = micro_batches(numbered, micro_batch, share.start)
        with mock.patch.object(tensor_parallel, "_columns", _columns_apart) if columns_apart else nullcontext():
            if step == 0:
                engine.details.begin()
            engine.accumulate(batches, loss_fn)
        if step == 0:
            for name, parameter in named:
                if not parameter.requires_grad:
                    continue
                tensors[f"grad/{name}"] = mesh.gather_whole(zero.full_gradient(parameter), parameter).clone()
        before = [zero.full_weight(p).clone() for _, p in named] if dist.get_world_size() == 1 and step == 0 else []
        sums = engine.update(lr, detailed=step == 0)
        measured |= details.described(sums.details)
        if before:
            apart = [zero.full_weight(p) - old for (_, p), old in zip(named, before, strict=True)]
            for name, tensors_of in (("update_norm", apart), ("weight_norm", before)):
                norm = torch.stack([tensor.double().square().sum() for tensor in tensors_of]).sum().sqrt()
                assert abs(measured[name] / float(norm) - 1) < 1e-9 or freeze or adapter, name
        losses.append(sums.mean_loss)
        norms.append(sums.grad_norm)
        by_source.append((sums.loss / sums.weight).tolist())
        assert all(torch.equal(zero.current_weight(p), zero.full_weight(p).to(p.dtype)) for _, p in named)
        stats = expert_balance.stats(engine.module, engine.mesh, engine.model_config)
    share = share_of_rank(900, 12, mesh.dp_rank, layout.dp)
    of_heldout = len(share) if of_sums else len(share) // 3  # three micro-batches, which an interleaved schedule pads
    heldout = micro_batches(rows(share.start, len(share), engine.model_config.vocab_size), of_heldout)
    evaluated = engine.evaluate(heldout, loss_fn)
    slices = {}
    for (name, parameter), (global_name, _) in zip(named, engine.module.named_global_parameters(), strict=True):
        own, outline = zero.full_weight(parameter), zero.outline(parameter)
        assert own.count_nonzero() == mesh.slices.without_padding(own, outline).count_nonzero(), "padding changed"
        slices[f"{global_name} from {mesh.slices.offset(outline)}"] = _sha256(own)
        tensors[f"weight/{name}"] = mesh.gather_whole(own, parameter).clone()
    if dist.get_rank(mesh.zero_group) == 0 and mesh.tp_rank == 0:
        save_file(tensors, str(Path(out) / f"stage_{mesh.pp_rank}.safetensors"))
    groups.stop()
    return {
        "losses": losses,
        "norms": norms,
        "by_source": by_source,
        "moe": stats,
        "details": measured,
        "heldout": evaluated.mean_loss,
        "slices": slices,
    }


def run_staged(**options: Any) -> dict[str, Any]:
    """Does what `run_layout` does over the groups of ranks that share a GPU, as if every tensor were on it."""
    with (
        mock.patch.object(groups, "backend_of", lambda *_: staged_gloo.NAME),
        mock.patch.object(staged_gloo, "needs_copy", lambda _: True),
        mock.patch.object(staged_gloo, "StagedWork", wraps=staged_gloo.StagedWork) as work,
    ):
        found = run_layout(**options)
    assert work.call_count > 20
    return found


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
