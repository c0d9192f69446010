"""`trivium rm`: trains a reward model, from pairs of answers, judged reasoning steps, or texts with a class.

    torchrun --nproc-per-node 2 -m posttrain.rm configs/posttrain/demo_rm.toml

The trainer is pretraining's. A scalar head takes the place of the language model's own, and begins with random values.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from launch import bootstrap

    bootstrap.begin("posttrain.rm")

from collections.abc import Sequence
from typing import TYPE_CHECKING

from configs.cli import TRAINING_OPTIONS, entrypoint, parse_args, profiled_steps
from configs.folders import check_run_dir
from configs.layout import Layout
from configs.loader import ConfigError
from configs.model import ModelConfig
from configs.reward_model import RewardModelConfig, RewardSection
from launch.environment import ClusterEnvironment, is_main, report_to_torchrun

if TYPE_CHECKING:
    from posttrain.initial_chat_model import InitialChatModel


def main(argv: Sequence[str] | None = None) -> int:
    """Trains a reward model and returns the exit status."""
    config, args = parse_args(
        RewardModelConfig,
        argv,
        prog="trivium rm",
        description="Trains a reward model; the same command again continues from its newest checkpoint.",
        example="trivium rm configs/posttrain/demo_rm.toml train.steps=50 reward_model.centring=0.01",
        options=TRAINING_OPTIONS,
    )
    profiled = profiled_steps(args.profile, config.train.steps)
    check_run_dir(config.run.dir)
    # torch takes seconds to import, so it is imported after the config has been checked.
    from posttrain.initial_chat_model import InitialChatModel
    from posttrain.preference.group_packing import PackedSource, pack
    from posttrain.reward_model.calibration import HeldoutJudgement
    from posttrain.reward_model.judged_examples import read_examples
    from posttrain.reward_model.reward_losses import loss_of
    from pretrain.parallel import groups
    from pretrain.run.dry_start import check_dry_start
    from pretrain.run.memory_use import lack_is_told
    from pretrain.trainer import Trainer

    env = ClusterEnvironment.read()
    initial = InitialChatModel.open(config.init, config.run.dir, args.resume, takes_values=True)
    initial.check_rows(config.train.seq_length)
    if initial.note and env.is_main:
        print(f"note: {initial.note}")
    model = model_with_values(initial, config.reward_model)
    chat, length = initial.chat, config.train.seq_length
    layout = Layout.of(env.world_size, config.parallel, model, config.train, given=initial.given)
    parts = 0 if initial.continues else config.parallel.sequence_parts
    try:
        examples = read_examples(config.data, config.reward_model, chat, length, parts)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    rows = pack(examples.train, length, chat.tokenizer.pad_id)
    heldout = pack(examples.heldout, length, chat.tokenizer.pad_id)[: config.eval.rows]
    source = PackedSource(examples.kind, rows, config.run.seed)
    if env.is_main:
        epochs = config.train.steps * config.train.global_batch_size / len(rows)
        print(f"{examples.kind}: {examples}")
        print(f"{len(rows)} rows of {length} tokens; {config.train.steps} steps are {epochs:.2f} epochs")
    if args.dry_run:
        check_dry_start(config, model, source, initial.lineage, args.resume, env.is_main)
        return 0

    loss = loss_of(config.reward_model)
    with groups.joined(env, layout, config.parallel.backend) as mesh, lack_is_told(config, model, mesh):
        return Trainer(
            config,
            model,
            source,
            loss,
            mesh,
            [HeldoutJudgement(examples.kind, heldout, loss)],
            initial.lineage,
            title=config.run.name,
            resume=args.resume,
            profiled=profiled,
        ).fit()


def model_with_values(initial: "InitialChatModel", section: RewardSection) -> ModelConfig:
    """Returns the initial model with a scalar head.

    Raises ConfigError if it has one with other outputs, or layers that see a context both ways: a text that is judged
    has none.
    """
    model = initial.model
    if model.has_contexts:
        raise ConfigError(
            f"{initial.said}: the attention pattern 'prefix' sees a context both ways, and a reward model judges whole "
            "texts; start from a model with another pattern"
        )
    if model.has_logits:
        return model.with_values(section.outputs)
    if model.head.outputs != section.outputs:
        wanted = f"{section.outputs} ({', '.join(section.classes)})" if section.classes else "1"
        raise ConfigError(
            f"{initial.own or initial.pin.checkpoint} is a reward model with {model.head.outputs} values of each token,"
            f" and reward_model.kind = {section.kind!r} needs {wanted}; "
            f"{'choose another run.dir' if initial.own else 'start from a language model'}, or set reward_model.kind "
            "and reward_model.labels as it was trained"
        )
    return model


if __name__ == "__main__":
    entrypoint(main, prints_errors=is_main(), on_error=report_to_torchrun)
