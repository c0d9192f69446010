"""Observation of what the modules of a model compute in one step, tensor by tensor, on each rank.

It costs a call in Python for every tensor, and is meant for a step that is taken again, not for training. Compiled
blocks are computed as they are written, since compiled code calls no hooks; their numbers may differ in rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from pretrain.model.decoder import Decoder
from pretrain.model.moe.experts import Experts
from pretrain.parallel.engine import Engine

INPUT, OUTPUT, OUTPUT_GRADIENT, WEIGHT_GRADIENT = "input", "output", "gradient of the output", "gradient"


@dataclass(frozen=True, order=True)
class TensorPosition:
    """The position of a tensor in a step. Ranks of a tensor or context parallel group see the same positions.

    `micro_batch` counts those of this rank from 0. `stage` is the virtual pipeline stage. `order` counts the tensors of
    a micro-batch's forward pass of that stage, and those of all backward passes of the rank. `module` is the path of a
    module, or of a weight.
    """

    micro_batch: int
    stage: int
    order: int
    module: str


See = Callable[[str, TensorPosition, torch.Tensor], None]


@contextmanager
def observed(engine: Engine, see: See) -> Iterator[None]:
    """Context in which `see` gets each floating-point tensor of forward and backward passes, with kind and position.

    The output of a chunk itself has the path "": on the last stage it is the loss. Rows of experts are left out, since
    those of tokens that no expert takes are undefined. `see` must not change the tensors.
    """
    with ExitStack() as stack:
        backward = _Backward(see)
        for index, chunk in enumerate(engine.module.chunks):
            stage = index * engine.mesh.layout.pp + engine.mesh.pp_rank
            _observe(chunk, _Forward(see, stage, backward), stack)
        yield


class _Backward:
    """Numbers the gradients of a rank, and knows the micro-batch that the backward pass is in."""

    def __init__(self, see: See):
        self._see, self._order, self._micro_batch = see, 0, 0

    def output(self, stage: int, micro_batch: int, module: str, gradient: torch.Tensor) -> None:
        self._micro_batch = micro_batch
        self._note(OUTPUT_GRADIENT, stage, module, gradient)

    def weight(self, stage: int, name: str, gradient: torch.Tensor) -> None:
        self._note(WEIGHT_GRADIENT, stage, name, gradient)

    def _note(self, kind: str, stage: int, module: str, gradient: torch.Tensor) -> None:
        self._see(kind, TensorPosition(self._micro_batch, stage, self._order, module), gradient)
        self._order += 1


class _Forward:
    """Numbers the tensors of a chunk's forward passes."""

    def __init__(self, see: See, stage: int, backward: _Backward):
        self.stage, self.backward, self._see = stage, backward, see
        self._micro_batch, self._order = -1, 0

    def begin(self, *_: Any) -> None:
        self._micro_batch, self._order = self._micro_batch + 1, 0

    def inputs(self, path: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        for tensor in _floating(args):
            self._note(INPUT, path, tensor)

    def outputs(self, path: str, _: nn.Module, __: Any, output: Any) -> None:
        for tensor in _floating(output if isinstance(output, tuple) else (output,)):
            self._note(OUTPUT, path, tensor)
            if tensor.requires_grad:
                tensor.register_hook(partial(self.backward.output, self.stage, self._micro_batch, path))

    def _note(self, kind: str, path: str, tensor: torch.Tensor) -> None:
        self._see(kind, TensorPosition(self._micro_batch, self.stage, self._order, path), tensor.detach())
        self._order += 1


def _observe(chunk: Decoder, forward: _Forward, stack: ExitStack) -> None:
    for block in chunk.blocks.values():
        if (compiled := vars(block).pop("forward", None)) is not None:
            stack.callback(vars(block).__setitem__, "forward", compiled)
    stack.callback(chunk.register_forward_pre_hook(forward.begin).remove)
    for path, module in chunk.named_modules():
        if isinstance(module, nn.ModuleDict | nn.ModuleList | Experts):
            continue
        stack.callback(module.register_forward_pre_hook(partial(forward.inputs, path)).remove)
        stack.callback(module.register_forward_hook(partial(forward.outputs, path)).remove)
    for name, parameter in chunk.named_global_parameters():
        if parameter.requires_grad:
            stack.callback(parameter.register_hook(partial(forward.backward.weight, forward.stage, name)).remove)


def _floating(values: tuple[Any, ...]) -> list[torch.Tensor]:
    return [value for value in values if torch.is_tensor(value) and value.is_floating_point()]
