"""Configs of reinforcement-learning runs: the sections of all training runs, rollouts, and the sections of methods."""

from typing import Literal

from pydantic import Field, model_validator

from configs.initial import InitConfig
from configs.loader import ConfigError
from configs.section import Section
from configs.tasks import TaskConfig
from configs.train import TrainerConfig

ROLLOUTS_ONLY = (  # an option of commands that sample: name, default, help
    "--rollouts-only",
    "",
    "sample so many rollouts from the weights that training would go on with, write them into rl.record, and do not "
    "train; rl.replay then trains on them",
)


OVER_ROLLOUT = ("reinforce_pp", "reinforce_pp@verl")  # dialects that compare rewards over the whole rollout


class EnvironmentConfig(Section):
    """Tools that the model may call before it answers, each call in a turn of its own."""

    tools: tuple[Literal["calculator", "python"], ...] = Field(default=("calculator",), min_length=1)
    """The tools: a calculator, and Python in the sandbox. The model calls one by <NAME>ARGUMENT</NAME>, and the next
    message says <result>RESULT</result>."""
    max_calls: int = Field(default=4, ge=1)
    """The number of calls of an episode; one more ends it with a score of 0."""


class VLLMConfig(Section):
    """The process in which vLLM samples, with rl.sampler = "vllm"; each rank starts one."""

    python: str | None = None
    """The Python of an environment that has the package vllm; left out, the one that runs Trivium."""
    cache_gb: float = Field(default=2.0, gt=0)
    """The size of the key-value cache of each process, in GB."""
    seconds: float = Field(default=1800.0, gt=0)
    """The most seconds that the process may take to start, to take weights or to sample a rollout; then the run
    ends."""


class RLSection(Section):
    """Rollouts and what is done with them, in every method: updates, corrections, the reference policy, records."""

    rollout_batch: int = Field(default=1, ge=1)
    """The number of global batches in a rollout; each is a minibatch with an update of its own."""
    epochs: int = Field(default=1, ge=1)
    """The number of passes over a rollout; with rollout_batch it says how many updates a rollout has."""
    correction: Literal["report", "truncate", "mask"] = "report"
    """What happens where sampler and trainer disagree on a token's probability: nothing but the report, a weight on its
    loss that is limited to the bounds below (truncate), or a weight of 0 outside of them (mask)."""
    correction_level: Literal["token", "sequence", "geometric"] = "token"
    """Whether a weight is of a token, or of a sequence by the product or the geometric mean of its tokens' weights."""
    correction_low: float = Field(default=0.0, ge=0)
    """The lower bound of the weights."""
    correction_high: float = Field(default=2.0, gt=0)
    """The upper bound of the weights."""
    kl: Literal["none", "reward", "loss"] = "none"
    """Where the divergence from the initial model is charged: nowhere, in the reward of each token, or in the loss."""
    kl_coef: float = Field(default=0.001, gt=0)
    """The factor on the divergence, called beta in papers."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """The estimator of the divergence; left out, it is k1 in the reward and k3 in the loss."""
    max_draws: int = Field(default=1, ge=1)
    """How often the prompts of a rollout may be drawn to replace groups of equal rewards (dynamic sampling); 1: off.
    For methods that compare rewards within groups alone."""
    overlong_buffer: int = Field(default=0, ge=0)
    """The number of tokens before task.max_new_tokens over which overlong_penalty rises from 0; 0: no penalty."""
    overlong_penalty: float = Field(default=1.0, gt=0)
    """What a completion of the maximum length loses of its reward."""
    sampler: Literal["whole", "split", "vllm"] = "whole"
    """How weights come to sampling: each rank gathers a whole copy (whole), or gives it to a process of vLLM (vllm), or
    ranks of tp and ep sample together with their slices (split)."""
    vllm: VLLMConfig = VLLMConfig()
    """The process in which vLLM samples, with rl.sampler = "vllm"."""
    record: str | None = None
    """The folder in which every rollout is kept; left out, those that a resume may need are, in run.dir/rollouts."""
    replay: str | None = None
    """The folder of recorded rollouts to train on in place of new ones."""
    replay_experts: bool = True
    """Whether tokens go to the experts that the sampler's routers chose when the trainer computes log-probabilities and
    gradients of a mixture of experts; each sampled token then takes 2 bytes for each choice in each layer."""
    environment: EnvironmentConfig | None = None
    """Tools that the model may call before it answers; left out, its first turn is its answer."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> "RLSection":
        if self.correction_low > self.correction_high:
            raise ValueError(
                f"rl.correction_low = {self.correction_low} is above rl.correction_high = {self.correction_high}; "
                "swap them"
            )
        if self.environment and self.sampler == "split":
            raise ValueError(
                "rl.sampler = 'split' lets ranks sample together, and episodes with rl.environment end at different "
                "turns; set rl.sampler=whole"
            )
        if self.environment and self.sampler == "vllm":
            raise ValueError(
                "rl.sampler = 'vllm' is tested with one answer to a prompt, and episodes with rl.environment have "
                "several turns; set rl.sampler=whole"
            )
        if self.environment and self.overlong_buffer:
            raise ValueError(
                f"rl.overlong_buffer = {self.overlong_buffer} is about the length of one answer, and episodes with "
                "rl.environment have several turns; set rl.overlong_buffer=0"
            )
        if self.record and self.record == self.replay:
            raise ValueError(f"rl.record and rl.replay are both {self.record!r}; leave out rl.record to replay it")
        return self

    @property
    def checks_every_rollout(self) -> bool:
        """Whether the sampler is given a copy of the weights for each rollout, which it may not have taken."""
        return self.sampler == "vllm" and self.replay is None

    @property
    def estimator(self) -> str:
        """The estimator of the KL divergence from the reference policy, where the loss or the reward has one."""
        return self.kl_estimator or ("k3" if self.kl == "loss" else "k1")


def check_task(settings: RLSection, task: TaskConfig) -> None:
    """Raises ValueError if the settings of rollouts do not go with the task.

    The penalty of long completions must begin after their first token, and a task with episodes of its own has several
    turns, at any of which one may end.
    """
    if task.kind == "verifiers":
        for key, set_to in (("environment", None), ("sampler", "whole"), ("overlong_buffer", 0)):
            if (value := getattr(settings, key)) not in (set_to, None):
                said = "has tools" if key == "environment" else f"is {value!r}"
                remedy = f"leave out rl.{key}" if set_to is None else f"set rl.{key}={set_to}"
                raise ValueError(f"rl.{key} {said}, and task.kind = 'verifiers' has episodes of its own; {remedy}")
    if settings.overlong_buffer > task.max_new_tokens:
        raise ValueError(
            f"rl.overlong_buffer = {settings.overlong_buffer} is more than task.max_new_tokens = {task.max_new_tokens},"
            f" before whose last tokens the penalty begins; set rl.overlong_buffer={task.max_new_tokens} or less"
        )


def checked_rollouts(chosen: str, settings: "GRPORollouts") -> int:
    """Returns the number of rollouts that `--rollouts-only` asks for, 0 for "".

    Raises ConfigError if it is no number, if the run does not record rollouts, or if a run that samples ahead of
    training would train.
    """
    if not chosen and settings.staleness and settings.record:
        raise ConfigError(
            f"rl.staleness = {settings.staleness} with rl.record is of the command that samples; add --rollouts-only "
            "and the number of rollouts, or name rl.replay in place of rl.record to train"
        )
    if not chosen:
        return 0
    if not (chosen.isascii() and chosen.isdigit() and int(chosen)):
        raise ConfigError(f"--rollouts-only {chosen} is no number of rollouts; give 1 or more")
    if settings.record is None or settings.replay is not None:
        key = "rl.record is left out" if settings.record is None else f"rl.replay = {settings.replay!r}"
        remedy = "set rl.record=FOLDER" if settings.record is None else "leave rl.replay out"
        raise ConfigError(f"--rollouts-only samples rollouts and writes them into rl.record, and {key}; {remedy}")
    return int(chosen)


def check_draws(settings: RLSection, key: str, dialect: str, learns: str, remedy: str) -> None:
    """Raises ValueError if groups of equal rewards are to be replaced, from which the method `learns`."""
    if settings.max_draws > 1:
        raise ValueError(
            f"rl.max_draws = {settings.max_draws} replaces groups of equal rewards, and {key} = {dialect!r} learns "
            f"from them, as it compares {learns}; set rl.max_draws=1{remedy}"
        )


class PolicySection(Section):
    """Sampling and the policy's loss, as far as GRPO and PPO share them."""

    temperature: float = Field(default=1.0, gt=0)
    """The temperature at which completions are sampled."""
    aggregation: Literal["token_mean", "sequence_mean", "fixed_length"] | None = None
    """The average of token losses: over all tokens, over completions' own means, or over task.max_new_tokens each; left
    out, it is the dialect's."""
    clip_low: float | None = Field(default=None, gt=0, lt=1)
    """The lower bound of the probability ratio to the policy before the updates is 1 - clip_low; left out, it is the
    dialect's, mostly 0.2."""
    clip_high: float | None = Field(default=None, gt=0)
    """The upper bound of the probability ratio is 1 + clip_high; more than clip_low is DAPO's clip-higher."""
    dual_clip: float | None = Field(default=None, gt=1)
    """The bound on a token's loss where its advantage A is negative, as -dual_clip * A; left out, the dialect's."""
    max_logprob_difference: float = Field(default=0.05, gt=0)
    """The maximum mean difference, in nats a token, between the log-probabilities that sampler and trainer compute, by
    different code, before the first step; fp32 gives about 1e-6, bf16 about 0.01."""


class GRPOSection(PolicySection):
    """Sampling and loss of methods that compare the completions of one prompt, or of the whole rollout."""

    group_size: int = Field(default=16, ge=2)
    """The number of completions of each prompt, whose rewards are compared; a divisor of train.global_batch_size."""
    dialect: Literal[
        "grpo@trl",
        "grpo@verl",
        "grpo@nemo",
        "dr_grpo",
        "dapo",
        "rloo",
        "reinforce_pp",
        "reinforce_pp@verl",
        "reinforce_pp_baseline",
        "gspo",
        "cispo@minimax",
        "cispo@verl",
        "gdpo",
    ] = "grpo@trl"
    """The method, as a paper or code base defines it: advantages, loss and aggregation; see algorithms/dialects.py."""


class GRPORollouts(RLSection):
    """Rollouts and what is done with them, with sampling that may be ahead of training."""

    staleness: int = Field(default=0, ge=0)
    """How many rollouts sampling is ahead of training, where one command samples with --rollouts-only while another one
    trains with rl.replay: rollout n comes from the weights before the updates on rollout n - staleness; 0: the two take
    turns."""

    @model_validator(mode="after")
    def _stale_rollouts_are_corrected(self) -> "GRPORollouts":
        if self.staleness and (self.record is None) == (self.replay is None):
            raise ValueError(
                f"rl.staleness = {self.staleness} is for two commands at the same time; set rl.record=FOLDER in the "
                "one that samples, with --rollouts-only, and rl.replay=FOLDER in the one that trains"
            )
        if self.staleness and self.sampler == "vllm":
            raise ValueError(
                f"rl.staleness = {self.staleness} trains on rollouts of weights that the trainer no longer has, so "
                "that nothing would tell whether vLLM took them; set rl.sampler=whole"
            )
        if self.staleness and self.correction == "report":
            raise ValueError(
                f"rl.staleness = {self.staleness} trains on rollouts of older weights, and rl.correction = 'report' "
                "does not weigh their tokens by it; set rl.correction=truncate, or mask"
            )
        return self


class GRPOConfig(TrainerConfig):
    """The root of a reinforcement-learning run's config."""

    init: InitConfig
    """The model to start from."""
    task: TaskConfig
    """The task whose answers are rewarded."""
    grpo: GRPOSection = GRPOSection()
    """Sampling and loss of methods that compare the completions of one prompt, or of the whole rollout."""
    rl: GRPORollouts = GRPORollouts()
    """Rollouts and what is done with them: updates, corrections, the reference policy, records, staleness."""

    @model_validator(mode="after")
    def _weights_to_sample_with_are_kept(self) -> "GRPOConfig":
        """Checks that there is a checkpoint before each rollout, and that it stays until the sampler has read it."""
        stale, every, steps = self.rl.staleness, self.checkpoint.every, self.rl.rollout_batch * self.rl.epochs
        if stale and steps % every:
            raise ValueError(
                f"checkpoint.every = {every} leaves rollouts, of {steps} steps each, without the checkpoint that "
                f"rl.staleness = {stale} samples with; set checkpoint.every={steps}"
            )
        if stale and self.checkpoint.keep < (needed := stale * steps // every + 1):
            raise ValueError(
                f"checkpoint.keep = {self.checkpoint.keep} removes checkpoints that rl.staleness = {stale} samples "
                f"with; set checkpoint.keep={needed} or more"
            )
        return self

    @model_validator(mode="after")
    def _method_suits_rollouts_and_task(self) -> "GRPOConfig":
        if self.grpo.dialect == "gdpo" and self.rl.kl == "reward":
            raise ValueError(
                "grpo.dialect = 'gdpo' normalises each reward by itself, and rl.kl = 'reward' would charge the "
                "divergence in none of them; set rl.kl=loss"
            )
        if self.grpo.dialect in OVER_ROLLOUT:
            learns, remedy = "rewards over the whole rollout", ", or grpo.dialect=reinforce_pp_baseline"
            check_draws(self.rl, "grpo.dialect", self.grpo.dialect, learns, remedy)
        check_task(self.rl, self.task)
        return self


class PPORollouts(RLSection):
    """Rollouts and what is done with them, with the defaults of PPO."""

    epochs: int = Field(default=4, ge=1)
    """The number of passes over a rollout; with rollout_batch it says how many updates a rollout has."""
    kl: Literal["none", "reward", "loss"] = "reward"
    """Where the divergence from the initial model is charged: nowhere, in the reward of each token, or in the loss."""
    kl_coef: float = Field(default=0.02, gt=0)
    """The factor on the divergence, called beta in papers."""


class PPOSection(PolicySection):
    """Sampling, the policy's loss, the critic, and the text of pretraining that is trained on beside them."""

    group_size: int = Field(default=1, ge=1)
    """The number of completions of each prompt; a divisor of train.global_batch_size."""
    dialect: Literal["ppo", "ppo@verl"] = "ppo"
    """The method, as a paper or code base defines it; verl's also has a dual clip."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """The factor on a reward for each token that it lies ahead."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """The factor on each later step of generalized advantage estimation: 0 trusts the critic, 1 the rewards."""
    value_clip: float | None = Field(default=0.2, gt=0)
    """The maximum change of a value by the updates on one rollout; left out, there is none."""
    critic: str | None = None
    """The checkpoint, such as that of a reward model, that the critic starts from; left out, the policy's."""
    critic_lr: float | None = Field(default=None, gt=0)
    """The peak learning rate of the critic; left out, it is optimizer.lr."""
    text_plan: str | None = None
    """The data plan whose rows are trained on in the same steps (PPO-ptx), as long as train.seq_length."""
    text_rows: int = Field(default=0, ge=0)
    """The number of rows of text_plan in each step."""
    text_coef: float = Field(default=1.0, gt=0)
    """The factor on the loss of text; InstructGPT's was 27.8."""

    @model_validator(mode="after")
    def _text_has_rows(self) -> "PPOSection":
        if (self.text_plan is None) != (self.text_rows == 0):
            raise ValueError(
                f"ppo.text_plan = {self.text_plan!r} and ppo.text_rows = {self.text_rows} belong together; set "
                "both, or leave out both"
            )
        if self.text_plan is not None and self.temperature != 1.0:
            raise ValueError(
                f"ppo.text_plan needs ppo.temperature = 1, which is that of text, not {self.temperature}; set it to 1"
            )
        return self


class PPOConfig(TrainerConfig):
    """The root of a PPO run's config."""

    init: InitConfig
    """The model to start from."""
    task: TaskConfig
    """The task whose answers are rewarded."""
    ppo: PPOSection = PPOSection()
    """Sampling, the policy's loss, the critic, and the text of pretraining that is trained on beside them."""
    rl: PPORollouts = PPORollouts()
    """Rollouts and what is done with them, with the defaults of PPO."""

    @model_validator(mode="after")
    def _rollouts_suit_method_and_task(self) -> "PPOConfig":
        check_draws(self.rl, "ppo.dialect", self.ppo.dialect, "each reward with the critic's value", "")
        check_task(self.rl, self.task)
        return self
