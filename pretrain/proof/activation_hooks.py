"""Hooks into an engine that record its activations, and that record or replay the experts its routers choose."""

from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from pretrain.model.layers import Norm, is_recomputing
from pretrain.model.moe import MoE
from pretrain.parallel.engine import Engine
from pretrain.parallel.groups import Mesh
from pretrain.proof.step_reader import RecordedStep


class Slice(NamedTuple):
    """The position of a rank's tensor in the whole tensor, and the shape of the whole."""

    offset: tuple[int, ...]
    whole: tuple[int, ...]


class Recorder:
    """The tensors that a rank has recorded so far, by name, each with its slice."""

    def __init__(self, mesh: Mesh):
        self.tensors: dict[str, torch.Tensor] = {}
        self.slices: dict[str, Slice] = {}
        self._mesh = mesh

    def keep(self, key: str, tensor: torch.Tensor, slice_: Slice) -> None:
        """Copies a tensor to host memory, in fp32 or better."""
        wide = torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
        self.tensors[key] = tensor.detach().to("cpu", wide).contiguous().clone()
        self.slices[key] = slice_

    def keep_part(self, key: str, tensor: torch.Tensor, part: tuple[int, int]) -> None:
        """Copies part (index, count) of a tensor whose first dimension, the sequence, is split over ranks."""
        (index, count), (length, *rest) = part, tensor.shape
        self.keep(key, tensor, Slice((index * length, *[0] * len(rest)), (count * length, *rest)))


class Trace:
    """Records, by hooks, every layer's output and the gradient with respect to it, for each micro-batch."""

    def __init__(self, engine: Engine, recorder: Recorder, first_micro_batch: int, micro_batch_size: int):
        self._recorder, self._mesh, self._calls = recorder, engine.mesh, Counter[str]()
        self._first, self._batch, self._factor = first_micro_batch, micro_batch_size, engine.loss_factor
        self._hooks: list[Any] = []
        for chunk in engine.module.chunks:
            if chunk.stage.is_first:
                # Modules of multi-token prediction on the same stage look up tokens after the model has done so.
                modules = chunk.model_config.head.mtp_depth if chunk.stage.is_last else 0
                self._watch("embedding", chunk.embedding, every=1 + modules)
            for layer, block in chunk.blocks.items():
                self._watch(f"layers.{layer}.attention", block.attention)
                kind = "moe" if block.is_moe else "mlp"
                self._watch(f"layers.{layer}.{kind}", getattr(block, kind))
                self._watch(f"layers.{layer}", block)
                if block.is_moe:
                    self._watch(f"layers.{layer}.moe.router", block.moe.router, self._logits)
            if chunk.stage.is_last:
                self._watch("final_norm", chunk.final_norm)

    def stop(self) -> None:
        """Removes the hooks; what was recorded stays."""
        for hook in self._hooks:
            hook.remove()

    def _watch(
        self,
        name: str,
        module: nn.Module,
        output_of: Callable[[Any], torch.Tensor] | None = None,
        every: int = 1,
    ) -> None:
        """Records the first of `every` calls, the number in a micro-batch."""
        # A router sees the whole sequence of its context-parallel rank also where sequence parallel splits it.
        part = self._mesh.sequence_part if output_of is None else (self._mesh.cp_rank, self._mesh.layout.cp)

        def forward(_: nn.Module, __: Any, output: Any) -> None:
            if is_recomputing():
                return
            batch, call = divmod(self._calls[name], every)
            self._calls[name] += 1
            if call:
                return
            key = f"{name}/{self._first + batch}"
            tensor = output if output_of is None else output_of(output)

            def backward(gradient: torch.Tensor) -> None:
                # The engine multiplies its loss by this factor, which its sums over ranks undo.
                self._recorder.keep_part(f"backward/{key}", gradient / self._factor, part)

            if output_of is None:
                self._recorder.keep_part(f"forward/{key}", tensor, part)
                if tensor.requires_grad:  # a frozen embedding's output does not
                    tensor.register_hook(backward)
            else:  # ZeRO-3 copies a module's outputs, so that the gradient of one does not stand for the whole
                self._recorder.keep_part(f"forward/{key}", tensor.view(-1, self._batch, tensor.shape[-1]), part)

        self._hooks.append(module.register_forward_hook(forward))

    def _logits(self, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return output[2]


class NormTerms:
    """Sums up, by hooks, the squares of the terms whose sum is the gradient of a norm's weight: one for each token.

    The terms of other weights need no count: their tensors are large, and terms cancel in none of them as a whole.
    """

    def __init__(self, engine: Engine):
        self.squares: dict[str, float] = defaultdict(float)
        self._factor = engine.loss_factor
        for chunk in engine.module.chunks:
            for name, module in chunk.named_modules():
                if isinstance(module, Norm):
                    module.register_forward_hook(partial(self._watch, name))

    def _watch(self, name: str, norm: Norm, _: Any, output: torch.Tensor) -> None:
        if not output.requires_grad or is_recomputing():
            return
        bias = getattr(norm, "bias", None)
        normalized = (output.detach() - (0 if bias is None else bias.detach())) / norm.factor.detach()

        def add(gradient: torch.Tensor) -> None:
            scaled = gradient / self._factor
            self.squares[f"{name}.weight"] += float((scaled * normalized).double().square().sum())
            if bias is not None:
                self.squares[f"{name}.bias"] += float(scaled.double().square().sum())

        output.register_hook(add)


class ExpertChoices:
    """Records the experts that every router chooses, or makes routers choose what another run recorded.

    Where two experts have nearly the same score, rounding decides which one a token goes to, and all that follows
    differs by more than rounding. Layouts therefore replay the choices of the one rank. Nothing is hidden by that: a
    choice is a function of the router's logits, which are compared, and of its bias, which is compared too.
    """

    def __init__(self, engine: Engine, recorder: Recorder, micro_batch_size: int, recorded: RecordedStep | None):
        self._mesh, self._recorder, self._recorded = engine.mesh, recorder, recorded
        self._batch, self._phase, self._first = micro_batch_size, "", 0
        self._calls = Counter[tuple[int, bool]]()
        for layer, moe in engine.module.moe_layers.items():
            self._around(layer, moe)

    def begin(self, phase: str, first_micro_batch: int) -> None:
        """Starts a pass over micro-batches, which are numbered from `first_micro_batch`."""
        self._phase, self._first = phase, first_micro_batch
        self._calls.clear()

    def _around(self, layer: int, moe: MoE) -> None:
        choose = moe.router._choose
        index, count = self._mesh.cp_rank, self._mesh.layout.cp

        def chosen(scores_TE: torch.Tensor) -> torch.Tensor:
            again = is_recomputing()  # the backward pass visits micro-batches in the same order
            key = f"choice/{self._phase}/{layer}/{self._first + self._calls[layer, again]}"
            self._calls[layer, again] += 1
            if self._recorded is not None:
                experts = self._recorded.copies(key)[0].chunk(count)[index].flatten(0, 1)
                return experts.to(scores_TE.device, torch.int64)
            experts_TK = choose(scores_TE)
            if not again:
                whole = experts_TK.to(torch.int32).view(-1, self._batch, experts_TK.shape[1])
                self._recorder.keep_part(key, whole, (index, count))
            return experts_TK

        vars(moe.router)["_choose"] = chosen
