"""`trivium data run CONFIG`: turns raw files into a mixture plan, stage by stage, and skips stages that are done.

After an interruption the same command resumes the run. `--stage` runs single stages, perhaps with another executor than
the rest; `--until` ends the run early; `--dry-run` prints which stages would run. An executor distributes the tasks:
under `mpirun` every rank runs `main`, and one of them leads. The stages are in `data_pipeline.run`, which is imported
only once the config is known to be right.
"""

from collections.abc import Sequence

from configs.cli import entrypoint, parse_args
from configs.data import DataConfig
from data_pipeline.executors.rank_output import output_of_rank_0_only


def main(argv: Sequence[str] | None = None) -> int:
    with output_of_rank_0_only():
        config, args = parse_args(
            DataConfig,
            argv,
            prog="trivium data run",
            description="Raw text to a mixture plan: extraction, filters, deduplication, split, tokens, plan.",
            example="trivium data run configs/data/demo.toml run.workers=4\n"
            "  mpirun -n 4 trivium data run configs/data/demo.toml",
            options=[
                ("--stage", "", "only this stage, or these, between commas; those that it needs must be done"),
                ("--until", "", "this stage and all before it"),
            ],
            keys=[("--executor", "run.executor", "who does the tasks: local, slurm, ray or mpi")],
        )
        # Imported here, so that a mistake in the config is told at once; before workers are forked, which need it too.
        from data_pipeline.executors.choose import choose
        from data_pipeline.run import lead

        executor = choose(config.run)
    with executor:
        return lead(config, args, executor) if executor.leads else executor.serve()


if __name__ == "__main__":
    entrypoint(main)
