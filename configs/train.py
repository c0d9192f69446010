"""What a training run is: the sections every trainer shares, and the root of pretraining's config.

Shapes and degrees that must fit one another are checked in `configs.layout`, where the world size is known.
"""

from enum import StrEnum
from typing import Literal

from pydantic import Field, model_validator

from configs.base import Section


class RunConfig(Section):
    dir: str
    seed: int = Field(default=1234, ge=0)


class MoEConfig(Section):
    """Top-k routing over `num_experts`; the defaults are Mixtral's.

    Gating turns router logits into scores, each expert's by itself (`sigmoid`) or all together (`softmax`); the top_k
    scores weigh the experts' outputs, `renormalize`d to sum to one, times `routed_scaling`. With `num_groups`, experts
    come in groups of which a token uses `top_groups`: those with the highest `group_score`, the score of their best
    expert or the sum of their `top2` (DeepSeek-V2 and V3). `num_shared_experts` see every token.

    Balance: an auxiliary loss over each `sequence`, each `micro_batch` or the `global_batch`; a loss on the size of the
    router's logits (`z_loss_coef`); or a bias on the scores that choose, moved by `bias_update_rate` after each step
    towards experts with too few tokens (DeepSeek-V3). With `capacity_factor` an expert takes at most that many times
    its fair share of a micro-batch's tokens in training and drops later ones; without it nothing is dropped.
    """

    num_experts: int = Field(ge=2)
    top_k: int = Field(default=2, ge=1)
    ffn_hidden_size: int | None = Field(default=None, ge=8)
    num_shared_experts: int = Field(default=0, ge=0)
    gating: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    routed_scaling: float = Field(default=1.0, gt=0)
    num_groups: int = Field(default=1, ge=1)
    top_groups: int = Field(default=1, ge=1)
    group_score: Literal["max", "top2"] = "max"
    aux_loss: Literal["sequence", "micro_batch", "global_batch"] = "sequence"
    aux_loss_coef: float = Field(default=0.01, ge=0)
    z_loss_coef: float = Field(default=0.0, ge=0)
    bias_update_rate: float = Field(default=0.0, ge=0)
    capacity_factor: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _numbers_fit(self) -> "MoEConfig":
        experts, groups, top_groups = self.num_experts, self.num_groups, self.top_groups
        if experts % groups:
            raise ValueError(
                f"model.moe.num_experts = {experts} is not a multiple of model.moe.num_groups = {groups}; groups are "
                "of equal size"
            )
        if top_groups > groups:
            raise ValueError(
                f"model.moe.top_groups = {top_groups} is more than model.moe.num_groups = {groups}; lower top_groups"
            )
        reachable = experts // groups * top_groups
        if self.top_k > reachable:
            among = f"the {reachable} of {top_groups} groups" if groups > 1 else f"model.moe.num_experts = {experts}"
            raise ValueError(f"model.moe.top_k = {self.top_k} is more than {among}; lower top_k")
        if self.group_score == "top2" and experts // groups < 2:
            raise ValueError(
                f"model.moe.group_score = 'top2' needs two experts in a group, and {experts} experts in {groups} "
                "groups have one; set group_score='max'"
            )
        return self


class ModelConfig(Section):
    """A LLaMA-shaped decoder; with `moe`, every MLP is a mixture of experts of `expert_size` each."""

    vocab_size: int = Field(ge=8)
    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=8)
    ffn_hidden_size: int = Field(ge=8)
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_dim: int | None = Field(default=None, ge=2)
    qk_norm: bool = False
    norm_eps: float = Field(default=1e-5, gt=0)
    rope_theta: float = Field(default=10000.0, gt=0)
    tie_embeddings: bool = False
    init_std: float = Field(default=0.02, gt=0)
    moe: MoEConfig | None = None

    @model_validator(mode="after")
    def _heads_fit(self) -> "ModelConfig":
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads = {self.num_heads} is not a multiple of model.num_kv_heads = {self.num_kv_heads}; "
                "every key-value head serves the same number of query heads"
            )
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.hidden_size = {self.hidden_size} is not a multiple of model.num_heads = {self.num_heads}; "
                "change one or set model.head_dim"
            )
        if self.dim_per_head % 2:
            raise ValueError(
                f"model.head_dim = {self.dim_per_head} is odd; rotary embedding turns pairs, so make it even"
            )
        return self

    @property
    def dim_per_head(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def expert_size(self) -> int:
        """The inner size of one expert's MLP."""
        return (self.moe and self.moe.ffn_hidden_size) or self.ffn_hidden_size

    def num_parameters(self, active: bool = False) -> int:
        """Parameters of the whole model; with `active`, those one token passes through (embedding lookups included)."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * self.parameters_per_layer(active) + embeddings + self.hidden_size

    def parameters_per_layer(self, active: bool = False) -> int:
        attention = 2 * self.hidden_size * self.dim_per_head * (self.num_heads + self.num_kv_heads)
        if self.qk_norm:
            attention += 2 * self.dim_per_head
        mlp = 3 * self.hidden_size * self.ffn_hidden_size
        if self.moe:
            used = self.moe.num_shared_experts + (self.moe.top_k if active else self.moe.num_experts)
            mlp = used * 3 * self.hidden_size * self.expert_size + self.hidden_size * self.moe.num_experts
        return attention + mlp + 2 * self.hidden_size


class Precision(StrEnum):
    FP32 = "fp32"
    BF16 = "bf16"
    AUTO = "auto"  # bf16 on a GPU or a CPU with bf16 instructions, else fp32; the run directory says which it was


class TrainSection(Section):
    """`dropout` zeros that share of the hidden states that embedding, attention and MLP give, by sample, so that every
    layout drops the same. `recompute` trades time for memory: `selective` keeps nothing inside attention (scores and
    softmax), `full` keeps only what goes into each block; the backward pass computes the rest again.
    """

    steps: int = Field(ge=1)
    global_batch_size: int = Field(ge=1)
    micro_batch_size: int = Field(ge=1)
    seq_length: int = Field(ge=2)
    precision: Precision = Precision.AUTO
    compile: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)
    recompute: Literal["none", "selective", "full"] = "none"


class OptimizerConfig(Section):
    """AdamW (Loshchilov and Hutter 2019); weight decay on matrices only, never on norms. 0 turns clipping off."""

    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_grad: float = Field(default=1.0, ge=0)


class ScheduleConfig(Section):
    """Linear warmup, then cosine to `min_lr_ratio`; wsd: constant, then linear over the last `decay_steps`."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    decay_steps: int = Field(default=0, ge=0)
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)


class ParallelConfig(Section):
    """Degrees of parallelism; data parallel takes the ranks that are left. `configs.layout` checks them.

    `sp` splits the sequence over the tp ranks where layers are not split; `cp` splits it everywhere but in attention.
    `ep` of the ranks that are left share each layer's experts. With `vpp` every pipeline rank holds that
    many chunks of layers, interleaved. `layers_per_stage` has pp * vpp numbers, from the first layer to the last;
    left out, the layers are spread so that the slowest stage, the last with its output head, is as fast as can be.
    `zero` is the stage: 1 splits the optimizer's state over data parallel, 2 gradients too, 3 weights too (2 and 3 not
    over a pipeline). `offload_optimizer` keeps that state in host memory and steps it there.
    """

    tp: int = Field(default=1, ge=1)
    sp: bool = False
    pp: int = Field(default=1, ge=1)
    vpp: int = Field(default=1, ge=1)
    layers_per_stage: tuple[int, ...] | None = None
    ep: int = Field(default=1, ge=1)
    cp: int = Field(default=1, ge=1)
    zero: Literal[1, 2, 3] = 1
    offload_optimizer: bool = False


# An option of every training command: see pretrain/checkpoint/resume.py.
RESUME = (
    "--resume",
    "auto",
    "auto: from the newest whole checkpoint of run.dir, or a new start; no: a new start, refused where run.dir has "
    "checkpoints; or the path of a checkpoint, of this run or of another one like it",
)


class CheckpointConfig(Section):
    """A checkpoint every `every` steps and at the end; the last `keep` stay, and all whose step is a multiple of
    `keep_every` (0: none).
    """

    every: int = Field(default=100, ge=1)
    keep: int = Field(default=2, ge=1)
    keep_every: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _multiples_are_saved(self) -> "CheckpointConfig":
        if self.keep_every % self.every:
            raise ValueError(
                f"checkpoint.keep_every = {self.keep_every} is not a multiple of checkpoint.every = {self.every}; only "
                f"saved steps can be kept, so use {max(1, round(self.keep_every / self.every)) * self.every}"
            )
        return self


class DataSection(Section):
    """`plan` is the directory that `trivium data run` ends with."""

    plan: str


class EvalConfig(Section):
    """Held-out loss per source, every `every` steps and at the end, on at most `rows` rows a source."""

    every: int = Field(default=100, ge=1)
    rows: int = Field(default=32, ge=0)


class LogConfig(Section):
    tensorboard: bool = True
    every: int = Field(default=1, ge=1)


class TrainerConfig(Section):
    """What the one train loop reads, whatever is trained."""

    run: RunConfig
    train: TrainSection
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _schedule_fits(self) -> "TrainerConfig":
        schedule, steps = self.schedule, self.train.steps
        decay = schedule.decay_steps if schedule.kind == "wsd" else 0
        if schedule.warmup_steps + decay > steps:
            raise ValueError(
                f"schedule.warmup_steps = {schedule.warmup_steps} and decay_steps = {decay} do not fit into "
                f"train.steps = {steps}; shorten them or train longer"
            )
        return self


class PretrainConfig(TrainerConfig):
    model: ModelConfig
    data: DataSection
