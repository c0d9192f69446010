"""Config of an export: which run, the folder to write, and how the result is checked before it is published."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from configs.addresses import refuse_address
from configs.section import Section


class VerifyConfig(Section):
    """Checks on the reloaded model. All run in fp32; nothing is published unless all pass."""

    rows: int = Field(default=4, ge=1)
    """The number of held-out passages of each source that are compared."""
    max_tokens: int = Field(default=256, ge=2)
    """The maximum length of a passage, in tokens; longer ones are cut."""
    tolerance: float = Field(default=1e-4, gt=0)
    """The largest absolute difference of a logit that passes. Rounding in fp32 mostly stays under 1e-4, and wrong
    weights do not. Where fp32 rounds Trivium's own logits by more, as a computation in fp64 shows, 8 times that passes,
    up to this number times the largest logit."""
    far_tokens: int = Field(default=1024, ge=0)
    """The length of one longer text, at whose last tokens logits are compared too; the model's context cuts it."""
    layers: int | None = Field(default=None, ge=1)
    """The first layers whose outputs are compared, for models that do not fit into memory twice; left out, all."""
    greedy_tokens: int = Field(default=64, ge=1)
    """The number of tokens in which greedy continuations must agree."""


class ExportConfig(Section):
    """The root of an export's config: a training run to a Hugging Face directory."""

    run: str = Field(min_length=1)
    """The folder of the run whose model is exported."""
    out: str = Field(min_length=1)
    """The folder to write; it appears there only once all checks have passed."""
    step: int | str = "latest"
    """The step whose checkpoint is exported, or "latest"."""
    adapter: Literal["merge", "peft", "both"] = "merge"
    """What is written of a run with adapters: the merged model, the adapters in PEFT's format, or the merged model with
    the adapters in its folder `adapter`."""
    base: str | None = None
    """The Hugging Face folder that PEFT's adapters name as their base; left out, what the run began from."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The dtype of the written weights; auto is float32 for a run, and that of its files for an imported model."""
    max_shard_gb: float = Field(default=5.0, gt=0)
    """The maximum size of one file of weights, in gigabytes (10^9 bytes)."""
    plan: str | None = None
    """The data plan whose held-out rows are compared; left out, that of the run or of the run that it started from."""
    prompts: list[str] = Field(
        default=["It was a quiet morning, and", "他走进房间，看见", "def main(argv):\n    "], min_length=1
    )
    """Prompts that Trivium and transformers must continue alike, and that the printed sample continues."""
    chat_prompts: list[str] = Field(default=["What is your favorite book?", "你好", "Sort 529143"], min_length=1)
    """User messages used in place of prompts, if the model was trained on dialogues."""
    sample_tokens: int = Field(default=64, ge=1)
    """The maximum length of each continuation in the printed sample, in tokens."""
    sample_temperature: float = Field(default=0.8, ge=0)
    """The temperature of the printed sample; 0 always takes the most likely token."""
    seed: int = Field(default=1234, ge=0)
    """The seed of the printed sample."""
    verify: VerifyConfig = VerifyConfig()
    """Checks on the result before it is published."""

    @field_validator("run")
    @classmethod
    def _run_is_a_folder(cls, run: str) -> str:
        refuse_address(run, "run")
        return run

    @model_validator(mode="after")
    def _base_is_of_an_adapter(self) -> "ExportConfig":
        if self.base is not None and self.adapter == "merge":
            raise ValueError(
                f"base = {self.base!r} is what adapters in PEFT's format are loaded onto, and adapter = 'merge' writes "
                "none; set adapter=peft, or leave base out"
            )
        return self

    @field_validator("step")
    @classmethod
    def _step_is_one(cls, step: int | str) -> int | str:
        if step != "latest" and (isinstance(step, str) or step < 0):
            raise ValueError(f'{step!r} is not a step; set "latest", or the number of a step with a checkpoint')
        return step
