"""The model that a post-training run starts from."""

from pydantic import field_validator, model_validator

from configs.section import Section


class InitConfig(Section):
    """The model to start from: a run, or one of its checkpoints."""

    run: str | None = None
    """The folder of the run whose newest checkpoint is used; a run that continues keeps the one it started from."""
    checkpoint: str | None = None
    """The checkpoint to use in place of a run's newest, e.g. RUN/checkpoints/step_100."""
    tokenizer: str | None = None
    """The folder of the tokenizer that the model was trained with; left out, the one stored in its run."""

    @field_validator("*")
    @classmethod
    def _empty_is_left_out(cls, value: str | None) -> str | None:
        """Turns "" into None, so that an override can unset a key of the file."""
        return value or None

    @model_validator(mode="after")
    def _one_model(self) -> "InitConfig":
        if self.run and self.checkpoint:
            raise ValueError(
                f"init.run = {self.run!r} and init.checkpoint = {self.checkpoint!r} both name the model to start from; "
                "leave one out (as an override: init.run= or init.checkpoint=)"
            )
        if not self.run and not self.checkpoint:
            raise ValueError(
                "neither init.run nor init.checkpoint names the model to start from; set init.run=RUN for the newest "
                "checkpoint of a run, or init.checkpoint=RUN/checkpoints/step_N"
            )
        return self
