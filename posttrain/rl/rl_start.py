"""The start of GRPO and PPO, before the ranks join: opens the initial model and the task, and checks that they fit."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from configs.layout import GROUP_SIZE, Layout
from configs.loader import ConfigError
from configs.method_layout import check_method
from configs.rl import GRPOConfig, GRPOSection, PPOConfig, PPOSection
from launch.environment import ClusterEnvironment
from posttrain.algorithms.dialects import Dialect
from posttrain.initial_chat_model import InitialChatModel
from posttrain.rl import rollout_file
from posttrain.rl.method import chosen_dialect
from posttrain.rl.policy_copy import PolicyCopy
from posttrain.rl.reference_policy import check_reference
from posttrain.rl.rollout_source import SamplingPlan
from posttrain.rl.vllm_sampler import VLLMSampler, check_vllm
from posttrain.tasks.episode_environment import check_replies
from posttrain.tasks.lengths import check_answers, check_rows, longest_answer
from posttrain.tasks.preflight import check_task
from posttrain.tasks.verifiable_tasks import made_from, make_task
from pretrain.checkpoint import storage


@dataclass(frozen=True)
class OpenedRun:
    """The parts of a run that are known before ranks join; `said` describes it in one line."""

    initial: InitialChatModel
    sampling: SamplingPlan
    dialect: Dialect
    layout: Layout
    policy: PolicyCopy
    said: str


def opened(
    config: GRPOConfig | PPOConfig, section: GRPOSection | PPOSection, name: str, resume: str, env: ClusterEnvironment
) -> OpenedRun:
    """Opens model and task of a run of the method `name`. Raises ConfigError if they do not fit together."""
    initial = InitialChatModel.open(config.init, config.run.dir, resume)
    initial.check_rows(config.train.seq_length)
    if initial.note and env.is_main:
        print(f"note: {initial.note}")
    rollout_file.check_owner(config.rl.record, config.run.dir, initial.continues)
    group, begun = section.group_size, source_state(initial).get("rewards", {})
    task, prompts = make_task(config.task, begun, plays=True), config.train.global_batch_size // group
    if env.is_main:
        for key, facts in made_from(task).items():
            then = begun.get(key, {})
            same = "function" in facts and facts["function"] == then.get("function")
            if same and facts["sha256"] != then["sha256"]:
                print(f"note: {key}: the module of {facts['function']} has changed since the run began")
    lines = check_task(task, initial.chat, config.train.seq_length, initial.lineage.context)
    if env.is_main and lines:
        print("\n".join(lines))
    drawn = config.train.steps * prompts, config.task.eval_prompts
    longest = check_answers(task, initial.chat, config.run.seed, *drawn, initial.lineage.context or None)
    answer = partial(longest_answer, task, initial.chat, config.run.seed, *drawn) if initial.continues else None
    check_rows(task, longest, config.train.seq_length, config.parallel, answer)
    given = (*initial.given, GROUP_SIZE) if initial.continues else initial.given
    layout = Layout.of(env.world_size, config.parallel, initial.model, config.train, group, given)
    check_method(config, layout)
    if config.rl.kl != "none" and not (config.adapter and config.adapter.merges):
        check_reference(initial.pin)
    dialect = chosen_dialect(section.dialect, section, name)
    said = (
        f"{config.train.steps} steps of {prompts} prompts x {group} samples of {task}, layout {layout}, from "
        f"{initial.pin.checkpoint} into {config.run.dir}"
    )
    awaits = isinstance(config, GRPOConfig) and config.rl.staleness > 0
    if config.rl.replay and not awaits and not rollout_file.numbers(Path(config.rl.replay)):
        raise ConfigError(
            f"rl.replay = {config.rl.replay!r} has no recorded rollouts; name the folder that a run had as rl.record, "
            "or leave it out"
        )
    environment = config.rl.environment
    plays = environment is not None or config.task.kind == "verifiers"
    if plays:
        check_replies(initial.chat, "task.verifiers" if environment is None else "rl.environment")
    most = None if plays else longest + task.max_new_tokens - 1  # the last token is a label
    drawing = group, section.temperature, config.run.seed, environment, most
    sampling = SamplingPlan(task, initial.chat, *drawing, method=name, settled=_settled(config, section, name))
    return OpenedRun(initial, sampling, dialect, layout, _policy(config, initial), said)


def _settled(config: GRPOConfig | PPOConfig, section: GRPOSection | PPOSection, name: str) -> dict[str, Any]:
    """Returns the settings, by key, that a rollout is sampled by and that its advantages are computed with."""
    own = ("temperature", "dialect", "gamma", "gae_lambda")
    found = {f"{name}.{key}": getattr(section, key) for key in own if hasattr(section, key)}
    scored = ("kl", "overlong_buffer", "overlong_penalty", *(("kl_coef",) * (config.rl.kl == "reward")))
    return found | {f"rl.{key}": getattr(config.rl, key) for key in scored}


def _policy(config: GRPOConfig | PPOConfig, initial: InitialChatModel) -> PolicyCopy:
    """Returns the weights to sample with. Raises ConfigError if vLLM is chosen and cannot sample in this run."""
    if config.rl.sampler != "vllm":
        return PolicyCopy(config.rl.sampler)
    if config.task.kind == "verifiers":
        raise ConfigError(
            "task.kind = 'verifiers' has episodes of several turns, and rl.sampler = 'vllm' is tested with one answer "
            "to a prompt; set rl.sampler=whole"
        )
    check_vllm(config.rl, initial.model, config.adapter)
    architecture = (initial.lineage.imported or {}).get("architecture")
    room = config.train.seq_length + 1  # the last token is a label
    return PolicyCopy(vllm=VLLMSampler(config.rl.vllm, initial.model, architecture, room, config.run.dir))


def source_state(initial: InitialChatModel) -> dict[str, Any]:
    """Returns the state of the batch source in a checkpoint of a run that goes on; nothing for a new one."""
    return {} if initial.own is None else dict(storage.read_manifest(initial.own).get("source", {}))
