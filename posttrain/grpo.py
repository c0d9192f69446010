"""`trivium grpo`: reinforcement learning from verifiable rewards by group-relative policy optimization (GRPO).

    torchrun --nproc-per-node 2 -m posttrain.grpo configs/posttrain/demo_grpo.toml

The trainer is pretraining's. The rows are sampled from the current model; `grpo.dialect` names advantages and loss.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from launch import bootstrap

    bootstrap.begin("posttrain.grpo")

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from configs.cli import TRAINING_OPTIONS, entrypoint, parse_args, profiled_steps
from configs.folders import check_writable
from configs.layout import GROUP_SIZE, Layout
from configs.rl import GRPOConfig
from launch.environment import ClusterEnvironment, is_main, report_to_torchrun


def main(argv: Sequence[str] | None = None) -> int:
    """Trains on the rewards of a task and returns the exit status."""
    config, args = parse_args(
        GRPOConfig,
        argv,
        prog="trivium grpo",
        description="Trains a model on a task's rewards; the same command again continues from its newest checkpoint.",
        example="trivium grpo configs/posttrain/demo_grpo.toml train.steps=50 grpo.dialect=rloo",
        options=TRAINING_OPTIONS,
    )
    profiled = profiled_steps(args.profile, config.train.steps)
    if not args.dry_run:
        check_writable(config.run.dir, "run.dir")
    # torch takes seconds to import, so it is imported after the config has been checked.
    from posttrain.initial_model import InitialChatModel
    from posttrain.reward_model.score import open_scorer
    from posttrain.rl.group_credit import GroupCredit
    from posttrain.rl.logprob_check import LogprobCheck
    from posttrain.rl.method import chosen_dialect
    from posttrain.rl.policy_copy import PolicyCopy, check_way
    from posttrain.rl.policy_loss import PolicyLoss
    from posttrain.rl.reference import check_reference
    from posttrain.rl.rollout_source import RolloutSource, SamplingPlan
    from posttrain.tasks.lengths import check_answers, check_rows, longest_answer
    from posttrain.tasks.preflight import check_task
    from posttrain.tasks.task_accuracy import TaskAccuracy
    from posttrain.tasks.verifiable_tasks import make_task
    from pretrain.parallel import groups
    from pretrain.trainer import Trainer

    env = ClusterEnvironment.read()
    initial = InitialChatModel.open(config.init, config.run.dir, args.resume)
    initial.check_rows(config.train.seq_length)
    if initial.note and env.is_main:
        print(f"note: {initial.note}")
    task, prompts = make_task(config.task, open_scorer), config.train.global_batch_size // config.grpo.group_size
    row = min(config.train.seq_length, initial.lineage.context or config.train.seq_length)
    lines = check_task(task, initial.chat, row)
    if env.is_main and lines:
        print("\n".join(lines))
    drawn = config.train.steps * prompts, config.task.eval_prompts
    longest = check_answers(task, initial.chat, config.run.seed, *drawn, initial.lineage.context or None)
    answer = partial(longest_answer, task, initial.chat, config.run.seed, *drawn) if initial.continues else None
    check_rows(task, longest, config.train.seq_length, config.parallel, answer)
    given = (*initial.given, GROUP_SIZE) if initial.continues else initial.given
    group = config.grpo.group_size
    layout = Layout.of(env.world_size, config.parallel, initial.model, config.train, group, given)
    check_way(config.rl.sampler, layout)
    if config.rl.kl != "none":
        check_reference(initial.pin)
    dialect = chosen_dialect(config.grpo.dialect, config.grpo, "grpo")
    if args.dry_run:
        print(
            f"{config.train.steps} steps of {prompts} prompts x {group} samples of {task}, "
            f"layout {layout}, from {initial.pin.checkpoint} into {config.run.dir}"
        )
        return 0

    with groups.joined(env, layout, config.parallel.backend) as mesh:
        policy, check = PolicyCopy(config.rl.sampler), LogprobCheck(config.grpo.max_logprob_difference)
        source = RolloutSource(
            SamplingPlan(task, initial.chat, group, config.grpo.temperature, config.run.seed),
            config.rl,
            config.train,
            config.run.dir,
            GroupCredit(dialect, config.rl, task.max_new_tokens),
            dialect.aggregation,
            policy,
            check,
            initial.pin,
        )
        return Trainer(
            config,
            initial.model,
            source,
            PolicyLoss(dialect.policy, config.rl, config.grpo.temperature, check),
            mesh,
            [TaskAccuracy(task, initial.chat, config.run.seed, config.task.eval_prompts, policy)],
            initial.lineage,
            title=Path(config.run.dir).name,
            resume=args.resume,
            profiled=profiled,
        ).fit()


if __name__ == "__main__":
    entrypoint(main, prints_errors=is_main(), on_error=report_to_torchrun)
