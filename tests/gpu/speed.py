"""Trains a model of 1B parameters on rows of 8,192 tokens with four documents, and measures speed and memory.

Then it saves a checkpoint and takes one step more, which `resume` repeats in a new process.
"""

import argparse
import hashlib
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import torch

from configs.checkpoints import CheckpointConfig
from configs.model import ModelConfig
from configs.train import TrainSection
from pretrain.checkpoint.saving import Saver
from pretrain.flops import flops_per_token, peak_flops
from pretrain.model.losses import NextToken
from pretrain.parallel.distributed_optimizer import DistributedOptimizer
from pretrain.parallel.engine import Engine
from tests.gpu import common, memory

WARMUP, TIMED, PROFILED = 3, 8, 2
SAVED_STEP = WARMUP + TIMED + PROFILED
LR = 1e-4


def shape(args: argparse.Namespace) -> tuple[ModelConfig, TrainSection, torch.dtype]:
    """Returns model, batch and precision: 1B in bf16, less of it on a small card, and next to nothing with --small."""
    if args.small:
        model = ModelConfig(
            vocab_size=256, num_layers=2, hidden_size=64, ffn_hidden_size=176, num_heads=4, num_kv_heads=2
        )
        train = TrainSection(steps=1, global_batch_size=4, micro_batch_size=2, seq_length=128)
        return model, train, torch.float32 if args.device == "cpu" else torch.bfloat16
    room = torch.cuda.get_device_properties(0).total_memory / 2**30 if args.device == "cuda" else 0.0
    model = ModelConfig(
        vocab_size=32_768,
        num_layers=18 if room > 36 else 8,
        hidden_size=2048,
        ffn_hidden_size=5632,
        num_heads=16,
        num_kv_heads=8,
    )
    train = TrainSection(
        steps=1,
        global_batch_size=4,
        micro_batch_size=1,
        seq_length=8192,
        recompute="none" if room > 70 else "full",
    )
    return model, train, torch.bfloat16


def part(args: argparse.Namespace) -> dict[str, Any]:
    model, train, dtype = shape(args)
    with common.engine(model, train, dtype) as engine:
        for step in range(WARMUP):
            engine.train_step(common.batches(model, train, step), NextToken(), LR)
        seconds, losses = _timed(engine, model, train)
        found = _speed(engine, model, train, dtype, seconds)
        found |= {
            "parameters": model.num_parameters(),
            "row": f"{train.seq_length:,} tokens, {common.DOCUMENTS} documents",
            "recompute": train.recompute,
            "losses": losses,
        }
        if args.device == "cuda":
            terms = memory.expected(model, train, common.batches(model, train, 0)[0], dtype)
            found |= {"peak_gib": torch.cuda.max_memory_allocated() / 2**30, "expected_gib": terms["all"] / 2**30}
            found["expected_bytes"] = terms
        found |= _profile(engine, model, train, args.device)
        found["next"] = save_and_step(engine, model, train, args.result.parent / "saved")
    return found


def _timed(engine: Engine, model: ModelConfig, train: TrainSection) -> tuple[float, list[float]]:
    """Returns the seconds of TIMED steps, whose rows are made beforehand, and their losses."""
    steps = [common.batches(model, train, step) for step in range(WARMUP, WARMUP + TIMED)]
    _settle(engine)
    if engine.mesh.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    results = [engine.train_step(step, NextToken(), LR) for step in steps]
    _settle(engine)
    seconds = time.perf_counter() - started
    return seconds, [result.mean_loss for result in results]


def _speed(
    engine: Engine, model: ModelConfig, train: TrainSection, dtype: torch.dtype, seconds: float
) -> dict[str, Any]:
    edges = common.cuts(train.seq_length)
    lengths = [end - start for start, end in itertools.pairwise(edges)]
    # Attention within documents computes as much as rows of this length would.
    length = sum(n * n for n in lengths) // train.seq_length
    tokens_per_s = TIMED * train.global_batch_size * train.seq_length / seconds
    flops = tokens_per_s * flops_per_token(model, length)
    peak, rate = peak_flops(engine.mesh.device, dtype), _product_rate(engine, dtype)
    return {
        "tokens_per_s": tokens_per_s,
        "step_s": seconds / TIMED,
        "mfu": None if peak is None else flops / peak,
        "product_rate": rate,
        "share_of_product_rate": flops / rate,
    }


def _product_rate(engine: Engine, dtype: torch.dtype) -> float:
    """Measures the flop/s of large matrix products on this device."""
    device = engine.mesh.device
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    _settle(engine)
    started = time.perf_counter()
    for _ in range(20):
        a @ b
    _settle(engine)
    return 20 * 2 * size**3 / (time.perf_counter() - started)


def _settle(engine: Engine) -> None:
    if engine.mesh.device.type == "cuda":
        torch.cuda.synchronize()


def _profile(engine: Engine, model: ModelConfig, train: TrainSection, device: str) -> dict[str, Any]:
    """Profiles PROFILED steps: share of time in which the device idles, kernels by time, and the attention's names."""
    from torch.profiler import ProfilerActivity, profile

    first = WARMUP + TIMED
    steps = [common.batches(model, train, step) for step in range(first, first + PROFILED)]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiled:
        for step in steps:
            engine.train_step(step, NextToken(), LR)
        _settle(engine)
    kernels = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiled.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith("Optimizer.")
    ]
    names = {event.name for event in profiled.events()} if device == "cpu" else {name for name, _, _ in kernels}
    words = ("flash", "fmha", "attention", "causal_documents")
    found: dict[str, Any] = {"attention": ", ".join(sorted({n[:80] for n in names if any(w in n for w in words)})[:6])}
    if kernels:
        busy = busy_time([(start, end) for _, start, end in kernels])
        whole = max(end for *_, end in kernels) - min(start for _, start, _ in kernels)
        by_name: dict[str, float] = {}
        for name, start, end in kernels:
            by_name[name] = by_name.get(name, 0.0) + (end - start) / busy
        found |= {"idle": 1 - busy / whole, "kernels": dict(sorted(by_name.items(), key=lambda item: -item[1])[:12])}
    return found


def busy_time(ranges: list[tuple[float, float]]) -> float:
    """Returns the length of the union of ranges."""
    busy, reached = 0.0, float("-inf")
    for start, end in sorted(ranges):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy


def save_and_step(engine: Engine, model: ModelConfig, train: TrainSection, folder: Path) -> dict[str, Any]:
    """Saves a checkpoint and takes the next step; returns what `resume` must find."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    started = time.perf_counter()
    with Saver(engine, folder, CheckpointConfig(), print) as saver:
        copied = saver.copy()
        saver.start(SAVED_STEP, {})
        saver.wait()
        if saver.failure is not None:
            raise RuntimeError(saver.failure)
    return {"copy_s": copied, "save_s": time.perf_counter() - started, **next_step(engine, model, train)}


def next_step(engine: Engine, model: ModelConfig, train: TrainSection) -> dict[str, Any]:
    """Takes the step after the checkpoint; returns loss, grad norm and a digest of all weights."""
    sums = engine.train_step(common.batches(model, train, SAVED_STEP), NextToken(), LR)
    assert isinstance(engine.zero, DistributedOptimizer)
    digest = hashlib.sha256()
    for bucket in engine.zero.buckets:
        digest.update(bucket.master.detach().cpu().contiguous().view(torch.uint8).numpy())
    return {"loss": float(sums.mean_loss), "grad_norm": float(sums.grad_norm or 0.0), "weights": digest.hexdigest()}


if __name__ == "__main__":
    sys.exit(common.run(part))
