"""`trivium dpo`: learns from preferences, by DPO or one of its kin.

    torchrun --nproc-per-node 2 -m posttrain.dpo configs/posttrain/demo_dpo.toml

The trainer is pretraining's. A row holds pairs of answers to the same prompt, of which one was chosen; for KTO single
answers, each desirable or not. With [online] the model in training writes the answers, and a task's rewards choose.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from launch import bootstrap

    bootstrap.begin("posttrain.dpo")

from collections.abc import Sequence

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
    check_run_dir(config.run.dir)
    # torch takes seconds to import, so it is imported after the config has been checked.
    from posttrain.initial_chat_model import InitialChatModel
    from posttrain.preference.online_run import opened_online
    from posttrain.preference.preference_examples import read_rows
    from posttrain.preference.preference_source import HeldoutPreference, PreferenceLoss, PreferenceSource
    from pretrain.data.batch_source import BatchSource
    from pretrain.heldout_loss import Evaluator
    from pretrain.parallel import groups
    from pretrain.run.dry_start import check_dry_start
    from pretrain.run.memory_use import lack_is_told
    from pretrain.trainer import Trainer

    env = ClusterEnvironment.read()
    initial = InitialChatModel.open(config.init, config.run.dir, args.resume)
    initial.check_rows(config.train.seq_length)
    if initial.note and env.is_main:
        print(f"note: {initial.note}")
    parts = 0 if initial.continues else config.parallel.sequence_parts
    layout = Layout.of(env.world_size, config.parallel, initial.model, config.train, given=initial.given)
    source: BatchSource
    loss: PreferenceLoss
    evaluators: list[Evaluator]
    if config.online:
        run = opened_online(config, initial, layout, env.is_main)
        source, loss, evaluators = run.source, run.source.loss, [run.accuracy]
    else:
        try:
            rows = read_rows(config, initial.chat, parts)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        pairs = PreferenceSource(rows, config.preference, config.run.seed, config.run.dir, initial.pin.sha256)
        source, loss, evaluators = pairs, pairs.loss, [HeldoutPreference(pairs, config.eval.rows)]
        if initial.own is not None:
            pairs.check_goes_on(initial.own)
        if env.is_main:
            length, epochs = config.train.seq_length, config.train.steps * config.train.global_batch_size
            print(f"preferences: {rows.said}")
            print(
                f"{pairs.rows_per_epoch} rows of {length} tokens; {config.train.steps} steps are "
                f"{epochs / pairs.rows_per_epoch:.2f} epochs"
            )
    if args.dry_run:
        check_dry_start(config, initial.model, source, initial.lineage, args.resume, env.is_main)
        return 0

    with groups.joined(env, layout, config.parallel.backend) as mesh, lack_is_told(config, initial.model, mesh):
        return Trainer(
            config,
            initial.model,
            source,
            loss,
            mesh,
            evaluators,
            initial.lineage,
            title=config.run.name,
            resume=args.resume,
            profiled=profiled,
        ).fit()


if __name__ == "__main__":
    entrypoint(main, prints_errors=is_main(), on_error=report_to_torchrun)
