"""Functions run in the ranks: what `DistributedOptimizer` sends in a training step, and when."""

import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from pretrain.checkpoint import state
from pretrain.doctor.collective_speed import measured
from pretrain.model.losses import NextToken
from pretrain.model.slices import is_expert, tp_split
from pretrain.parallel import collectives, distributed_optimizer, groups, zero
from pretrain.parallel.distributed_optimizer import DistributedOptimizer
from tests.parallel.workers.layouts import make_engine
from tests.parallel.workers.sharing import batches_of


def speed(delay: float) -> str:
    """Measures all-reduces, each of which rank 1 enters `delay` seconds late."""
    right = dist.all_reduce

    def late(tensor: torch.Tensor) -> None:
        time.sleep(delay * dist.get_rank())
        right(tensor)

    with mock.patch.object(dist, "all_reduce", late):
        return measured(torch.device("cpu"))


def sums(elements: int, dtype: str, buckets: int) -> dict[str, bool]:
    """Reduces and gathers tensors of `elements` for each rank, several under way at once, and checks every bit."""
    group, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    assert group is not None

    def drawn(bucket: int, rank: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 * bucket + rank)
        return torch.randn(size * elements, generator=generator).to(getattr(torch, dtype))

    flats = [drawn(bucket, rank) for bucket in range(buckets)]
    started = [collectives.start_reduce_scatter(flat, group, tag=i) for i, flat in enumerate(flats)]
    for pending in reversed(started):
        pending.wait()
    expected, right = [], True
    for bucket, flat in enumerate(flats):
        total = drawn(bucket, 0)
        for other in range(1, size):
            total += drawn(bucket, other)
        own = collectives.own_part(flat, group)
        right &= torch.equal(flat[own], total[own])
        expected.append(total)
    started = [collectives.start_all_gather(flat, group, tag=i) for i, flat in enumerate(flats)]
    for pending in started:
        pending.wait()
    return {"reduced": right, "gathered": all(map(torch.equal, flats, expected))}


def sent(model: dict[str, Any], parallel: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Elements of all that a step sends over data parallel, and the order of backward passes, reductions and updates.

    What goes to other ranks, as activations do under tensor parallel, does not count.
    `events` has "gradient" for each gradient that a backward pass brings, "reduce" and "gather" for each collective
    that begins, and "update" for each bucket that AdamW has updated.
    """
    events: list[str] = []
    messages: dict[str, list[int]] = {"gradients": [], "weights": []}
    others: dict[str, int] = {}
    own_groups: list[dist.ProcessGroup] = []
    isend = dist.isend

    def send(tensor: torch.Tensor, **options: Any) -> Any:
        if options.get("group") in own_groups:
            kind = "weights" if options["tag"] % 2 else "gradients"
            assert tensor.dtype == (torch.float32 if kind == "gradients" else getattr(torch, dtype))
            messages[kind].append(tensor.numel())
        return isend(tensor, **options)

    def noted(event: str, right: Callable[..., Any]) -> Callable[..., Any]:
        def note(*args: Any, **options: Any) -> Any:
            events.append(event)
            return right(*args, **options)

        return note

    def counted(name: str) -> Callable[..., Any]:
        right = getattr(dist, name)

        def count(*args: Any, **options: Any) -> Any:
            if options.get("group") in [None, *own_groups]:
                others[name] = others.get(name, 0) + sum(arg.numel() for arg in args if torch.is_tensor(arg))
            return right(*args, **options)

        return count

    with ExitStack() as stack:
        patch = lambda *names_and_value: stack.enter_context(mock.patch.object(*names_and_value))  # noqa: E731
        patch(distributed_optimizer, "BUCKET_SIZE", 4000)
        patch(DistributedOptimizer, "_take", noted("gradient", DistributedOptimizer._take))
        engine = make_engine(model, parallel, dtype)
        own_groups += [engine.mesh.zero_group, engine.mesh.expert_dp_group]
        patch(dist, "isend", send)
        for name in ("all_reduce", "all_gather", "reduce_scatter_tensor", "all_gather_into_tensor", "broadcast"):
            patch(dist, name, counted(name))
        patch(distributed_optimizer, "start_reduce_scatter", noted("reduce", collectives.start_reduce_scatter))
        patch(distributed_optimizer, "start_all_gather", noted("gather", collectives.start_all_gather))
        patch(engine.zero.adam, "step", noted("update", engine.zero.adam.step))
        batches = batches_of(engine)
        engine.train_step(batches, NextToken(), lr=1e-2)
        engine.zero.wait_for_weights()
    sizes = [(dist.get_world_size(bucket.group), len(bucket.weights)) for bucket in engine.zero.buckets]
    result = {
        "events": events,
        "messages": messages,
        "others": others,
        "expected": [elements // ranks for ranks, elements in sizes for _ in range(ranks - 1)],
        "shared": sum(ranks > 1 for ranks, _ in sizes),
        "alone": sum(ranks == 1 for ranks, _ in sizes),
        "elements": sum(elements for _, elements in sizes),
        "parameters": sum(p.numel() for p in engine.module.parameters()),
        "gradients": sum(1 for _ in engine.module.parameters()),
        "micro_batches": len(batches),
        "padding": sum(ranks * distributed_optimizer.ALIGNMENT for ranks, _ in sizes),
    }
    groups.stop()
    return result


def taken(model: dict[str, Any], dtype: str) -> dict[str, bool]:
    """Trains a step, then accumulates the gradient of one parameter over two micro-batches, and none of the others."""
    engine = make_engine(model, {}, dtype)
    engine.train_step(batches_of(engine), NextToken(), lr=1e-2)
    engine.zero.begin(2)
    used, *others = engine.module.parameters()
    drawn = torch.Generator().manual_seed(0)
    total = torch.zeros(used.shape)
    for _ in range(2):
        gradient = torch.randn(used.shape, generator=drawn).to(used.dtype)
        (used * gradient).sum().backward()
        total += gradient
    engine.zero.finish()
    result = {
        "used": torch.equal(zero.full_gradient(used), dist.get_world_size() * total),
        "others": all(not zero.full_gradient(parameter).any() for parameter in others),
    }
    groups.stop()
    return result


class _Late:
    """A collective whose messages are sent only when somebody waits for them."""

    def __init__(self, flat: torch.Tensor, group: dist.ProcessGroup, tag: int):
        self._arguments = flat, group, tag

    def wait(self) -> None:
        collectives.start_all_gather(*self._arguments).wait()


def read(model: dict[str, Any], parallel: dict[str, Any], dtype: str, late: bool) -> dict[str, Any]:
    """Returns what steps, an evaluation and reads of weights give; if `late`, weights arrive when waited for."""
    slow = mock.patch.object(distributed_optimizer, "start_all_gather", _Late) if late else nullcontext()
    with mock.patch.object(distributed_optimizer, "BUCKET_SIZE", 4000), slow:
        engine = make_engine(model, parallel, dtype)
        batches = batches_of(engine)
        found: dict[str, Any] = {"losses": [], "weights": {}}
        for _ in range(3):
            found["losses"].append(engine.train_step(batches, NextToken(), lr=1e-2).mean_loss)
        found["heldout"] = engine.evaluate(batches, NextToken()).mean_loss
        engine.train_step(batches, NextToken(), lr=1e-2)
        for name, parameter in engine.module.named_global_parameters():
            found["weights"][name] = zero.current_weight(parameter).double().sum().item()
        engine.train_step(batches, NextToken(), lr=1e-2)
        found["gathered"] = {name: w.double().sum().item() for name, w in state.gather_weights(engine).items()}
        engine.train_step(batches, NextToken(), lr=1e-2)
        state.copy_owned(engine, {})
        found["after_copy"] = [p.detach().double().sum().item() for p in engine.module.parameters()]
        pending = [bucket.index for bucket in engine.zero.buckets if bucket.gathering is not None]
    groups.stop()
    return {**found, "pending": pending}


def norms(model: dict[str, Any], parallel: dict[str, Any], dtype: str, steps: int) -> dict[str, Any]:
    """Gradient norms of `steps` clipped steps as this rank has them, and a checksum of each weight it holds whole."""
    engine = make_engine(model, parallel, dtype)
    found = [engine.train_step(batches_of(engine), NextToken(), lr=1e-2).grad_norm for _ in range(steps)]
    weights = {
        name: zero.current_weight(parameter).double().sum().item()
        for name, parameter in engine.module.named_global_parameters()
        if tp_split(parameter) is None and not is_expert(parameter)
    }
    groups.stop()
    return {"norms": found, "weights": weights}
