"""The model that a training run starts from."""

from typing import ClassVar

from pydantic import ValidationInfo, field_validator, model_validator

from configs.addresses import refuse_address
from configs.section import Section

MODELS = ("run", "checkpoint", "hf")  # the keys that name a model


class InitConfig(Section):
    """The model to start from: a run, one of its checkpoints, or a Hugging Face folder."""

    section: ClassVar[str] = "init"  # for messages, as is what it names
    names: ClassVar[str] = "the model to start from"

    run: str | None = None
    """The folder of the run, or of the imported model, whose newest checkpoint is used; a run that continues keeps the
    one it started from."""
    checkpoint: str | None = None
    """The checkpoint to use in place of a run's newest, e.g. RUN/checkpoints/step_100."""
    hf: str | None = None
    """The Hugging Face folder to use in place of a run, with config.json and safetensors; nothing is downloaded."""
    tokenizer: str | None = None
    """The folder of the tokenizer that the model was trained with; left out, the one stored in its run or folder."""

    @field_validator("*")
    @classmethod
    def _empty_is_left_out(cls, value: str | None) -> str | None:
        """Turns "" into None, so that an override can unset a key of the file."""
        return value or None

    @field_validator(*MODELS)
    @classmethod
    def _is_a_folder(cls, value: str | None, info: ValidationInfo) -> str | None:
        refuse_address(value or "", f"{cls.section}.{info.field_name}")
        return value

    @model_validator(mode="after")
    def _one_model(self) -> "InitConfig":
        named = [key for key in MODELS if getattr(self, key)]
        if len(named) > 1:
            said = " and ".join(f"{self.section}.{key} = {getattr(self, key)!r}" for key in named)
            raise ValueError(
                f"{said} name {self.names}; leave only one of them (as an override: "
                f"{' or '.join(f'{self.section}.{key}=' for key in named)})"
            )
        if not named:
            one = self.section
            raise ValueError(
                f"none of {one}.run, {one}.checkpoint and {one}.hf names {self.names}; set {one}.run=RUN for the "
                f"newest checkpoint of a run, {one}.checkpoint=RUN/checkpoints/step_N, or {one}.hf=FOLDER"
            )
        return self

    @property
    def named_by(self) -> str:
        """The key that names the model."""
        return next(f"{self.section}.{key}" for key in MODELS if getattr(self, key))

    @property
    def said(self) -> str:
        """The key that names the model, with its value."""
        return f"{self.named_by} = {(self.run or self.checkpoint or self.hf)!r}"
