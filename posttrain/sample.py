"""`trivium sample`: rejection sampling, and distillation by sequences: a model's completions as dialogues to train on.

    torchrun --nproc-per-node 2 -m posttrain.sample configs/posttrain/demo_sample.toml

Completions of each prompt are sampled, scored by the task's rewards, filtered, and written as one file of dialogues. An
interrupted run goes on with the prompts that are left, and ends with the same bytes.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from launch import bootstrap

    bootstrap.begin("posttrain.sample")

from collections.abc import Sequence

from configs.cli import entrypoint, parse_args
from configs.folders import check_run_dir
from configs.sample import SampleConfig
from launch.environment import ClusterEnvironment, is_main, report_to_torchrun


def main(argv: Sequence[str] | None = None) -> int:
    """Samples, filters and publishes; returns the exit status: 1 if nothing is kept, 75 after a signal."""
    config, args = parse_args(
        SampleConfig,
        argv,
        prog="trivium sample",
        description="Samples completions and keeps the good ones as dialogues; the same command again goes on.",
        example="trivium sample configs/posttrain/demo_sample.toml sample.problems=64",
    )
    check_run_dir(config.run.dir)
    # torch takes seconds to import, so it is imported after the config has been checked.
    from posttrain.rejection.rejection_run import SampleRunner

    return SampleRunner(config, ClusterEnvironment.read()).run(args.dry_run)


if __name__ == "__main__":
    entrypoint(main, prints_errors=is_main(), on_error=report_to_torchrun)
