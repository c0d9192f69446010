"""The section of a data run that says what looks wrong in its ledger. It changes no stage and no byte of the result."""

from pydantic import Field, model_validator

from configs.section import Section

# Stages that take documents or text away because of what they are. (Held-out documents and sources that are left out
# of the mixture are no losses.)
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
MUST_DROP = ("filter", "dedup")  # which, over enough documents, drop some


class StageAlarmConfig(Section):
    """Of one stage, in place of what holds for all."""

    max_drop_share: float | None = Field(default=None, ge=0, le=1)
    """The share of a source that this stage may drop; left out, alarms.max_drop_share holds."""
    must_drop: bool | None = None
    """Whether the stage is to drop something of enough documents; left out, filter and dedup are, others not."""


class AlarmsConfig(Section):
    """When a stage's counts are a warning: at the end of the run, in ledger.json and on the report's page."""

    max_drop_share: float = Field(default=0.5, ge=0, le=1)
    """The share of a source's documents, and of its bytes, that one stage may drop."""
    min_documents: int = Field(default=10_000, ge=1)
    """A stage that must drop something and drops nothing of this many documents is taken to be broken."""
    stages: dict[str, StageAlarmConfig] = Field(default={})
    """Other limits for single stages, by the stage's name."""
    expected: dict[str, str] = Field(default={})
    """Documents of the input, by id, with the reason for which each is to be dropped or set aside, or "kept"."""
    fail: bool = False
    """Whether an alarm makes the exit status 1; the result is published all the same."""

    @model_validator(mode="after")
    def _known(self) -> "AlarmsConfig":
        for name in self.stages:
            if name not in WATCHED:
                raise ValueError(
                    f"stages.{name} is no stage that drops documents or text; those are: {', '.join(WATCHED)}"
                )
        return self

    def drop_limit(self, stage: str) -> float:
        own = self.stages.get(stage, StageAlarmConfig()).max_drop_share
        return self.max_drop_share if own is None else own

    def must_drop(self, stage: str) -> bool:
        own = self.stages.get(stage, StageAlarmConfig()).must_drop
        return stage in MUST_DROP if own is None else own
