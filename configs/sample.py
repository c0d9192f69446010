"""Config of rejection sampling: which completions are sampled from a model, and which of them are kept."""

from pydantic import Field, model_validator

from configs.initial import InitConfig
from configs.section import Section
from configs.tasks import TaskConfig
from configs.train import ParallelConfig, Precision


class SampleRun(Section):
    """The folder of the samples, and the seed of their random numbers."""

    dir: str = Field(min_length=1)
    """The folder of all samples and of the dialogues that are kept, relative to the working directory."""
    seed: int = Field(default=1234, ge=0)
    """The seed of the problems that are drawn and of the completions."""


class SampleSection(Section):
    """The samples that are drawn, whatever is kept of them."""

    problems: int | None = Field(default=None, ge=1)
    """The number of problems or prompts; left out, all that the files have. Of equal prompts only the first counts."""
    completions: int = Field(default=4, ge=1)
    """The number of completions of each prompt."""
    temperature: float = Field(default=1.0, ge=0)
    """The temperature; at 0 the likeliest token is always taken, and all completions of a prompt are the same."""
    top_k: int = Field(default=0, ge=0)
    """The number of likeliest tokens that are kept; 0 keeps all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """The share that the kept, likeliest tokens have together."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """The share of the likeliest token's probability that a kept token has at least."""
    precision: Precision = Precision.AUTO
    """The number format of computation; auto is bf16 on a GPU or CPU that multiplies it, else fp32."""
    batch_size: int = Field(default=256, ge=1)
    """The number of completions that a rank continues at once, which limits the memory of the cache."""
    part: int = Field(default=64, ge=1)
    """The number of prompts whose samples are written together; after an interruption a part is sampled again whole."""


class KeepSection(Section):
    """The completions that are kept as dialogues. All others are set aside and counted by the first rule they break."""

    min_score: float | None = None
    """The lowest score that is kept; left out, there is none. Most rewards give 1 for a right answer."""
    min_rewards: dict[str, float] = Field(default={})
    """The lowest value of single rewards, by their names in the task, before weights."""
    per_prompt: int | None = Field(default=None, ge=1)
    """The number of completions that are kept of a prompt, those of the highest score; left out, all. With 1 it is
    best-of-n."""
    min_tokens: int = Field(default=1, ge=1)
    """The minimum length of a completion, in tokens with the end of its turn."""
    max_tokens: int | None = Field(default=None, ge=1)
    """The maximum length of a completion, in tokens with the end of its turn; left out, there is none."""
    max_repeated: float | None = Field(default=None, ge=0, lt=1)
    """The maximum share of a completion's runs of 8 tokens that occurred in it before; left out, there is none."""
    min_script: float | None = Field(default=None, gt=0, le=1)
    """The minimum share of letters in the completion's commonest script, such as Latin or Chinese and Japanese, which
    drops mixed languages; left out, there is none."""
    max_paragraph: int | None = Field(default=None, ge=1)
    """The maximum length of a paragraph, in characters; left out, there is none."""
    code_blocks: bool = True
    """Whether completions with blocks of code (```) are kept."""
    near_duplicates: float | None = Field(default=None, gt=0, lt=1)
    """The Jaccard similarity of word 5-grams from which on a completion is a near-duplicate of a better one for the
    same prompt; left out, only equal texts are duplicates."""


class SampleConfig(Section):
    """The root of a config of rejection sampling."""

    run: SampleRun
    """The folder of the samples, and the seed of their random numbers."""
    init: InitConfig
    """The model that writes."""
    task: TaskConfig
    """The task whose training problems are answered and scored; of files without answers and rewards, all prompts are
    answered, and nothing is scored."""
    sample: SampleSection = SampleSection()
    """The samples that are drawn, whatever is kept of them."""
    keep: KeepSection = KeepSection()
    """The completions that are kept as dialogues."""
    parallel: ParallelConfig = ParallelConfig()
    """Degrees of parallelism; `tp`, `ep` and `backend` alone. The ranks that are left sample other completions."""

    @model_validator(mode="after")
    def _bounds_have_scores(self) -> "SampleConfig":
        bounds = {"keep.min_score": self.keep.min_score, "keep.min_rewards": self.keep.min_rewards or None}
        for key, value in bounds.items():
            if value is not None and not self.task.is_scored:
                raise ValueError(
                    f"{key} = {value} needs scores, and task.answer_key = '' without task.rewards gives none; leave "
                    "the bound out, or name rewards"
                )
        return self

    @model_validator(mode="after")
    def _settings_fit_each_other(self) -> "SampleConfig":
        if other := sorted(self.parallel.model_fields_set - {"tp", "ep", "backend"}):
            default = ParallelConfig.model_fields
            changed = [key for key in other if getattr(self.parallel, key) != default[key].default]
            if changed:
                raise ValueError(
                    f"parallel.{changed[0]} = {getattr(self.parallel, changed[0])} is for training; sampling splits a "
                    "model over parallel.tp and parallel.ep alone, whatever layout it was trained in: leave the key out"
                )
        if self.sample.temperature == 0 and self.sample.completions > 1:
            raise ValueError(
                f"sample.completions = {self.sample.completions} at sample.temperature = 0 are all the same; set "
                "sample.completions=1, or a temperature such as 1.0"
            )
        most = self.keep.max_tokens
        if most is not None and most < self.keep.min_tokens:
            raise ValueError(
                f"keep.min_tokens = {self.keep.min_tokens} is above keep.max_tokens = {most}, so nothing could be "
                "kept; swap them"
            )
        return self
