"""Config of a training run: the sections that all trainers share, and the root of pretraining's config.

`configs.layout` checks that degrees of parallelism, model and batch fit each other and the world size.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Literal

from pydantic import Field, field_validator, model_validator

from configs.remedies import could_be, divisors
from configs.section import Section


class TrainRunConfig(Section):
    """The folder of a training run, and the seed of its random numbers."""

    dir: str
    """The folder for checkpoints, metrics and reports, relative to the working directory."""
    seed: int = Field(default=1234, ge=0)
    """The seed of initial weights, dropout, the order of data and sampled completions."""


class MoEConfig(Section):
    """Top-k routing over `num_experts`; the defaults are Mixtral's.

    Gating turns router logits into scores; the top_k scores weigh the experts' outputs. With groups (DeepSeek-V2 and
    V3), a token uses only experts of its best groups. The load of experts is balanced by an auxiliary loss or by a bias
    on the scores that choose experts (DeepSeek-V3); the z-loss keeps the router's logits small.
    """

    num_experts: int = Field(ge=2)
    """The number of routed experts in each layer."""
    top_k: int = Field(default=2, ge=1)
    """The number of routed experts that each token uses."""
    ffn_hidden_size: int | None = Field(default=None, ge=8)
    """The inner size of one expert's MLP; left out, it is model.ffn_hidden_size."""
    num_shared_experts: int = Field(default=0, ge=0)
    """The number of experts that every token uses in addition to the routed ones; 0 for none."""
    gating: Literal["softmax", "sigmoid"] = "softmax"
    """The function from logits to scores: over all experts (softmax), or for each expert by itself (sigmoid)."""
    renormalize: bool = True
    """Whether the top_k scores are divided by their sum before they weigh the outputs."""
    routed_scaling: float = Field(default=1.0, gt=0)
    """A factor on the weights of the routed experts' outputs."""
    num_groups: int = Field(default=1, ge=1)
    """The number of groups of equal size that the experts are divided into; 1 for no groups."""
    top_groups: int = Field(default=1, ge=1)
    """The number of groups whose experts a token may use, those with the highest group_score."""
    group_score: Literal["max", "top2"] = "max"
    """The score of a group: the score of its best expert (max) or the sum of its best two (top2)."""
    aux_loss: Literal["sequence", "micro_batch", "global_batch"] = "sequence"
    """The tokens over which the auxiliary loss balances the use of experts."""
    aux_loss_coef: float = Field(default=0.01, ge=0)
    """The factor on the auxiliary loss; 0 turns it off."""
    z_loss_coef: float = Field(default=0.0, ge=0)
    """The factor on the z-loss, which keeps the router's logits small; 0 turns it off."""
    bias_update_rate: float = Field(default=0.0, ge=0)
    """The change of each expert's bias after an optimizer step, upward for under-used experts; 0: no bias."""
    capacity_factor: float | None = Field(default=None, gt=0)
    """The limit of an expert's tokens in training, as a multiple of an even share; left out, no token is dropped."""

    @model_validator(mode="after")
    def _numbers_fit(self) -> "MoEConfig":
        if problem := self._problem():
            raise ValueError(problem)
        return self

    def _problem(self) -> str:
        """Returns what does not fit together and how to correct it, or ""."""
        experts, groups, top_groups = self.num_experts, self.num_groups, self.top_groups
        if experts % groups:
            return (
                f"model.moe.num_experts = {experts} is not a multiple of model.moe.num_groups = {groups}, and groups "
                f"are of equal size; {self._could_be('num_groups', divisors(experts))}"
            )
        if top_groups > groups:
            return (
                f"model.moe.top_groups = {top_groups} is more than model.moe.num_groups = {groups}; set "
                f"model.moe.top_groups={groups} or less"
            )
        reachable = experts // groups * top_groups
        if self.top_k > reachable:
            among = f"the {reachable} of {top_groups} groups" if groups > 1 else f"model.moe.num_experts = {experts}"
            return f"model.moe.top_k = {self.top_k} is more than {among}; set model.moe.top_k={reachable} or less"
        if self.group_score == "top2" and experts // groups < 2:
            return (
                f"model.moe.group_score = 'top2' needs two experts in a group, and {experts} experts in {groups} "
                "groups have one; set model.moe.group_score=max"
            )
        return ""

    def _could_be(self, key: str, tried: Sequence[int]) -> str:
        """Returns a clause that names values of a key that fit the rest, or says that none does."""
        said = could_be(
            f"model.moe.{key}",
            getattr(self, key),
            tried,
            lambda value: not self.model_copy(update={key: value})._problem(),
        )
        return said or f"no other value of model.moe.{key} alone fits the rest, so change more than one key"

    def state(self) -> tuple[str, ...]:
        """Names of the balancing state that is kept from step to step and saved in checkpoints."""
        bias = ("bias",) if self.bias_update_rate else ()
        return (*bias, "load") if self.aux_loss == "global_batch" and self.aux_loss_coef else bias


class ModelConfig(Section):
    """A LLaMA-shaped decoder; with `moe`, every MLP is a mixture of experts of `expert_size` each."""

    vocab_size: int = Field(ge=8)
    """The number of tokens of the tokenizer, and of rows of the embedding."""
    num_layers: int = Field(ge=1)
    """The number of decoder blocks."""
    hidden_size: int = Field(ge=8)
    """The width of the hidden states."""
    ffn_hidden_size: int = Field(ge=8)
    """The inner size of each block's SwiGLU MLP."""
    num_heads: int = Field(ge=1)
    """The number of query heads in attention."""
    num_kv_heads: int = Field(ge=1)
    """The number of key-value heads, a divisor of num_heads; equal to it for multi-head attention."""
    head_dim: int | None = Field(default=None, ge=2)
    """The width of one head, an even number; left out, it is hidden_size / num_heads."""
    qk_norm: bool = False
    """Whether queries and keys are RMS-normalized per head before the rotary embedding."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """The epsilon of RMSNorm, added to the mean square under the root."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """The base of the rotary embedding's wavelengths; larger for longer contexts."""
    tie_embeddings: bool = False
    """Whether the output head and the embedding are one matrix."""
    init_std: float = Field(default=0.02, gt=0)
    """The standard deviation of initial weights; output projections of blocks get it / sqrt(2 * num_layers)."""
    moe: MoEConfig | None = None
    """The mixture of experts in place of every MLP; left out, the model is dense."""

    @model_validator(mode="after")
    def _heads_fit(self) -> "ModelConfig":
        if problem := self._problem():
            raise ValueError(problem)
        return self

    def _problem(self) -> str:
        """Returns what does not fit together and how to correct it, or ""."""
        heads, width = self.num_heads, self.hidden_size
        if heads % self.num_kv_heads:
            kv_heads = could_be("model.num_kv_heads", self.num_kv_heads, divisors(heads), lambda _: True)
            return (
                f"model.num_heads = {heads} is not a multiple of model.num_kv_heads = {self.num_kv_heads}, and every "
                f"key-value head serves the same number of query heads; {kv_heads}"
            )
        if self.head_dim is None and width % heads:
            even = max(2, round(width / heads / 2) * 2)
            return (
                f"model.hidden_size = {width} is not a multiple of model.num_heads = {heads}; set model.head_dim={even}"
                f" or another even number, or set model.hidden_size={even * heads}"
            )
        if self.dim_per_head % 2:
            odd = self.dim_per_head
            said = f"model.head_dim = {odd}" if self.head_dim else f"model.hidden_size / model.num_heads = {odd}"
            return f"{said} is odd, and rotary embedding turns pairs; set model.head_dim={odd + 1}"
        return ""

    @property
    def dim_per_head(self) -> int:
        """The width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def expert_size(self) -> int:
        """The inner size of one expert's MLP."""
        return (self.moe and self.moe.ffn_hidden_size) or self.ffn_hidden_size

    def num_parameters(self, active: bool = False) -> int:
        """Number of parameters; with `active`, only those that one token uses, with the whole embedding among them."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * self.parameters_per_layer(active) + embeddings + self.hidden_size

    def parameters_per_layer(self, active: bool = False) -> int:
        """Number of parameters of one block; with `active`, only those of the experts that one token uses."""
        attention = 2 * self.hidden_size * self.dim_per_head * (self.num_heads + self.num_kv_heads)
        if self.qk_norm:
            attention += 2 * self.dim_per_head
        mlp = 3 * self.hidden_size * self.ffn_hidden_size
        if self.moe:
            used = self.moe.num_shared_experts + (self.moe.top_k if active else self.moe.num_experts)
            mlp = used * 3 * self.hidden_size * self.expert_size + self.hidden_size * self.moe.num_experts
        return attention + mlp + 2 * self.hidden_size


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


class CheckpointConfig(Section):
    """Steps at which checkpoints are written, and which of them are kept. One is always written at the end."""

    every: int = Field(default=100, ge=1)
    """The number of steps from one checkpoint to the next."""
    keep: int = Field(default=2, ge=1)
    """The number of newest checkpoints that are kept."""
    keep_every: int = Field(default=0, ge=0)
    """Checkpoints at multiples of this step are never deleted; it must be a multiple of every; 0: none."""

    @model_validator(mode="after")
    def _multiples_are_saved(self) -> "CheckpointConfig":
        if self.keep_every % self.every:
            raise ValueError(
                f"checkpoint.keep_every = {self.keep_every} is not a multiple of checkpoint.every = {self.every}; only "
                "saved steps can be kept; set checkpoint.keep_every="
                f"{max(1, round(self.keep_every / self.every)) * self.every}"
            )
        return self


class DataSection(Section):
    """The data plan to train on."""

    plan: str
    """The folder of a mixture plan, as `trivium data run` writes it."""


class EvalConfig(Section):
    """Held-out loss by source."""

    every: int = Field(default=100, ge=1)
    """The number of steps from one evaluation to the next; there is always one at the end."""
    rows: int = Field(default=32, ge=0)
    """The maximum number of held-out rows of each source; 0 turns evaluation off."""


class LogConfig(Section):
    """The output of a run while it trains; metrics.jsonl has every step in any case."""

    tensorboard: bool = True
    """Whether TensorBoard files are written into run.dir."""
    every: int = Field(default=1, ge=1)
    """The number of steps from one printed line to the next."""
    measure_peak: bool = False
    """Whether mfu is a share of the ranks' own matrix-product rate, measured at the start in about a second."""


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
    """Steps at which checkpoints are written, and which of them are kept."""
    eval: EvalConfig = EvalConfig()
    """Held-out loss by source."""
    log: LogConfig = LogConfig()
    """The output of a run while it trains."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> "TrainerConfig":
        schedule, steps = self.schedule, self.train.steps
        decay = schedule.decay_steps if schedule.kind == "wsd" else 0
        if schedule.steps is not None and schedule.steps < steps:
            raise ValueError(
                f"schedule.steps = {schedule.steps} ends before train.steps = {steps}, and there is no learning rate "
                f"then; set schedule.steps={max(steps, schedule.warmup_steps + decay)} or more, leave it out, or set "
                f"train.steps={schedule.steps} or less"
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
    """The shape of the decoder."""
    data: DataSection
    """The data plan to train on."""
