"""`trivium ppo`: reinforcement learning by proximal policy optimization, with a critic (PPO).

    torchrun --nproc-per-node 2 -m posttrain.ppo configs/posttrain/demo_ppo.toml

The trainer is pretraining's. Rows are sampled from the current model; the critic is trained beside it on the same ones.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from launch import bootstrap

    bootstrap.begin("posttrain.ppo")

from collections.abc import Sequence

from configs.cli import TRAINING_OPTIONS, entrypoint, parse_args, profiled_steps
from configs.folders import check_run_dir, check_writable
from configs.rl import PPOConfig
from data_pipeline.core.integrity import check_at_once
from launch.environment import ClusterEnvironment, is_main, report_to_torchrun


def main(argv: Sequence[str] | None = None) -> int:
    """Trains on the rewards of a task and returns the exit status."""
    config, args = parse_args(
        PPOConfig,
        argv,
        prog="trivium ppo",
        description="Trains a model and a critic on a task's rewards; the same command again continues the run.",
        example="trivium ppo configs/posttrain/demo_ppo.toml train.steps=50 ppo.gae_lambda=1",
        options=TRAINING_OPTIONS,
    )
    profiled = profiled_steps(args.profile, config.train.steps)
    check_run_dir(config.run.dir)
    if config.rl.record:
        check_writable(config.rl.record, "rl.record")
    # torch takes seconds to import, so it is imported after the config has been checked.
    from posttrain.pretraining_text import PretrainingText
    from posttrain.rl.critic import Critic, critic_start
    from posttrain.rl.logprob_check import LogprobCheck
    from posttrain.rl.policy_loss import PolicyLoss
    from posttrain.rl.rl_start import opened
    from posttrain.rl.rollout_source import RolloutSource
    from posttrain.rl.task_accuracy import TaskAccuracy
    from posttrain.rl.text_rows import TextRows
    from pretrain.parallel import groups
    from pretrain.run.dry_start import check_dry_start
    from pretrain.run.memory_use import lack_is_told
    from pretrain.trainer import Trainer

    env, ppo = ClusterEnvironment.read(), config.ppo
    run = opened(config, ppo, "ppo", args.resume, env)
    initial, task = run.initial, run.sampling.task
    begins = critic_start(ppo.critic, initial)
    text = None
    if ppo.text_plan:
        rows = PretrainingText.open(ppo.text_plan, "ppo.text_plan", initial, config.train.seq_length)
        text = TextRows(rows, ppo.text_rows, ppo.text_coef)
    critic = Critic(initial.model.with_values(), begins, ppo, config.rl, task.max_new_tokens)
    source = RolloutSource(
        run.sampling,
        config.rl,
        config.train,
        config.run.dir,
        critic,
        run.dialect.aggregation,
        run.policy,
        LogprobCheck(
            ppo.max_logprob_difference, "ppo.max_logprob_difference", every_rollout=config.rl.checks_every_rollout
        ),
        initial.pin,
        text,
    )
    if args.dry_run:
        if env.is_main:
            print(run.said)
        check_dry_start(config, initial.model, source, initial.lineage, args.resume, env.is_main)
        if text and env.is_main and (unchecked := check_at_once(text.text.plan.store_files())):
            print(f"note: {unchecked}")
        return 0

    with groups.joined(env, run.layout, config.parallel.backend) as mesh, lack_is_told(config, initial.model, mesh):
        return Trainer(
            config,
            initial.model,
            source,
            PolicyLoss(run.dialect.policy, config.rl, ppo.temperature, has_ptx=text is not None),
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
            companion=critic.beside,
        ).fit()


if __name__ == "__main__":
    entrypoint(main, prints_errors=is_main(), on_error=report_to_torchrun)
