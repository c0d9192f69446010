"""Converts ZeRO's flat partitions to pieces of global tensors and back, to save and restore an engine in any layout.

Under ZeRO each rank owns a range (`Fragment`) of the fp32 master weight and of Adam's moments of some parameters.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from configs.adapters import AdapterConfig
from configs.differences import changes
from configs.loader import ConfigError, plain
from configs.reference import toml_value
from pretrain.checkpoint import storage
from pretrain.checkpoint.adapter_base import base_of
from pretrain.checkpoint.storage import CheckpointError, Piece, Reader
from pretrain.checkpoint.whole_model import WholeTensors, open_model
from pretrain.model import value_head
from pretrain.model.adapters import is_adapter, is_state, merged
from pretrain.model.adapters.quantized_base import quantized_weights
from pretrain.parallel import expert_balance, zero
from pretrain.parallel.engine import Engine
from pretrain.parallel.zero import Fragment, master_partitions


def copy_owned(engine: Engine, host: dict[str, torch.Tensor]) -> dict[str, tuple[Piece, dict[str, torch.Tensor]]]:
    """Copies the pieces that this rank writes to host memory, after which the engine may take its next step.

    Each element of each parameter is written by exactly one rank; frozen weights only where no other checkpoint has
    them. `host` keeps the memory from one save to the next: 12
    bytes for each parameter that the rank owns, touched and (on a GPU node) pinned once.
    """
    zero.wait_for_weights(engine.zero)  # a run may end after this, and with it what other ranks still wait for
    pieces = {}
    for name, (piece, kinds) in chain(_owned(engine), _frozen(engine)):
        copies = {}
        for kind, tensor in kinds.items():
            key = f"{kind}/{name}"
            if key not in host:
                host[key] = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=tensor.is_cuda)
            copies[kind] = host[key].copy_(tensor, non_blocking=tensor.is_cuda)
        pieces[name] = piece, copies
    if engine.mesh.device.type == "cuda":
        torch.cuda.synchronize()
    return pieces


def manifest_facts(engine: Engine) -> dict[str, Any]:
    """Returns an engine's entries for a manifest: Adam's step count, expert balance, and its base. Collective."""
    steps = max(engine.mesh.gather_json(zero.steps_done(engine.zero)))  # a rank may have nothing to train
    facts = {"optimizer_steps": steps, "balance": expert_balance.state(engine.module, engine.mesh)}
    return facts | ({"base": engine.base} if engine.base else {})


def restore(engine: Engine, path: str | Path) -> None:
    """Fills master weights, model weights, moments and expert balance from a checkpoint of any layout.

    Frozen weights that it does not hold come from its base.
    """
    with Reader(path) as reader:
        base = base_of(Path(path), reader.manifest)
        named = engine.module.named_global_parameters()
        frozen = [name for name, p in named if not (p.requires_grad or is_state(name))]
        _check_shapes(engine, reader, required=list(engine.module.named_balance()), new=frozen if base else ())
        _make_moments(engine, reader.manifest["optimizer_steps"])
        for kind in storage.KINDS:
            _fill(engine, partial(reader.read, kind=kind), kind)
        with nullcontext(reader) if base is None else open_model(base) as holder:
            _fill_frozen(engine, lambda name: (reader if is_state(name) else holder).read(name))
    expert_balance.restore(engine.module, reader.balance)
    zero.update_weights(engine.zero)


def begin_from(engine: Engine, tensors: WholeTensors) -> list[str]:
    """Fills master weights and model weights with those of another model, with which a new run begins.

    The router bias of MoE layers is taken over. Their load, a statistic of the last step, is taken if there is one. A
    scalar head that the other model, a language model, lacks keeps its initial weights, and so do modules of
    multi-token prediction; no other parameter may be lacking, but those of adapters, which are new unless the other
    model has such adapters itself. Returns the names of the other parameters and modules that are new, the same on all
    ranks. Raises ConfigError if the model has adapters that can neither be merged nor be trained on.
    """
    if tensors.adapter is not None and tensors.adapter != engine.adapter:
        keys = {"kind": tensors.adapter.kind, **changes(plain(AdapterConfig()), plain(tensors.adapter))}
        written = ", ".join(f"adapter.{key}={toml_value(getattr(tensors.adapter, key))}" for key in keys)
        raise ConfigError(
            f"{tensors.path} has adapters of kind {tensors.adapter.kind!r}, which cannot be merged into its weights; "
            f"set {written} to train them further, or begin from the model that they were trained on"
        )
    engine.adapters_are_new = tensors.adapter is None
    config, own = engine.model_config, [name for name, _ in engine.module.named_global_parameters()]
    head = [] if config.has_logits else [value_head.NAME]
    modules = [f"layers.{layer.index}" for layer in config.mtp_layers]
    said = [name for name in head if name not in tensors.shapes]
    said += [name for name in modules if f"{name}.joint_proj.weight" not in tensors.shapes]
    new = [name for name in own if name in said or name.startswith(tuple(f"{each}." for each in said))]
    adapters = [name for name in own if is_adapter(name) and tensors.adapter is None]
    _check_shapes(engine, tensors, required=[], new=[*new, *adapters])
    _fill(engine, tensors.read, "weight", [*new, *adapters])
    _fill_frozen(engine, tensors.read, [*new, *adapters])
    expert_balance.restore(engine.module, tensors.balance)
    zero.update_weights(engine.zero)
    return said


def fill_evaluated(engine: Engine, tensors: WholeTensors) -> None:
    """Copies a model's tensors into an engine that only evaluates.

    Raises CheckpointError if the tensors are of another model.
    """
    _check_shapes(engine, tensors, required=[])
    _fill_frozen(engine, tensors.read)
    expert_balance.restore(engine.module, tensors.balance)


def _fill(engine: Engine, read: Callable[[str], torch.Tensor], kind: str, new: Sequence[str] = ()) -> None:
    for name, parameter, own in _fragments(engine):
        if name in new:
            continue
        local = engine.mesh.slices.cut(read(name), parameter).flatten()
        _flat(engine, own, kind).copy_(local[own.start : own.start + own.numel])


@torch.no_grad()
def _fill_frozen(engine: Engine, read: Callable[[str], torch.Tensor], new: Sequence[str] = ()) -> None:
    for name, parameter in engine.module.named_global_parameters():
        if not parameter.requires_grad and name not in new:
            parameter.copy_(engine.mesh.slices.cut(read(name), parameter))
    for chunk in engine.module.chunks:
        for name, quantized in quantized_weights(chunk):
            quantized.fill(read(name), engine.mesh.slices)


@dataclass(frozen=True)
class Masters:
    """A copy, in host memory, of the master weights that this rank owns, and of the balance of its experts."""

    weights: dict[str, torch.Tensor]
    balance: dict[str, torch.Tensor]

    @classmethod
    def of(cls, engine: Engine) -> "Masters":
        """Copies the engine's present weights. Collective."""
        zero.wait_for_weights(engine.zero)
        own = {name: _flat(engine, own, "weight").cpu().clone() for name, _, own in _fragments(engine)}
        balance = {name: tensor.clone() for name, tensor in engine.module.named_balance().items()}
        return cls(own, balance)

    def put(self, engine: Engine) -> None:
        """Gives the engine these weights, and leaves its moments as they are. Collective."""
        for name, _, own in _fragments(engine):
            _flat(engine, own, "weight").copy_(self.weights[name])
        expert_balance.restore(engine.module, self.balance)
        zero.update_weights(engine.zero)


def gather_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Gathers the whole model's weights in its own precision on every rank, by global name, for rollouts.

    Adapters are merged into them, or are among them if they cannot be merged. Each rank needs memory for a whole copy.
    """
    return dict(gathered_weights(engine))


def gathered_weights(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (global name, whole tensor) of all that `gather_weights` returns, one after another. Collective."""
    if engine.separate_adapter is not None or engine.adapter is None:
        yield from _gathered(engine)
        return
    parts = dict(_gathered(engine))
    whole = merged(list(parts), parts.__getitem__, engine.adapter)
    for name, tensor in parts.items():
        if not is_adapter(name):
            yield name, whole[name]() if name in whole else tensor


def _gathered(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    mesh = engine.mesh
    balance = expert_balance.state(engine.module, engine.mesh)
    yield from ((name, torch.tensor(values)) for name, values in balance.items())
    done: set[str] = set()
    local = {name: p for name, p in engine.module.named_global_parameters() if not is_state(name)}
    made = {name: own for chunk in engine.module.chunks for name, own in quantized_weights(chunk)}
    outlines = {name: zero.outline(p) for name, p in local.items()} | {name: q.outline for name, q in made.items()}
    shapes = mesh.gather_json({name: list(outline.shape) for name, outline in outlines.items()})
    for stage_rank in dist.get_process_group_ranks(mesh.pp_group):
        for name, shape in shapes[stage_rank].items():
            if name in done:
                continue
            done.add(name)
            whole = None
            if stage_rank == mesh.rank:
                own = made[name].weight() if name in made else zero.current_weight(local[name])
                whole = mesh.gather_whole(own, outlines[name] if name in made else local[name])
            yield name, _from_stage(whole, len(shape), stage_rank, engine)


def _from_stage(whole: torch.Tensor | None, ndim: int, stage_rank: int, engine: Engine) -> torch.Tensor:
    """Broadcasts one whole parameter from the stage that holds it to all stages; the others pass None."""
    mesh = engine.mesh
    if mesh.layout.pp == 1:
        assert whole is not None
        return whole
    shape = torch.zeros(ndim, dtype=torch.int64, device=mesh.device)
    if whole is not None:
        shape.copy_(torch.tensor(whole.shape))
    dist.broadcast(shape, stage_rank, group=mesh.pp_group)
    if whole is None:
        dtype = next(engine.module.parameters()).dtype
        whole = torch.empty(shape.tolist(), dtype=dtype, device=mesh.device)
    whole = whole.contiguous()
    dist.broadcast(whole, stage_rank, group=mesh.pp_group)
    return whole


def _owned(engine: Engine) -> Iterator[tuple[str, tuple[Piece, dict[str, torch.Tensor]]]]:
    """Yields the pieces that this rank writes, as views into ZeRO's partitions."""
    mesh = engine.mesh
    _make_moments(engine, zero.steps_done(engine.zero))
    for name, parameter, own in _fragments(engine):
        shape = mesh.slices.shape(parameter)
        own = replace(own, numel=min(own.numel, math.prod(shape) - own.start))  # the last rows may be padding
        if getattr(parameter, "ds_pipe_replicated", False) or not mesh.is_first_copy(parameter) or own.numel <= 0:
            continue
        whole, offset = mesh.slices.global_shape(parameter), mesh.slices.offset(parameter)
        piece = Piece(name, whole, offset, shape, own.start, own.numel)
        yield name, (piece, {kind: _flat(engine, own, kind) for kind in storage.KINDS})


def _frozen(engine: Engine) -> Iterator[tuple[str, tuple[Piece, dict[str, torch.Tensor]]]]:
    """Yields the frozen weights that this rank writes: whole slices of which it is the first holder.

    If the run's base holds the frozen weights, only the numbers of AdaLoRA's schedule are written.
    """
    mesh = engine.mesh
    for name, parameter in engine.module.named_global_parameters():
        if parameter.requires_grad or (engine.base and not is_state(name)):  # ZeRO-3 leaves no shape to what is trained
            continue
        is_copy = getattr(parameter, "ds_pipe_replicated", False) or not mesh.is_first_copy(parameter)
        shape = mesh.slices.shape(parameter)
        if is_copy or not mesh.is_first_holder(parameter) or not math.prod(shape):
            continue
        whole, offset = mesh.slices.global_shape(parameter), mesh.slices.offset(parameter)
        weight = mesh.slices.without_padding(parameter.detach(), parameter).flatten()
        yield name, (Piece(name, whole, offset, shape, 0, len(weight)), {"weight": weight})


def _fragments(engine: Engine) -> Iterator[tuple[str, nn.Parameter, Fragment]]:
    """Yields (global name, outline, fragment) of every parameter of which this rank owns a range."""
    for name, parameter in engine.module.named_global_parameters():
        own = zero.fragment(engine.zero, parameter)
        if own is not None:
            yield name, zero.outline(parameter), own


def _flat(engine: Engine, own: Fragment, kind: str) -> torch.Tensor:
    """Returns this rank's range of the master weight or of a moment, as a view into ZeRO's flat partition."""
    partition = master_partitions(engine.zero)[own.partition]
    flat = partition if kind == "weight" else zero.adam(engine.zero).state[partition][kind]
    return flat.data.narrow(0, own.offset, own.numel)


def _make_moments(engine: Engine, optimizer_steps: int) -> None:
    """Makes Adam's state if there is none: Adam does so in its first step, but a save or restore may come before."""
    for partition in master_partitions(engine.zero):
        state = zero.adam(engine.zero).state[partition]
        if "exp_avg" not in state:
            # Fused kernels require it on the partition's device.
            state["step"] = torch.zeros((), dtype=torch.float32, device=partition.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(partition), torch.zeros_like(partition)
        state["step"].fill_(optimizer_steps)


def _check_shapes(
    engine: Engine, tensors: WholeTensors | Reader, required: Sequence[str], new: Sequence[str] = ()
) -> None:
    """Raises CheckpointError if the model's parameters are not those of the checkpoint, whose config it has by now.

    `required` are names of the balance of MoE layers that must be there, `new` those of parameters that need not.
    """
    saved, balance = tensors.shapes, tensors.balance
    other = "in this version of Trivium; use the version that trained it, or train it again in another run.dir"
    for name in required:
        if name not in balance:
            raise CheckpointError(f"{tensors.path} has no {name}, which its model has {other}")
    for name, parameter in engine.module.named_global_parameters():
        if name in new:
            continue
        shape = tuple(engine.mesh.slices.global_shape(zero.outline(parameter)))
        if name not in saved:
            raise CheckpointError(f"{tensors.path} has no {name}, which its model has {other}")
        if saved[name] != shape:
            raise CheckpointError(
                f"{name} is {list(saved[name])} in {tensors.path}, and its model has {list(shape)} {other}"
            )
