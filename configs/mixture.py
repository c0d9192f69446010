"""The section of a data run that says what training rows are made of: one mixture, or stages in a row."""

from typing import Any, Literal

from pydantic import Field, model_validator

from configs.section import Section, is_name

BY_SOURCE = ("weights", "epochs", "fim")  # keys that name sources
_SHARES = {"weights", "temperature", "unimax"}


class PlanConfig(Section):
    """Which share of the rows each source gets, and how documents fill a row.

    Exactly one of `weights`, `temperature` and `unimax` says how shares are found. A mixture that needs more epochs
    than are allowed is an error that says so.
    """

    seq_length: int = Field(default=256, ge=8)
    """The length of a row, in tokens."""
    samples: int = Field(default=8192, ge=1)
    """The number of rows."""
    seed: int = Field(default=0, ge=0)
    """The seed of the order of documents and of rows."""
    weights: dict[str, float] | None = None
    """The share of each source, by name; shares need not sum to one, and a source left out is not used."""
    temperature: float | None = Field(default=None, gt=0)
    """Shares are tokens ** (1 / temperature), over all sources: 1 is by size, more is more even."""
    unimax: bool = False
    """Whether shares are as even as the caps on epochs allow (UniMax, arXiv:2304.09151), over all sources."""
    packing: Literal["concat", "best_fit"] = "best_fit"
    """How documents fill rows: cut where a row ends (concat), or placed where they fit whole (best_fit)."""
    max_epochs: int = Field(default=4, ge=1)
    """The most times that a source's tokens are repeated."""
    epochs: dict[str, float] = Field(default_factory=dict)
    """The most times for single sources, by name, in place of max_epochs; parts of an epoch too."""
    fim: dict[str, float] = Field(default_factory=dict)
    """The share of a source's documents, by its name, rearranged for fill-in-the-middle (arXiv:2207.14255)."""
    fim_spm: float = Field(default=0.5, ge=0, le=1)
    """The share of rearranged documents in the order suffix, prefix, middle; the others are prefix, suffix, middle."""

    def check(self, key: str) -> None:
        """Errors: ValueError naming what is under `key`."""
        if (self.weights is not None) + (self.temperature is not None) + self.unimax != 1:
            raise ValueError(
                f"{key} takes exactly one of weights, temperature and unimax = true; set one and leave out the others"
            )
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
            if not weight > 0:
                named = [f"{key}.{part}" for part in BY_SOURCE if source in (getattr(self, part) or {})]
                raise ValueError(
                    f"{key}.weights.{source} = {weight} is not above 0; give a weight above 0, or leave the source out "
                    f"of {' and '.join(named)}"
                )


class MixtureConfig(PlanConfig):
    """One plan, or with `stages` a plan for each of them, in their order, such as general, annealing, long_context.

    Exactly one of `weights`, `temperature` and `unimax` says how shares are found. Each stage goes on where the one
    before ended: no token comes twice in an epoch, and `max_epochs` counts all stages together.
    """

    stages: dict[str, PlanConfig] = Field(default_factory=dict)
    """Stages in their order, by name, each with keys of a plan; what one leaves out is as [mixture] says."""

    def plans(self) -> dict[str, PlanConfig]:
        """By name of the stage; without stages a single one of no name."""
        return self.stages or {"": PlanConfig.model_construct(**self._own())}

    @model_validator(mode="after")
    def _plans_fit(self) -> "MixtureConfig":
        # From here on a stage says all of its keys, so that a config written out means the same when read again.
        object.__setattr__(self, "stages", {name: self._whole(stage) for name, stage in self.stages.items()})
        for name, plan in self.plans().items():
            if name and not is_name(name):
                raise ValueError(f"stage name {name!r} becomes a folder: use letters, digits and _ only")
            plan.check(f"mixture.stages.{name}" if name else "mixture")
        return self

    def _own(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in PlanConfig.model_fields}

    def _whole(self, stage: PlanConfig) -> PlanConfig:
        own, given = self._own(), {key: getattr(stage, key) for key in stage.model_fields_set}
        kept = dict(own)
        if given.keys() & _SHARES:  # a stage that says how shares are found takes over no other way
            kept = {key: value for key, value in own.items() if key not in _SHARES}
        if weights := (kept | given).get("weights"):  # nor what [mixture] says of sources that rest in it
            for key in ("epochs", "fim"):
                kept[key] = {source: value for source, value in own[key].items() if source in weights}
        return PlanConfig.model_construct(**kept | given)
