"""Config section [alarms] of a data run: which counts in its ledger are a warning. It does not change the result."""

from pydantic import Field, model_validator

from configs.section import Section

# Stages that remove documents or text because of their content. (Held-out documents and sources that the mixture leaves
# out are not losses.)
WATCHED = (
    "extract",
    "language",
    "filter",
    "dedup",
    "decontaminate",
    "web_lines",
    "lines",
    "substrings",
    "pii",
    "documents",
)
MUST_DROP = ("filter", "dedup")  # a stage that drops none of many documents is taken to be broken


class StageAlarmConfig(Section):
    """Limits of one stage that replace those for all stages."""

    max_drop_share: float | None = Field(default=None, ge=0, le=1)
    """The share of a source that this stage may drop; left out, alarms.max_drop_share applies."""
    must_drop: bool | None = None
    """Whether the stage must drop some of alarms.min_documents documents; left out, only filter and dedup must."""


class AlarmsConfig(Section):
    """Limits beyond which a stage's counts cause a warning, at the run's end, in ledger.json and in report.html."""

    max_drop_share: float = Field(default=0.5, ge=0, le=1)
    """The share of a source's documents, and of its bytes, that one stage may drop."""
    min_documents: int = Field(default=10_000, ge=1)
    """A stage that must drop something and drops nothing of this many documents is taken to be broken."""
    stages: dict[str, StageAlarmConfig] = Field(default={})
    """Other limits for single stages, by the stage's name."""
    expected: dict[str, str] = Field(default={})
    """The fate that documents of the input must have, by id: the reason they are dropped or set aside, or "kept"."""
    fail: bool = False
    """Whether an alarm makes the exit status 1; the result is published all the same."""

    @model_validator(mode="after")
    def _known(self) -> "AlarmsConfig":
        for name in self.stages:
            if name not in WATCHED:
                raise ValueError(
                    f"stages.{name} is not a stage that drops documents or text; those are: {', '.join(WATCHED)}"
                )
        return self

    def drop_limit(self, stage: str) -> float:
        """Share of a source that `stage` may drop."""
        own = self.stages.get(stage, StageAlarmConfig()).max_drop_share
        return self.max_drop_share if own is None else own

    def must_drop(self, stage: str) -> bool:
        """Whether a warning is given if `stage` drops none of `min_documents` documents."""
        own = self.stages.get(stage, StageAlarmConfig()).must_drop
        return stage in MUST_DROP if own is None else own
