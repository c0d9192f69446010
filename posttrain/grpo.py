"""`trivium grpo`: reinforcement learning from verifiable rewards by group-relative policy optimization (GRPO).

    torchrun --nproc-per-node 2 -m posttrain.grpo configs/posttrain/demo_grpo.toml

The trainer is pretraining's. The rows are sampled from the current model; `grpo.dialect` names advantages and loss.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from launch import bootstrap

    bootstrap.begin("posttrain.grpo")

from collections.abc import Sequence

from configs.cli import TRAINING_OPTIONS, entrypoint, parse_args, profiled_steps
from configs.folders import check_run_dir, check_writable
from configs.rl import ROLLOUTS_ONLY, GRPOConfig, checked_rollouts
from launch.environment import ClusterEnvironment, is_main, report_to_torchrun


def main(argv: Sequence[str] | None = None) -> int:
    """Trains on the rewards of a task and returns the exit status."""
    config, args = parse_args(
        GRPOConfig,
        argv,
        prog="trivium grpo",
        description="Trains a model on a task's rewards; the same command again continues from its newest checkpoint.",
        example="trivium grpo configs/posttrain/demo_grpo.toml train.steps=50 grpo.dialect=rloo",
        options=(*TRAINING_OPTIONS, ROLLOUTS_ONLY),
    )
    profiled = profiled_steps(args.profile, config.train.steps)
    rollouts = checked_rollouts(args.rollouts_only, config.rl)
    check_run_dir(config.run.dir)
    if config.rl.record:
        check_writable(config.rl.record, "rl.record")
    # torch takes seconds to import, so it is imported after the config has been checked.
    from posttrain.rl.group_credit import GroupCredit
    from posttrain.rl.logprob_check import LogprobCheck
    from posttrain.rl.policy_loss import PolicyLoss
    from posttrain.rl.record_rollouts import record_ahead, record_rollouts
    from posttrain.rl.rl_start import opened
    from posttrain.rl.rollout_source import RolloutSource
    from posttrain.rl.task_accuracy import TaskAccuracy
    from pretrain.parallel import groups
    from pretrain.run.dry_start import check_dry_start
    from pretrain.run.memory_use import lack_is_told
    from pretrain.trainer import Trainer

    env = ClusterEnvironment.read()
    run = opened(config, config.grpo, "grpo", args.resume, env)
    initial, task, dialect = run.initial, run.sampling.task, run.dialect
    source = RolloutSource(
        run.sampling,
        config.rl,
        config.train,
        config.run.dir,
        GroupCredit(dialect, config.rl, task.max_new_tokens, task.reward_weights),
        dialect.aggregation,
        run.policy,
        LogprobCheck(config.grpo.max_logprob_difference, every_rollout=config.rl.checks_every_rollout),
        initial.pin,
        staleness=config.rl.staleness,
    )
    if args.dry_run:
        if env.is_main:
            print(run.said)
        check_dry_start(config, initial.model, source, initial.lineage, args.resume, env.is_main)
        return 0

    with groups.joined(env, run.layout, config.parallel.backend) as mesh, lack_is_told(config, initial.model, mesh):
        trainer = Trainer(
            config,
            initial.model,
            source,
            PolicyLoss(dialect.policy, config.rl, config.grpo.temperature),
            mesh,
            [
                TaskAccuracy(
                    *(task, initial.chat, config.run.seed, config.task.eval_prompts, run.policy),
                    make=run.sampling.make,
                    room=config.train.seq_length + 1,
                )
            ],
            initial.lineage,
            title=config.run.name,
            resume=args.resume,
            profiled=profiled,
        )
        if rollouts:
            return (record_ahead if source.staleness else record_rollouts)(trainer, source, rollouts)
        return trainer.fit()


if __name__ == "__main__":
    entrypoint(main, prints_errors=is_main(), on_error=report_to_torchrun)
