"""Config of a training run: the sections that all trainers share, and the root of pretraining's config.

`configs.layout` checks that degrees of parallelism, model and batch fit each other and the world size.
"""

import os
from enum import StrEnum
from typing import Literal

from pydantic import Field, field_validator, model_validator

from configs.adapters import AdapterConfig
from configs.checkpoints import CheckpointConfig
from configs.initial import InitConfig
from configs.model import ModelConfig
from configs.section import Section
from configs.tracking import TrackingConfig


class TrainRunConfig(Section):
    """The folder of a training run, and the seed of its random numbers."""

    dir: str = Field(min_length=1)
    """The folder for checkpoints, metrics and reports, relative to the working directory."""
    seed: int = Field(default=1234, ge=0)
    """The seed of initial weights, dropout, the order of data and sampled completions."""

    @property
    def name(self) -> str:
        """The name of the run in its output: that of its folder, also where it is given as "."."""
        return os.path.basename(os.path.abspath(self.dir))


class Precision(StrEnum):
    """Number format of the forward and backward pass."""

    FP32 = "fp32"
    BF16 = "bf16"
    AUTO = "auto"  # the run directory records which of the two it became


class TrainSection(Section):
    """Steps, batch sizes and sequence length, and how they are computed."""

    steps: int = Field(ge=1)
    """The number of optimizer steps of the whole run."""
    global_batch_size: int = Field(ge=1)
    """The number of sequences in one optimizer step, over all ranks."""
    micro_batch_size: int = Field(ge=1)
    """The number of sequences that a rank computes at a time; gradients accumulate over the rest of its batch."""
    seq_length: int = Field(ge=2)
    """The length of a training sequence, in tokens."""
    precision: Precision = Precision.AUTO
    """The number format of computation; auto is bf16 on a GPU or CPU that multiplies it, else fp32."""
    compile: bool = False
    """Whether torch.compile compiles the blocks, for faster steps; the compiled code is kept in `run.dir`/compiled."""
    deterministic: bool = False
    """Whether a GPU computes bit by bit the same each time, and so repeats numbers after a resume; it may be slower."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """The dropout rate after embedding, attention and MLP; the masks are the same in every layout."""
    recompute: Literal["none", "selective", "full"] = "none"
    """The recomputation in backward that saves memory: of attention scores (selective) or of whole blocks (full)."""
    freeze: tuple[str, ...] = ()
    """The weights that are not trained: names as `trivium inspect` lists them, * for any text, e.g. "layers.0.*"."""


class OptimizerConfig(Section):
    """AdamW (Loshchilov and Hutter 2019)."""

    lr: float = Field(gt=0)
    """The peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """The decay rates of the first and the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """The epsilon of AdamW, added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """The weight decay of matrices, multiplied by the learning rate; norms never decay, and 0 turns it off."""
    clip_grad: float = Field(default=1.0, ge=0)
    """The maximum norm of the whole gradient, above which it is scaled down; 0 turns clipping off."""

    @field_validator("betas")
    @classmethod
    def _betas_decay(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"{list(betas)} are not two numbers from 0 to below 1; usual values are [0.9, 0.95]")
        return betas


class ScheduleConfig(Section):
    """The learning rate over the steps: linear warmup, then the schedule `kind`."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """The schedule after warmup: cosine to the floor, constant then linear to the floor (wsd), or constant."""
    steps: int | None = Field(default=None, ge=1)
    """The step at which the schedule ends, train.steps if left out; set it if a run is trained in several parts."""
    warmup_steps: int = Field(default=0, ge=0)
    """The number of steps in which the rate rises linearly to optimizer.lr; 0 for no warmup."""
    decay_steps: int = Field(default=0, ge=0)
    """The number of steps at the end in which wsd falls linearly to the floor; other kinds ignore it."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """The floor of the rate at the end of cosine or wsd, as a share of optimizer.lr."""


class ParallelConfig(Section):
    """Degrees of parallelism. The remaining factor of the world size is data parallel; see `configs.layout`."""

    tp: int = Field(default=1, ge=1)
    """Tensor parallel: the number of ranks that split the weights of each layer."""
    sp: bool = False
    """Sequence parallel: whether the tp ranks split the sequence in the layers that tp does not split."""
    pp: int = Field(default=1, ge=1)
    """Pipeline parallel: the number of ranks that the layers are divided among."""
    vpp: int = Field(default=1, ge=1)
    """The number of interleaved chunks of layers (virtual stages) on every pipeline rank; 1: not interleaved."""
    layers_per_stage: tuple[int, ...] | None = None
    """The number of layers of each of the pp * vpp stages; left out, they are balanced with the output head in mind."""
    ep: int = Field(default=1, ge=1)
    """Expert parallel: the number of ranks, out of dp * cp, that the experts of each layer are divided among."""
    cp: int = Field(default=1, ge=1)
    """Context parallel: the number of ranks that split the sequence; in attention they split the heads instead."""
    zero: Literal[1, 2, 3] = 1
    """ZeRO stage: data-parallel ranks split optimizer state (1), gradients too (2), weights too (3); 2, 3 need pp=1."""
    offload_optimizer: bool = False
    """Whether the optimizer's state is kept, and its step computed, in host memory."""
    backend: Literal["auto", "gloo"] = "auto"
    """How ranks exchange tensors: auto is NCCL on GPUs and gloo on CPUs; gloo lets ranks share a GPU, slowly."""

    @property
    def sequence_parts(self) -> int:
        """Number of ranks that split a sequence; its length must be a multiple of it."""
        return self.cp * (self.tp if self.sp else 1)


class DataSection(Section):
    """The data plan to train on."""

    plan: str
    """The folder of a mixture plan, as `trivium data run` writes it."""


class EvalConfig(Section):
    """Held-out loss by source, and scores of tasks."""

    every: int = Field(default=100, ge=1)
    """The number of steps from one evaluation to the next; there is always one at the end."""
    at_start: bool = False
    """Whether there is an evaluation before the first step, too, of what the run begins from."""
    rows: int = Field(default=32, ge=0)
    """The maximum number of held-out rows of each source; 0 measures no held-out loss."""
    tasks: tuple[str, ...] = ()
    """The tasks of lm-evaluation-harness that are scored at each evaluation: names, YAML files or folders."""
    task_documents: int = Field(default=100, ge=1)
    """The maximum number of documents of each task."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """The number of solved examples in each prompt; left out, it is what the task says."""
    chat: bool = False
    """Whether prompts, and those of tasks, are put into the model's chat template."""
    prompts: tuple[str, ...] = ()
    """The texts that the model continues at each evaluation, into `run.dir`/samples.jsonl and the report."""
    prompt_tokens: int = Field(default=48, ge=1)
    """The maximum number of tokens of each continuation."""


class LogConfig(Section):
    """The output of a run while it trains; metrics.jsonl has every step in any case."""

    tensorboard: bool = True
    """Whether TensorBoard files are written into run.dir."""
    every: int = Field(default=1, ge=1)
    """The number of steps from one printed line to the next."""
    detail_every: int = Field(default=100, ge=0)
    """The number of steps from one with norms of activations, weights and update, and attention logits, to the next;
    0: none."""
    measure_peak: bool = False
    """Whether mfu is a share of the ranks' own matrix-product rate, measured at the start in about a second."""


class SpikesConfig(Section):
    """Steps whose loss or gradient norm is far above that of the steps before, and what is done about them."""

    action: Literal["log", "skip", "rewind"] = "log"
    """What is done about a spike, or a gradient norm that is not finite: log tells the spike, and a norm that is not
    finite ends the run; skip leaves the weights as they were in a step with such a norm; rewind goes back to the newest
    checkpoint before the step, and passes over the step's samples."""
    z_score: float = Field(default=8.0, gt=0)
    """How many robust standard deviations above the median of the window a loss or a norm is a spike."""
    window: int = Field(default=100, ge=20)
    """The number of last steps that a step is compared with; after 20 steps the comparison begins."""
    most_skipped: int = Field(default=10, ge=1)
    """The number of steps, of the last 1,000, that may be skipped; one more ends the run."""
    most_rewinds: int = Field(default=10, ge=1)
    """How often, in 1,000 steps, the run may go back to a checkpoint; one time more ends the run."""
    pass_over: tuple[tuple[int, int], ...] = ()
    """The samples that are not trained on: pairs of the first one and the one after the last, e.g. [[640, 648]]; a step
    that would use any of them begins after them."""

    @field_validator("pass_over")
    @classmethod
    def _ranges_are_not_empty(cls, ranges: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        if wrong := [list(pair) for pair in ranges if not 0 <= pair[0] < pair[1]]:
            raise ValueError(
                f"{wrong[0]} is no range of samples; give the first one and the one after the last, e.g. [640, 648]"
            )
        return ranges


class ChecksConfig(Section):
    """Checks for silent corruption: machines that compute wrong numbers without an error."""

    every: int | None = Field(default=None, ge=0)
    """The number of steps from one check to the next, in which weights that ranks share are compared and a micro-batch
    is computed twice, which takes as long as two more; left out, 500, or 0 with ZeRO stages 2, 3 or offloading; 0:
    none."""

    def interval(self, parallel: ParallelConfig) -> int:
        """Returns the steps from one check to the next, 0 for none."""
        if self.every is None:
            return 0 if parallel.zero > 1 or parallel.offload_optimizer else 500
        return self.every


class WatchdogConfig(Section):
    """The watchdog, which ends a run that makes no progress and says which rank holds up the others."""

    enabled: bool = True
    """Whether a run that makes no progress is ended, with status 76; else ranks wait half an hour for each other."""
    factor: float = Field(default=10.0, gt=1)
    """How many times as long as the longest of the last 20 a step, a rollout or an evaluation may take."""
    least_seconds: float = Field(default=120.0, gt=0)
    """The time that any of them may take in any case, in seconds."""
    first_seconds: float = Field(default=1500.0, gt=0)
    """The time that the start of the run, its first step and its first rollout may take, in seconds."""
    straggler: float = Field(default=1.5, gt=1)
    """How many times as long as the median of the ranks with the same work a rank may work in a step; one that takes
    longer in ten steps after one another is named in the log."""


class TrainerConfig(Section):
    """Sections that all training runs share."""

    run: TrainRunConfig
    """The folder of a training run, and the seed of its random numbers."""
    train: TrainSection
    """Steps, batch sizes and sequence length, and how they are computed."""
    optimizer: OptimizerConfig
    """AdamW."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over the steps."""
    parallel: ParallelConfig = ParallelConfig()
    """Degrees of parallelism."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Steps at which checkpoints are written, which of them are kept, and where they are copied to."""
    eval: EvalConfig = EvalConfig()
    """Held-out loss by source, and scores of tasks."""
    log: LogConfig = LogConfig()
    """The output of a run while it trains."""
    tracking: TrackingConfig = TrackingConfig()
    """Services and files, besides metrics.jsonl, that get the numbers of a run. Training never waits for them."""
    spikes: SpikesConfig = SpikesConfig()
    """Steps whose loss or gradient norm is far above that of the steps before, and what is done about them."""
    checks: ChecksConfig = ChecksConfig()
    """Checks for silent corruption: machines that compute wrong numbers without an error."""
    watchdog: WatchdogConfig = WatchdogConfig()
    """The watchdog, which ends a run that makes no progress and says which rank holds up the others."""
    adapter: AdapterConfig | None = None
    """Adapters that are trained in place of the model's own weights; left out, there are none."""

    @model_validator(mode="after")
    def _frozen_weights_fit(self) -> "TrainerConfig":
        parallel = self.parallel
        if (self.adapter or self.train.freeze) and (parallel.zero > 1 or parallel.offload_optimizer):
            key = "[adapter]" if self.adapter else f"train.freeze = {list(self.train.freeze)}"
            other = f"zero = {parallel.zero}" if parallel.zero > 1 else "offload_optimizer = true"
            remedy = "zero=1" if parallel.zero > 1 else "offload_optimizer=false"
            raise ValueError(
                f"{key} leaves weights untrained, which parallel.{other} does not support; set parallel.{remedy}, "
                "where weights that are not trained need no gradients and no optimizer state"
            )
        if self.adapter:
            self.adapter.check_layout(parallel.cp, parallel.sp)
            if self.adapter.base != "full" and self.train.compile:
                raise ValueError(
                    f"adapter.base = {self.adapter.base!r} makes weights while layers are computed, which compiled "
                    "blocks do not support; set train.compile=false"
                )
            self.adapter.check_steps(self.schedule.steps or self.train.steps)
        if self.adapter and self.train.freeze:
            raise ValueError(
                f"train.freeze = {list(self.train.freeze)} with [adapter], which freezes every other weight anyway; "
                "leave train.freeze out"
            )
        return self

    @model_validator(mode="after")
    def _steps_can_be_skipped(self) -> "TrainerConfig":
        parallel = self.parallel
        action = self.spikes.action
        if action == "log":
            return self
        if parallel.zero > 1 or parallel.offload_optimizer:
            other = f"zero = {parallel.zero}" if parallel.zero > 1 else "offload_optimizer = true"
            raise ValueError(
                f'spikes.action = "{action}" needs an optimizer that can leave a step out, which DeepSpeed\'s for '
                f"parallel.{other} cannot; set spikes.action=log, or parallel.zero=1 without offload_optimizer"
            )
        if self.adapter and self.adapter.kind == "adalora":
            raise ValueError(
                f'spikes.action = "{action}" does not go with adapter.kind = "adalora", whose ranks are chosen from '
                "the gradients of all steps; set spikes.action=log"
            )
        return self

    @model_validator(mode="after")
    def _checks_fit(self) -> "TrainerConfig":
        parallel = self.parallel
        if self.checks.every and (parallel.zero > 1 or parallel.offload_optimizer):
            other = f"zero = {parallel.zero}" if parallel.zero > 1 else "offload_optimizer = true"
            raise ValueError(
                f"checks.every = {self.checks.every} looks at gradients before ranks exchange them, which DeepSpeed's "
                f"optimizers for parallel.{other} do not show; set checks.every=0, or parallel.zero=1 without "
                "offload_optimizer"
            )
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> "TrainerConfig":
        schedule, steps = self.schedule, self.train.steps
        decay = schedule.decay_steps if schedule.kind == "wsd" else 0
        if schedule.steps is not None and schedule.steps < steps:
            least = schedule.warmup_steps + decay
            left_out = ", leave it out" if least <= steps else ""
            shorter = f", or set train.steps={schedule.steps} or less" if least <= schedule.steps else ""
            raise ValueError(
                f"schedule.steps = {schedule.steps} ends before train.steps = {steps}, and there is no learning rate "
                f"then; set schedule.steps={max(steps, least)} or more{left_out}{shorter}"
            )
        key, end = ("schedule.steps", schedule.steps) if schedule.steps else ("train.steps", steps)
        if schedule.warmup_steps + decay > end:
            raise ValueError(
                f"schedule.warmup_steps = {schedule.warmup_steps} and decay_steps = {decay} do not fit into "
                f"{key} = {end}; shorten them, or set {key}={schedule.warmup_steps + decay} or more"
            )
        return self


class PretrainConfig(TrainerConfig):
    """The root of a pretraining run's config."""

    model: ModelConfig
    """The decoder; a published one by its name in place of the section, or by `preset` and keys that differ in it; left
    out with `init`, whose model it is."""
    init: InitConfig | None = None
    """The model whose weights training goes on from, with a new optimizer; left out, weights are drawn at random."""
    data: DataSection
    """The data plan to train on."""
