"""What an export is: which run, where to, and how hard the result is checked before it is published."""

from typing import Literal

from pydantic import Field, field_validator

from configs.base import Section


class VerifyConfig(Section):
    """Checks on the reloaded model. All run in fp32; nothing is published unless every one holds.

    `rows` held-out passages a source are compared, each cut to `max_tokens`. `tolerance` bounds the absolute
    difference of any logit: fp32 rounding over a few dozen layers stays under 1e-4, a wrong weight does not.
    """

    rows: int = Field(default=4, ge=1)
    max_tokens: int = Field(default=256, ge=2)
    tolerance: float = Field(default=1e-4, gt=0)
    greedy_tokens: int = Field(default=64, ge=1)


class ExportConfig(Section):
    """A training run to a Hugging Face directory.

    `run` is a run directory, `step` "latest" or a step that has a checkpoint. `plan` names the data plan whose
    held-out rows are compared; without it, the plan of the run or of the run it began from. `prompts`, or in
    a run trained on dialogues `chat_prompts`, are continued by both for the greedy check, and by transformers
    for the sample.
    """

    run: str
    out: str
    step: int | str = "latest"
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_shard_gb: float = Field(default=5.0, gt=0)
    plan: str | None = None
    prompts: list[str] = Field(
        default=["It was a quiet morning, and", "他走进房间，看见", "def main(argv):\n    "], min_length=1
    )
    chat_prompts: list[str] = Field(default=["What is your favorite book?", "你好", "Sort 529143"], min_length=1)
    sample_tokens: int = Field(default=64, ge=1)
    sample_temperature: float = Field(default=0.8, ge=0)
    seed: int = Field(default=1234, ge=0)
    verify: VerifyConfig = VerifyConfig()

    @field_validator("step")
    @classmethod
    def _step_is_one(cls, step: int | str) -> int | str:
        if step != "latest" and (isinstance(step, str) or step < 0):
            raise ValueError(f'{step!r} is no step; set "latest", or the number of a step with a checkpoint')
        return step
