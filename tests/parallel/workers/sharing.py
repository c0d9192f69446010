"""Functions run in the ranks: the weights and gradients that each rank keeps under ZeRO, and an infinite gradient."""

import ctypes
import gc
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from pretrain.data.batch_source import micro_batches, share_of_rank
from pretrain.model import Decoder
from pretrain.model import initial_weights as drawing
from pretrain.model.batch import Batch
from pretrain.model.losses import NextToken
from pretrain.parallel import groups, zero
from pretrain.parallel.distributed_optimizer import ALIGNMENT, DistributedOptimizer
from pretrain.parallel.engine import Engine
from pretrain.parallel.gathered import RebuiltViews
from tests.parallel.workers.layouts import GLOBAL_BATCH, MICRO_BATCH, make_engine, rows

M_MMAP_THRESHOLD = -3  # from malloc.h: an allocation of at least so many bytes has pages of its own


def kept(model: dict[str, Any], parallel: dict[str, Any], dtype: str) -> dict[str, int]:
    """Counts the elements of the model's parts, of gradients kept between micro-batches and weights between steps."""
    engine = make_engine(model, parallel, dtype)
    outlines = [zero.outline(parameter) for parameter in engine.module.parameters()]
    counts = {
        "all": sum(p.numel() for p in outlines),
        "norms": sum(p.numel() for p in outlines if p.ndim == 1),
        "largest": max(p.numel() for p in outlines),
        "padding": 2 * len(outlines),  # of all ranks, at most: two ranks get equal parts of each parameter
    }
    if isinstance(engine.zero, DistributedOptimizer):
        counts["padding"] = 2 * len(engine.zero.buckets) * 2 * ALIGNMENT
    held = []
    (chunk,) = engine.module.chunks
    chunk.register_forward_pre_hook(lambda *_: held.append(_elements(_gradients(engine))))
    for _ in range(2):  # stage 3 records in the first step the order in which it gathers in the second
        engine.train_step(batches_of(engine), NextToken(), lr=1e-2)
    counts["gradients"] = held[-1]
    weights = [parameter.data for parameter in engine.module.parameters()]
    weights += [parameter.ds_tensor.data for parameter in engine.module.parameters() if hasattr(parameter, "ds_tensor")]
    counts["weights"] = _elements(weights)
    groups.stop()
    return counts


def memory_to_draw(model: dict[str, Any], parallel: dict[str, Any]) -> dict[str, Any]:
    """Measures by how many bytes this process grows at most until all weights are drawn, before there is an optimizer.

    Also says how large the model is, and whether the weights are those of a model that is drawn whole.
    """
    right, peaks = zero.wrap, []

    def measured(*args: Any) -> Any:
        peaks.append(_memory("VmHWM") - before)
        return right(*args)

    # From here on the process grows by what is allocated, and shrinks by what is freed: tensors get pages of their own,
    # and memory that earlier tests have freed is given back.
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 2**16)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory is counted from here on
    before = _memory("VmRSS")
    with mock.patch.object(zero, "wrap", measured):
        engine = make_engine(model, parallel)
    whole = Decoder(engine.model_config)
    drawing.init_weights(whole, seed=7)
    names = engine.module.named_global_parameters()
    weights = {name: zero.current_weight(parameter) for name, parameter in names}
    expected = dict(whole.named_global_parameters())
    same = weights.keys() == expected.keys() and all(torch.equal(w, expected[name]) for name, w in weights.items())
    groups.stop()
    return {"peak": peaks[0], "whole": 4 * sum(p.numel() for p in whole.parameters()), "same": same}


def _memory(kind: str) -> int:
    """Returns a line of the system's account of this process's memory, in bytes."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[kind].split()[0])


def compiler_modules(model: dict[str, Any], parallel: dict[str, Any]) -> list[str]:
    """Returns the modules of torch's compiler that this process has imported after a training step."""
    engine = make_engine(model, parallel)
    engine.train_step(batches_of(engine), NextToken(), lr=1e-2)
    groups.stop()
    return [name for name in sys.modules if name.startswith("torch._inductor.")]


def drawn_experts(model: dict[str, Any], parallel: dict[str, Any]) -> dict[str, list[str]]:
    """Numbers of the experts of the first layer whose initial weights this rank draws, by weight."""
    keys: list[str] = []
    right = drawing._draw

    def noted(seed: int, key: str, *rest: Any) -> torch.Tensor:
        keys.append(key)
        return right(seed, key, *rest)

    with mock.patch.object(drawing, "_draw", noted):
        make_engine(model, parallel)
    groups.stop()
    experts: dict[str, list[str]] = {}
    for name, number in (key.split("#") for key in keys if "#" in key and key.startswith("layers.0.")):
        experts.setdefault(name.split(".")[-1], []).append(number)
    return experts


def kept_for_backward(model: dict[str, Any], parallel: dict[str, Any]) -> dict[str, int]:
    """Counts the tensors that autograd saves in two stage-3 steps, and those of them that are gathered weights."""
    gathered: dict[int, torch.Tensor] = {}  # by address; kept alive, so that no address is used twice
    saved: list[torch.Tensor] = []
    right = RebuiltViews._pack

    def note(module: nn.Module, _: Any) -> None:
        gathered.update({p.data.untyped_storage().data_ptr(): p.data for p in module.parameters(recurse=False)})

    def pack(self: RebuiltViews, tensor: torch.Tensor) -> Any:
        result = right(self, tensor)
        saved.extend([result] if isinstance(result, torch.Tensor) else [])
        return result

    with mock.patch.object(RebuiltViews, "_pack", pack):
        engine = make_engine(model, parallel)
    for module in engine.module.modules():
        module.register_forward_pre_hook(note)
    for _ in range(2):
        engine.train_step(batches_of(engine), NextToken(), lr=1e-2)
    held = sum(tensor.untyped_storage().data_ptr() in gathered for tensor in saved)
    groups.stop()
    return {"saved": len(saved), "held": held, "gathered": len(gathered)}


class Infinite(NextToken):
    def __call__(self, logprobs_BS: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return logprobs_BS * float("inf"), {}


def batches_of(engine: Engine) -> list[Batch]:
    share = share_of_rank(0, GLOBAL_BATCH, engine.mesh.dp_rank, engine.mesh.layout.dp)
    return micro_batches(rows(share.start, len(share), engine.model_config.vocab_size), MICRO_BATCH)


def _gradients(engine: Engine) -> list[torch.Tensor]:
    """Returns the gradients that DeepSpeed's optimizers keep between two backward passes, wherever they keep them."""
    if isinstance(engine.zero, DistributedOptimizer):
        return [bucket.gradients for bucket in engine.zero.buckets]
    known: Any = engine.zero.optimizer
    found = [getattr(known, "grad_partitions_flat_buffer", None)]
    for name in ("averaged_gradients", "all_grad_tensors"):
        for held in getattr(known, name, {}).values():
            found += list(held or [])
    for parameter in engine.module.parameters():
        found += [getattr(parameter, name, None) for name in ("grad", "grad_accum")]
    return [tensor for tensor in found if tensor is not None]


def _elements(tensors: list[torch.Tensor]) -> int:
    """Returns the number of elements of the tensors' storages, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // t.element_size() for t in tensors}
    return sum(storages.values())


def step_with_an_infinite_loss(model: dict[str, Any], parallel: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Runs a step whose loss is infinite on rank 0; returns the error and whether the engine's state is unchanged."""
    engine = make_engine(model, parallel, dtype)
    before = state(engine)
    loss_fn = Infinite() if engine.mesh.is_main else NextToken()
    try:
        error = str(engine.train_step(batches_of(engine), loss_fn, lr=1e-2).grad_norm)
    except FloatingPointError as raised:
        error = str(raised)
    after = state(engine)
    groups.stop()
    return {"error": error, "same": all(torch.equal(a, b) for a, b in zip(before, after, strict=True))}


def state(engine: Engine) -> list[torch.Tensor]:
    """Returns copies of the master weights and of the balance of experts."""
    weights = [zero.full_weight(parameter).clone() for parameter in engine.module.parameters()]
    return [*weights, *(tensor.clone() for tensor in engine.module.named_balance().values())]
