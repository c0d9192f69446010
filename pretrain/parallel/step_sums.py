"""Results of a step, which come from the device to the host in one small copy that nothing waits for.

A GPU works through a queue that the host fills. If the host asks for a value, it waits until the queue is empty, and
the GPU then waits for the host. So a step asks for nothing: what it computed is copied into host memory when the GPU
gets there, and the train loop reads it a step later.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch

NOT_FINITE = "the gradient norm is not finite; no weight was changed by this step"


class HostCopy:
    """A copy of small tensors in host memory, in fp64, which begins when the object is made."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors.values()])
        self._copied: torch.cuda.Event | None = None
        if flat.device.type == "cuda":
            self._host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            self._host.copy_(flat, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._host = flat

    @property
    def is_there(self) -> bool:
        """True if `tensors` would return without waiting."""
        return self._copied is None or self._copied.query()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Waits for the copy and returns it, as CPU tensors of the shapes that were given."""
        if self._copied is not None:
            self._copied.synchronize()
        parts = self._host.split([shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self._shapes.items(), strict=True)}


class StepSums:
    """Results of a step over the global batch; the first one that is asked for waits for the step.

    Every rank has the same. `sums` [2 * sources + metrics] holds, for each source, the loss summed over trained tokens
    and the sum of the loss mask, then the sums of the loss function's metrics `names`, then what `busy` returns.
    `grad_norm` is the global norm before clipping, `experts` the result of `expert_balance.counts`, and `details` that
    of `StepDetails.finish`; an evaluation has none of them.

    Asking for any result raises FloatingPointError if the norm is not finite: the step then changed no weight. Results
    with `applied` raise no error; it says whether the step changed weights.
    """

    def __init__(
        self,
        sums: torch.Tensor,
        num_sources: int,
        names: Sequence[str],
        grad_norm: torch.Tensor | None = None,
        experts: torch.Tensor | None = None,
        applied: torch.Tensor | None = None,
        details: Mapping[str, torch.Tensor] | None = None,
    ):
        self._num_sources, self._names, self._detail_names = num_sources, names, tuple(details or ())
        parts = {"sums": sums, "grad_norm": grad_norm, "experts": experts, "applied": applied, **(details or {})}
        self._on_device = {name: part for name, part in parts.items() if part is not None}
        self._copy: HostCopy | None = None

    def of_step(
        self,
        grad_norm: torch.Tensor,
        experts: torch.Tensor | None,
        applied: torch.Tensor | None = None,
        details: Mapping[str, torch.Tensor] | None = None,
    ) -> "StepSums":
        """Returns these sums with the other results of a training step, whose copies to the host have begun."""
        made = StepSums(self._on_device["sums"], self._num_sources, self._names, grad_norm, experts, applied, details)
        made._copy = HostCopy(made._on_device)
        made._on_device = {}
        return made

    @property
    def is_there(self) -> bool:
        """True if results can be asked for without waiting."""
        return self._copy is not None and self._copy.is_there

    @property
    def loss(self) -> torch.Tensor:
        """The loss of each source [sources], summed over trained tokens, on the host."""
        return self._host["sums"][: self._num_sources]

    @property
    def weight(self) -> torch.Tensor:
        """The sum of the loss mask over each source's tokens [sources], on the host."""
        return self._host["sums"][self._num_sources : 2 * self._num_sources]

    @property
    def mean_loss(self) -> float:
        """The loss per trained token of the global batch."""
        return float(self.loss.sum() / self.weight.sum().clamp(min=1e-12))

    @property
    def weights(self) -> list[float]:
        """The values of `weight`."""
        return self.weight.tolist()

    @property
    def mean_losses(self) -> list[float | None]:
        """The loss per trained token of each source; None for a source without one."""
        pairs = zip(self.loss.tolist(), self.weights, strict=True)
        return [loss / weight if weight else None for loss, weight in pairs]

    @property
    def metrics(self) -> dict[str, float]:
        """The loss function's metrics, as means over tokens weighted by the loss mask."""
        weight = float(self.weight.sum().clamp(min=1e-12))
        values = self._host["sums"][2 * self._num_sources :][: len(self._names)]
        return {name: float(value) / weight for name, value in zip(self._names, values, strict=True)}

    @property
    def busy(self) -> list[float]:
        """The seconds that each rank worked in the step before; none of an evaluation."""
        return self._host["sums"][2 * self._num_sources + len(self._names) :].tolist()

    @property
    def grad_norm(self) -> float:
        """The global norm of the gradient before clipping, the same on every rank."""
        return float(self._host["grad_norm"])

    @property
    def applied(self) -> bool:
        """Whether the step changed weights."""
        return bool(self._host["applied"]) if "applied" in self._host else True

    @property
    def experts(self) -> torch.Tensor | None:
        """The result of `expert_balance.counts`, on the host."""
        return self._host.get("experts")

    @property
    def details(self) -> dict[str, torch.Tensor]:
        """The result of `StepDetails.finish`, on the host; empty for a step that was not detailed."""
        return {name: self._host[name] for name in self._detail_names}

    @cached_property
    def _host(self) -> dict[str, torch.Tensor]:
        found = (self._copy or HostCopy(self._on_device)).tensors()
        norm = found.get("grad_norm")
        if norm is not None and "applied" not in found and not bool(norm.isfinite()):
            raise FloatingPointError(NOT_FINITE)
        return found
