"""Config section [mixture] of a data run: which sources training rows come from, in one plan or one per stage."""

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from configs.section import Section, check_name

BY_SOURCE = ("weights", "epochs", "fim")  # keys that name sources
_SHARES = {"weights", "temperature", "unimax"}


class PlanConfig(Section):
    """The share of the rows that each source gets, and how documents are packed into rows.

    Exactly one of `weights`, `temperature` and `unimax` sets the shares. A mixture that needs more epochs of a source
    than are allowed is an error.
    """

    seq_length: int = Field(default=256, ge=8)
    """The length of a row, in tokens."""
    samples: int = Field(default=8192, ge=1)
    """The number of rows."""
    seed: int = Field(default=0, ge=0)
    """The seed that orders documents and rows."""
    weights: dict[str, float] | None = None
    """The share of each source, by name; shares need not sum to one, and a source left out is not used."""
    temperature: float | None = Field(default=None, ge=0.1)
    """Each source's share is proportional to tokens ** (1 / temperature): 1 is by size, more is more even."""
    unimax: bool = False
    """Whether the shares of all sources are as even as their limits on epochs allow (UniMax, arXiv:2304.09151)."""
    packing: Literal["concat", "best_fit"] = "best_fit"
    """The way documents fill rows: cut where a row ends (concat), or put where they fit whole (best_fit)."""
    max_epochs: int = Field(default=4, ge=1)
    """The maximum number of times that a source's tokens are used."""
    epochs: dict[str, float] = Field(default_factory=dict)
    """The limit in place of max_epochs for single sources, by name; it may be a fraction."""
    fim: dict[str, float] = Field(default_factory=dict)
    """The share of a source's documents, by its name, rearranged for fill-in-the-middle (arXiv:2207.14255)."""
    fim_spm: float = Field(default=0.5, ge=0, le=1)
    """The share of rearranged documents in the order suffix, prefix, middle; the others are prefix, suffix, middle."""

    def check(self, key: str) -> None:
        """Checks shares, epochs and weights. Raises ValueError; `key` is this plan's name in the message."""
        if (self.weights is not None) + (self.temperature is not None) + self.unimax != 1:
            raise ValueError(
                f"{key} takes exactly one of weights, temperature and unimax = true; set one and leave out the others"
            )
        if self.weights == {}:
            raise ValueError(f"{key}.weights names no source; give each source a weight, such as {{ web = 1.0 }}")
        for source, epochs in self.epochs.items():
            if not epochs > 0:
                raise ValueError(f"{key}.epochs.{source} = {epochs} is not above 0; give a cap above 0")
        for source, rate in self.fim.items():
            if not 0 < rate <= 1:
                raise ValueError(
                    f"{key}.fim.{source} = {rate} is no share above 0 and up to 1; give one, or leave the key out to "
                    "rearrange no document of the source"
                )
        for source, weight in (self.weights or {}).items():
            if not 0 < weight < math.inf:
                named = [f"{key}.{part}" for part in BY_SOURCE if source in (getattr(self, part) or {})]
                raise ValueError(
                    f"{key}.weights.{source} = {weight} is not a number above 0; give one that is, or leave the source "
                    f"out of {' and '.join(named)}"
                )


class MixtureConfig(PlanConfig):
    """One plan, or with `stages` a plan for each of them, in their order, such as general, annealing, long_context.

    Exactly one of `weights`, `temperature` and `unimax` sets the shares. Each stage continues where the one before
    ended: no token is repeated within an epoch, and `max_epochs` counts all stages together.
    """

    stages: dict[str, PlanConfig] = Field(default_factory=dict)
    """The stages in order, by name, each with the keys of a plan; keys that a stage leaves out are as in [mixture]."""

    def plans(self) -> dict[str, PlanConfig]:
        """Returns the plan of each stage by its name; without stages, one plan whose name is ""."""
        return self.stages or {"": PlanConfig.model_construct(**self._own())}

    @model_validator(mode="after")
    def _plans_fit(self) -> "MixtureConfig":
        # Fills in all keys of each stage, so that a config that is written and read again means the same.
        object.__setattr__(self, "stages", {name: self._whole(stage) for name, stage in self.stages.items()})
        for name, plan in self.plans().items():
            if name:
                check_name("stage", name)
            plan.check(f"mixture.stages.{name}" if name else "mixture")
        return self

    def _own(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in PlanConfig.model_fields}

    def _whole(self, stage: PlanConfig) -> PlanConfig:
        own, given = self._own(), {key: getattr(stage, key) for key in stage.model_fields_set}
        kept = dict(own)
        if given.keys() & _SHARES:  # a stage that sets its shares inherits no other way of setting them
            kept = {key: value for key, value in own.items() if key not in _SHARES}
        if weights := (kept | given).get("weights"):  # nor keys of sources that its weights leave out
            for key in ("epochs", "fim"):
                kept[key] = {source: value for source, value in own[key].items() if source in weights}
        return PlanConfig.model_construct(**kept | given)
