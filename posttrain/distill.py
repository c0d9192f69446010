"""`trivium distill`: a student learns the next-token distributions of a teacher with the same tokenizer.

    torchrun --nproc-per-node 2 -m posttrain.distill configs/posttrain/demo_distill.toml

The trainer is pretraining's, and data are those of SFT or a data plan. With `distill.on_policy` a share of the steps
learns from completions that the student samples (GKD). Teachers with other tokenizers are left to `trivium sample`.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from launch import bootstrap

    bootstrap.begin("posttrain.distill")

from collections.abc import Sequence

from configs.cli import TRAINING_OPTIONS, entrypoint, parse_args, profiled_steps
from configs.distill import DistillConfig
from configs.folders import check_run_dir
from launch.environment import ClusterEnvironment, is_main, report_to_torchrun


def main(argv: Sequence[str] | None = None) -> int:
    """Trains the student and returns the exit status."""
    config, args = parse_args(
        DistillConfig,
        argv,
        prog="trivium distill",
        description="Trains a student on a teacher's distributions; the same command again continues from its newest "
        "checkpoint.",
        example="trivium distill configs/posttrain/demo_distill.toml train.steps=50 distill.loss=jsd",
        options=TRAINING_OPTIONS,
    )
    profiled = profiled_steps(args.profile, config.train.steps)
    check_run_dir(config.run.dir)
    # torch takes seconds to import, so it is imported after the config has been checked.
    from posttrain.distillation.distill_loss import DistillLoss
    from posttrain.distillation.distill_source import DistillSource, HeldoutDivergence
    from posttrain.distillation.distill_start import opened
    from posttrain.distillation.teacher import Teacher
    from posttrain.rl.policy_copy import PolicyCopy
    from posttrain.rl.task_accuracy import TaskAccuracy
    from pretrain.heldout_loss import Evaluator
    from pretrain.parallel import groups
    from pretrain.run.dry_start import check_dry_start
    from pretrain.run.memory_use import lack_is_told
    from pretrain.trainer import Trainer

    env = ClusterEnvironment.read()
    run = opened(config, args.resume, env)
    if env.is_main:
        print("\n".join(run.said))
    student, policy = run.student, PolicyCopy(config.distill.sampler)
    source = DistillSource(run.data, run.sampling, run.teacher.pin, config.train, policy)
    if args.dry_run:
        check_dry_start(config, student.model, source, student.lineage, args.resume, env.is_main)
        return 0

    with groups.joined(env, run.layout, config.parallel.backend) as mesh, lack_is_told(config, student.model, mesh):
        source.teacher = teacher = Teacher.read(run.teacher, config.train, mesh)
        loss = DistillLoss(config.distill, teacher, student.model.vocab_size)
        evaluators: list[Evaluator] = [HeldoutDivergence(run.heldout, loss, teacher)]
        if config.task is not None and run.task is not None and config.task.is_scored:
            evaluators.append(TaskAccuracy(run.task, student.chat, config.run.seed, config.task.eval_prompts, policy))
        return Trainer(
            config,
            student.model,
            source,
            loss,
            mesh,
            evaluators,
            student.lineage,
            title=config.run.name,
            resume=args.resume,
            profiled=profiled,
        ).fit()


if __name__ == "__main__":
    entrypoint(main, prints_errors=is_main(), on_error=report_to_torchrun)
