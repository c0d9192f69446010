"""`trivium dpo`: learns from preferences, by DPO or one of its kin.

    torchrun --nproc-per-node 2 -m posttrain.dpo configs/posttrain/demo_dpo.toml

The trainer is pretraining's. A row holds pairs of answers to the same prompt, of which one was chosen; for KTO single
answers, each desirable or not.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from launch import bootstrap

    bootstrap.begin("posttrain.dpo")

from collections.abc import Sequence
from pathlib import Path

from configs.cli import TRAINING_OPTIONS, entrypoint, parse_args, profiled_steps
from configs.folders import check_run_dir
from configs.layout import Layout
from configs.loader import ConfigError
from configs.preference import PreferenceConfig
from launch.environment import ClusterEnvironment, is_main, report_to_torchrun


def main(argv: Sequence[str] | None = None) -> int:
    """Trains on preferences and returns the exit status."""
    config, args = parse_args(
        PreferenceConfig,
        argv,
        prog="trivium dpo",
        description="Trains a model on preferences; the same command again continues from its newest checkpoint.",
        example="trivium dpo configs/posttrain/demo_dpo.toml train.steps=50 preference.loss=ipo",
        options=TRAINING_OPTIONS,
    )
    profiled = profiled_steps(args.profile, config.train.steps)
    if not args.dry_run:
        check_run_dir(config.run.dir)
    # torch takes seconds to import, so it is imported after the config has been checked.
    from posttrain.initial_model import InitialChatModel
    from posttrain.preference.examples import read_rows
    from posttrain.preference.preference_source import HeldoutPreference, PreferenceSource
    from pretrain.parallel import groups
    from pretrain.trainer import Trainer

    env = ClusterEnvironment.read()
    initial = InitialChatModel.open(config.init, config.run.dir, args.resume)
    initial.check_rows(config.train.seq_length)
    if initial.note and env.is_main:
        print(f"note: {initial.note}")
    parts = 0 if initial.continues else config.parallel.sequence_parts
    layout = Layout.of(env.world_size, config.parallel, initial.model, config.train, given=initial.given)
    try:
        rows = read_rows(config, initial.chat, parts)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    source = PreferenceSource(rows, config.preference, config.run.seed, config.run.dir, initial.pin.sha256)
    if initial.own is not None:
        source.check_goes_on(initial.own)
    if env.is_main:
        length, epochs = config.train.seq_length, config.train.steps * config.train.global_batch_size
        print(f"preferences: {rows.said}")
        print(
            f"{source.rows_per_epoch} rows of {length} tokens; {config.train.steps} steps are "
            f"{epochs / source.rows_per_epoch:.2f} epochs"
        )
    if args.dry_run:
        return 0

    with groups.joined(env, layout, config.parallel.backend) as mesh:
        return Trainer(
            config,
            initial.model,
            source,
            source.loss,
            mesh,
            [HeldoutPreference(source, config.eval.rows)],
            initial.lineage,
            title=Path(config.run.dir).name,
            resume=args.resume,
            profiled=profiled,
        ).fit()


if __name__ == "__main__":
    entrypoint(main, prints_errors=is_main(), on_error=report_to_torchrun)
