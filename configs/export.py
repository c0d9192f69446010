"""What an export is: which run, where to, and how hard the result is checked before it is published."""

from typing import Literal

from pydantic import Field, field_validator

from configs.section import Section


class VerifyConfig(Section):
    """Checks on the reloaded model. All run in fp32; nothing is published unless every one holds."""

    rows: int = Field(default=4, ge=1)
    """The number of held-out passages of each source that are compared."""
    max_tokens: int = Field(default=256, ge=2)
    """The number of tokens that a passage is cut to."""
    tolerance: float = Field(default=1e-4, gt=0)
    """The largest absolute difference of any logit: rounding in fp32 stays under 1e-4, a wrong weight does not."""
    greedy_tokens: int = Field(default=64, ge=1)
    """The number of tokens that greedy continuations must agree in."""


class ExportConfig(Section):
    """A training run to a Hugging Face directory."""

    run: str
    """The folder of the run whose model is exported."""
    out: str
    """The folder that is written, once everything in it holds."""
    step: int | str = "latest"
    """The step whose checkpoint is exported, or "latest"."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of the numbers in the written weights."""
    max_shard_gb: float = Field(default=5.0, gt=0)
    """The most gigabytes (10^9 bytes) of one file of weights."""
    plan: str | None = None
    """The data plan whose held-out rows are compared; left out, that of the run, or of the run it began from."""
    prompts: list[str] = Field(
        default=["It was a quiet morning, and", "他走进房间，看见", "def main(argv):\n    "], min_length=1
    )
    """Texts that Trivium and transformers continue alike, and that the printed sample continues."""
    chat_prompts: list[str] = Field(default=["What is your favorite book?", "你好", "Sort 529143"], min_length=1)
    """What a user says, in place of prompts, to a model that was trained on dialogues."""
    sample_tokens: int = Field(default=64, ge=1)
    """The most tokens of each continuation in the sample."""
    sample_temperature: float = Field(default=0.8, ge=0)
    """The temperature of the sample; 0 takes the likeliest token."""
    seed: int = Field(default=1234, ge=0)
    """The seed of the sample."""
    verify: VerifyConfig = VerifyConfig()
    """How hard the result is checked before it is published."""

    @field_validator("step")
    @classmethod
    def _step_is_one(cls, step: int | str) -> int | str:
        if step != "latest" and (isinstance(step, str) or step < 0):
            raise ValueError(f'{step!r} is no step; set "latest", or the number of a step with a checkpoint')
        return step
