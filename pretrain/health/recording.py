"""Record of all that a step computes: norms layer by layer, and the loss and largest logit of each sample."""

import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch

from pretrain.model.batch import Batch
from pretrain.model.decoder import Decoder
from pretrain.model.layers import is_recomputing
from pretrain.model.losses import NextToken
from pretrain.parallel import zero
from pretrain.parallel.distributed_optimizer import counts_in_norm
from pretrain.parallel.engine import Engine

EMBEDDING, FINAL = "embedding", "final norm"
_TOKENS = 256  # whose logits are computed at a time


class RecordedLoss(NextToken):
    """Next-token loss that keeps the loss and the trained tokens of each sample, summed over this rank's tokens."""

    def __init__(self) -> None:
        self.samples: dict[int, tuple[float, float, int]] = {}  # loss, trained tokens, source

    def __call__(self, logprobs_BS: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss_BS, metrics = super().__call__(logprobs_BS, batch)
        losses = (loss_BS.detach() * batch.loss_mask).sum(1, dtype=torch.float64).tolist()
        weights = batch.loss_mask.sum(1, dtype=torch.float64).tolist()
        found = zip(batch.samples or (), losses, weights, batch.sources.tolist(), strict=True)
        # The head asks for the loss's slope first, with no log-probabilities; the last call is the one that counts.
        self.samples |= {sample: (loss, weight, source) for sample, loss, weight, source in found}
        return loss_BS, metrics


class StepRecorder:
    """Context in which a training step of `engine` is recorded. `loss` is the loss function to take the step with.

    Hooks see what the modules compute, and change no number. After the context `gathered` has the record.
    """

    def __init__(self, engine: Engine):
        self.loss = RecordedLoss()
        self._engine, self._mesh = engine, engine.mesh
        self._squares: dict[str, float] = defaultdict(float)
        self._largest: dict[str, float] = defaultdict(float)
        self._gradients: dict[str, float] = defaultdict(float)
        self._weights: dict[str, float] = defaultdict(float)
        self._logits: dict[int, float] = {}
        self._rows: tuple[int, ...] = ()  # the samples of the micro-batch
        self._stack = ExitStack()

    def __enter__(self) -> "StepRecorder":
        for chunk in self._engine.module.chunks:
            named: list[tuple[str, torch.nn.Module]] = [(f"layer {i}", block) for i, block in chunk.blocks.items()]
            named += [(EMBEDDING, chunk.embedding)] if chunk.stage.is_first else []
            named += [(FINAL, chunk.final_norm)] if chunk.stage.is_last else []
            self._stack.callback(chunk.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
            for name, module in named:
                self._hook(module, partial(self._note, name))
            if chunk.stage.is_last:
                self._hook(chunk.final_norm, partial(self._note_logits, chunk))
        self._engine.after_backward = self._note_gradients
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.after_backward = None
        self._stack.close()

    def gathered(self) -> dict[str, Any]:
        """Returns the record of all ranks, on every rank. Collective."""
        parts = self._mesh.gather_json(
            {
                "squares": self._squares,
                "largest": self._largest,
                "gradients": self._gradients,
                "weights": self._weights,
                "logits": self._logits,
                "samples": self.loss.samples if self._mesh.counts_in_sums else {},
            }
        )
        norms = {kind: _norms([part[kind] for part in parts]) for kind in ("squares", "gradients", "weights")}
        largest, logits = (_combined([part[kind] for part in parts], max) for kind in ("largest", "logits"))
        samples: dict[str, list[Any]] = {}
        for part in parts:
            for sample, (loss, weight, source) in part["samples"].items():
                found = samples.setdefault(sample, [0.0, 0.0, source])
                found[0], found[1] = found[0] + loss, found[1] + weight
        return {
            "activation_norm": norms["squares"],
            "largest_activation": largest,
            "gradient_norm": norms["gradients"],
            "weight_norm": norms["weights"],
            "samples": [
                {"sample": int(sample), "loss": loss / weight if weight else None, "trained_tokens": weight}
                | {"source": source, "largest_logit": logits.get(sample)}
                for sample, (loss, weight, source) in sorted(samples.items(), key=lambda item: int(item[0]))
            ],
        }

    def _hook(self, module: torch.nn.Module, see: Callable[[torch.Tensor], None]) -> None:
        def hook(_: Any, __: Any, output: torch.Tensor) -> None:
            if not is_recomputing():
                see(output.detach())

        self._stack.callback(module.register_forward_hook(hook).remove)

    def _begin(self, _: Any, __: Any, kwargs: dict[str, Any]) -> None:
        samples = kwargs["context"].samples
        self._rows = () if samples is None else tuple(samples.tolist())

    def _note(self, name: str, x_SBH: torch.Tensor) -> None:
        self._largest[name] = max(self._largest[name], float(x_SBH.abs().max()))
        if self._mesh.tp_rank == 0 or self._mesh.layout.sp:  # else all tensor-parallel ranks have the same
            self._squares[name] += float(x_SBH.double().square().sum())

    @torch.no_grad()
    def _note_logits(self, chunk: Decoder, x_SBH: torch.Tensor) -> None:
        x_BSH = chunk.region.enter(x_SBH).transpose(0, 1)
        weight, softcap = chunk._head_weight(), chunk.model_config.head.softcap
        own = min(len(weight), max(0, chunk.model_config.vocab_size - self._mesh.tp_rank * len(weight)))
        if not own:
            return  # all of this rank's rows are padding
        for sample, x_SH in zip(self._rows, x_BSH, strict=False):
            largest = max(float((part @ weight[:own].t()).max()) for part in x_SH.split(_TOKENS))
            if softcap is not None:
                largest = softcap * math.tanh(largest / softcap)
            self._logits[sample] = max(largest, self._logits.get(sample, -math.inf))

    def _note_gradients(self) -> None:
        for name, parameter in self._engine.module.named_global_parameters():
            if parameter.requires_grad and counts_in_norm(parameter, self._mesh):
                part = _part_of(name)
                self._gradients[part] += float(zero.gradient(parameter).double().square().sum())
                self._weights[part] += float(zero.own_weight(parameter).double().square().sum())


def _part_of(name: str) -> str:
    """Returns the part of the model that a parameter belongs to: `layer N`, or its module outside the layers."""
    parts = name.split(".")
    return f"layer {parts[1]}" if parts[0] == "layers" else parts[0].replace("_", " ")


def _norms(parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: math.sqrt(total) for name, total in _combined(parts, lambda a, b: a + b).items()}


def _combined(parts: list[dict[str, float]], both: Callable[[float, float], float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            found[name] = both(found[name], value) if name in found else value
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def _order(name: str) -> tuple[int, int]:
    """Orders the parts of a model as they are used: embeddings, layers, the rest."""
    if name.startswith("layer "):
        return 1, int(name.split()[1])
    return (0 if "embedding" in name else 2), 0
