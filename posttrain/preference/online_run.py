"""The start of online preference learning, before the ranks join: opens the task and checks that its answers fit."""

from dataclasses import dataclass

from configs.layout import Layout
from configs.loader import ConfigError
from configs.method_layout import check_method
from configs.preference import PreferenceConfig
from posttrain.initial_chat_model import InitialChatModel
from posttrain.preference.online_source import OnlinePreferenceSource, check_room
from posttrain.rl.policy_copy import PolicyCopy
from posttrain.rl.reference_policy import check_reference
from posttrain.rl.rl_start import source_state
from posttrain.rl.rollout_source import SamplingPlan
from posttrain.rl.task_accuracy import TaskAccuracy
from posttrain.tasks.lengths import check_answers
from posttrain.tasks.preflight import check_task
from posttrain.tasks.verifiable_tasks import make_task


@dataclass(frozen=True)
class OnlineRun:
    """The source of pairs, and the evaluator of answers to held-out prompts."""

    source: OnlinePreferenceSource
    accuracy: TaskAccuracy


def opened_online(config: PreferenceConfig, initial: InitialChatModel, layout: Layout, is_main: bool) -> OnlineRun:
    """Opens the task of a run. Raises ConfigError if its prompts and answers do not fit the model and the rows."""
    assert config.online is not None and config.task is not None
    online, train, seed = config.online, config.train, config.run.seed
    task = make_task(config.task, source_state(initial).get("rewards", {}))
    for line in check_task(task, initial.chat, train.seq_length // 2):
        if is_main:
            print(line)
    drawn = train.steps * train.global_batch_size * online.max_draws
    context = initial.lineage.context or None
    longest = check_answers(task, initial.chat, seed, drawn, config.task.eval_prompts, context)
    try:
        check_room(longest, task.max_new_tokens, train.seq_length)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    check_method(config, layout)
    if config.preference.has_reference and not (config.adapter and config.adapter.merges):
        check_reference(initial.pin)
    if is_main:
        print(
            f"{train.steps} steps of {train.global_batch_size} pairs, each of {online.completions} completions of a "
            f"prompt of {task}"
        )
    policy = PolicyCopy(online.sampler)
    most = longest + task.max_new_tokens - 1
    sampling = SamplingPlan(task, initial.chat, online.completions, online.temperature, seed, longest=most)
    source = OnlinePreferenceSource(sampling, online, config.preference, train, policy, initial.pin)
    return OnlineRun(source, TaskAccuracy(task, initial.chat, seed, config.task.eval_prompts, policy))
