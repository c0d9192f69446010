"""AdaLoRA's budget of ranks in a model that is split over ranks; the formulas are in `pretrain.model.adapters.adalora`.

In each step the penalty's gradient is added once to that of the loss, before the gradient norm is taken. The importance
of triplets is measured on the gradients that the optimizer gets, before it clips them. After the optimizer's step the
triplets of all pipeline stages are compared with one another, each from one rank's numbers, so that all ranks keep the
same ones. A triplet that has lost its l still has its vectors and may come back until the budget is at its end.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from configs.adapters import AdapterConfig
from pretrain.model.adapters.adalora import (
    STATE,
    TRIPLET,
    SVDLowRank,
    budget,
    most_important,
    penalty,
    penalty_gradient,
    smooth,
)
from pretrain.model.slices import marks_of
from pretrain.parallel import zero
from pretrain.parallel.groups import Mesh
from pretrain.parallel.pipeline_stage import PipelineStage


def adapters_in(stage: PipelineStage) -> dict[str, SVDLowRank]:
    """Returns the adapters of a pipeline stage by name."""
    named = (pair for chunk in stage.chunks for pair in chunk.named_modules())
    return {name: module for name, module in named if isinstance(module, SVDLowRank)}


def names_of_all_stages(stage: PipelineStage, mesh: Mesh, tells: bool) -> list[str]:
    """Returns the names of the adapters of all stages, from the rank of each that `tells` them. Collective."""
    told = mesh.gather_json(list(adapters_in(stage)) if tells else [])
    return [name for names in told for name in names]


def on_host(number: torch.Tensor) -> int:
    """Returns a number that is on the device."""
    return int(number)


class RankBudget:
    """The adapters of this rank's stage, and the number of triplets that all stages may keep."""

    def __init__(self, stage: PipelineStage, zero_engine: Any, mesh: Mesh, config: AdapterConfig):
        self._zero, self._mesh, self._config = zero_engine, mesh, config
        self._seen: dict[tuple[str, str], torch.Tensor] = {}  # this step's sensitivities by adapter and part
        self._adapters = adapters_in(stage)
        # One rank of each stage speaks for it in sums over all ranks.
        self._tells = mesh.tp_rank == 0 and dist.get_rank(mesh.zero_group) == 0
        self._rows = {name: row for row, name in enumerate(sorted(names_of_all_stages(stage, mesh, self._tells)))}

    @torch.no_grad()
    def add_penalty(self) -> torch.Tensor:
        """Adds the gradient of the penalty on vectors that are not orthonormal, and returns the penalty. Collective.

        The penalty is that of all stages, with its factor, on the device.
        """
        total = torch.zeros((), dtype=torch.float64, device=self._mesh.device)
        for adapter in self._adapters.values():
            for parameter, is_turned in ((adapter.a, False), (adapter.b, True)):
                weight = zero.current_weight(parameter)
                vectors = (weight.t() if is_turned else weight).to(torch.promote_types(weight.dtype, torch.float32))
                products = self._over_ranks(vectors @ vectors.t(), parameter)
                gradient = penalty_gradient(vectors, products)
                total += penalty(products)
                zero.add_to_gradient(parameter, self._config.orthogonality * (gradient.t() if is_turned else gradient))
        return self._mesh.sum_over_world(self._config.orthogonality * total * self._tells)

    @torch.no_grad()
    def observe(self) -> None:
        """Measures the sensitivity of every element before the optimizer changes weights and clips gradients.

        Collective over data parallel.
        """
        self._seen = {}
        if zero.steps_done(self._zero) >= self._config.budget_steps:
            return
        for name, adapter in self._adapters.items():
            for part in TRIPLET:
                parameter = getattr(adapter, part)
                product = zero.full_weight(parameter) * zero.full_gradient(parameter)
                self._seen[name, part] = product.abs().float()

    @torch.no_grad()
    def finish_step(self, applied: torch.Tensor) -> None:
        """Updates the importance of all triplets, and sets lambda of those beyond the budget to 0. Collective.

        It does nothing after a step that was not `applied`, because its gradient was too large or not finite.
        """
        if not on_host(applied):
            return
        for (name, part), now in self._seen.items():
            sensitivity, uncertainty = (getattr(self._adapters[name], f"{part}_{state}") for state in STATE)
            smooth(sensitivity, uncertainty, now, self._config.beta)
        step, config = self._steps_done(), self._config
        due = config.warmup_steps < step <= config.budget_steps
        if due and (step % config.prune_every == 0 or step == config.budget_steps):
            self._choose(step)
        elif step <= config.budget_steps:
            return
        for adapter in self._adapters.values():
            zero.multiply_weight(adapter.lambdas, adapter.kept)

    def _steps_done(self) -> int:
        """Returns the number of the optimizer's steps, which a rank without trained weights gets from the others."""
        done = torch.tensor(zero.steps_done(self._zero), device=self._mesh.device)
        dist.all_reduce(done, op=dist.ReduceOp.MAX)
        return on_host(done)

    def _choose(self, step: int) -> None:
        """Chooses which triplets are kept; all ranks compute the choice from the same numbers."""
        scores = torch.zeros(len(self._rows), self._config.rank, dtype=torch.float64, device=self._mesh.device)
        for name, adapter in self._adapters.items():
            found = self._scores(adapter)  # collective over tensor parallel
            if self._tells:
                scores[self._rows[name]] = found
        everything = self._mesh.sum_over_world(scores).flatten()
        kept = most_important(everything, round(budget(step, self._config) * len(self._rows))).view_as(scores)
        for name, adapter in self._adapters.items():
            adapter.kept.copy_(kept[self._rows[name]])

    def _scores(self, adapter: SVDLowRank) -> torch.Tensor:
        """Returns the importance of an adapter's triplets [r] (equation 7)."""
        total = torch.zeros_like(adapter.kept)
        for name, dim in (("a", 1), ("b", 0)):
            parameter = getattr(adapter, name)
            elements = getattr(adapter, f"{name}_sensitivity") * getattr(adapter, f"{name}_uncertainty")
            split = marks_of(parameter).split
            count = parameter.shape[dim] if split is None else split.size
            total += self._over_ranks(elements.sum(dim), parameter) / count
        sensitivity, uncertainty = (getattr(adapter, f"lambdas_{state}") for state in STATE)
        return total + sensitivity * uncertainty

    def _over_ranks(self, part: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """Sums what each tensor-parallel rank found in its slice of a parameter."""
        split = marks_of(parameter).split
        if split is not None:
            part = part.contiguous()
            dist.all_reduce(part, group=self._mesh.tp_group)
            part = part / split.copies
        return part
