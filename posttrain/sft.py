"""`trivium sft`: supervised fine-tuning on dialogues and on demonstrations of a verifiable task.

    torchrun --nproc-per-node 2 -m posttrain.sft configs/posttrain/demo_sft.toml

The trainer and the loss are pretraining's. Rows hold dialogues, one segment each, with loss on assistant turns only;
between them there may be rows of pretraining text.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from launch import bootstrap

    bootstrap.begin("posttrain.sft")

from collections.abc import Sequence

from configs.cli import TRAINING_OPTIONS, entrypoint, parse_args, profiled_steps
from configs.folders import check_run_dir
from configs.layout import Layout
from configs.loader import ConfigError
from configs.sft import SFTConfig
from data_pipeline.core.integrity import check_at_once
from launch.environment import ClusterEnvironment, is_main, report_to_torchrun

SHOW = ("--show", "", "number of samples to print instead of training, with each token coloured by its loss weight")


def main(argv: Sequence[str] | None = None) -> int:
    """Fine-tunes on dialogues and demonstrations and returns the exit status."""
    config, args = parse_args(
        SFTConfig,
        argv,
        prog="trivium sft",
        description="Fine-tunes a model on dialogues; the same command again continues from its newest checkpoint.",
        example="trivium sft configs/posttrain/demo_sft.toml train.steps=50",
        options=(*TRAINING_OPTIONS, SHOW),
    )
    profiled = profiled_steps(args.profile, config.train.steps)
    shown = shown_samples(args.show)
    if not shown:
        check_run_dir(config.run.dir)
    # torch takes seconds to import, so it is imported after the config has been checked.
    from posttrain.chat import mask_xray
    from posttrain.chat.dialogues import read_data
    from posttrain.chat.format_interface import UntrainedEnd
    from posttrain.chat.sft_data import SFTSource, TextShare
    from posttrain.initial_chat_model import InitialChatModel
    from posttrain.pretraining_text import PretrainingText
    from posttrain.records import TooManySetAside
    from posttrain.tasks.demonstrations import read_demonstrations
    from posttrain.tasks.lengths import check_answers
    from posttrain.tasks.preflight import check_task
    from posttrain.tasks.verifiable_tasks import make_task

    env = ClusterEnvironment.read()
    template, has_adapters = config.data.chat_template, config.adapter is not None
    initial = InitialChatModel.open(
        config.init, config.run.dir, args.resume, template=template, keeps_modules=not has_adapters
    )
    initial.check_rows(config.train.seq_length)
    if initial.note and env.is_main:
        print(f"note: {initial.note}")
    chat, seed, length = initial.chat, config.run.seed, config.train.seq_length
    task = make_task(config.task) if config.task else None
    if config.task and task and not shown:
        context = max(initial.lineage.context, length)
        for line in check_task(task, chat, length):
            if env.is_main:
                print(line)
        check_answers(task, chat, seed, config.task.demonstrations, config.task.eval_prompts, context)
    parts = 0 if initial.continues else config.parallel.sequence_parts
    text: TextShare | None = None
    if config.data.text_plan:
        rows = PretrainingText.open(config.data.text_plan, "data.text_plan", initial, length)
        text = TextShare(rows, config.data.text_weight)
    try:
        solved = read_demonstrations(task, config.task, chat, seed, length, parts)
        shape = env.world_size, config.parallel, initial.model, config.train
        layout = None if shown else Layout.of(*shape, given=initial.given)
        examples = {**read_data(config.data, chat, length, parts), **solved}
    except ValueError as error:
        if shown and env.is_main and isinstance(error, UntrainedEnd | TooManySetAside):
            mask_xray.show(mask_xray.describe_fault(error, chat, shown))
        raise ConfigError(str(error)) from None
    if layout is None:
        if env.is_main:
            mask_xray.show(mask_xray.describe(examples, chat, shown))
        return 0

    from posttrain.rl.task_accuracy import TaskAccuracy
    from pretrain.heldout_loss import Evaluator, HeldoutLoss
    from pretrain.model.losses import NextToken
    from pretrain.parallel import groups
    from pretrain.report.mask_page import visible
    from pretrain.run.dry_start import check_dry_start
    from pretrain.run.memory_use import lack_is_told
    from pretrain.trainer import Trainer

    masks = mask_xray.describe(examples, chat, mask_xray.IN_REPORT)
    source = SFTSource(examples, length, chat.tokenizer.pad_id, seed, masks, text)
    if env.is_main:
        for name, found in examples.items():
            print(f"{name}: {found}")
            if (counts := masks["sources"][name])["unstable"]:
                print(visible(f"note: {name}: {mask_xray.instability(counts)}"))
        epochs = source.epochs(config.train.steps * config.train.global_batch_size)
        print(f"{source.rows_per_epoch} rows of {length} tokens; {config.train.steps} steps are {epochs}")
    if args.dry_run:
        check_dry_start(config, initial.model, source, initial.lineage, args.resume, env.is_main)
        if env.is_main and (unchecked := check_at_once(source.files())):
            print(f"note: {unchecked}")
        return 0

    heldout = source.heldout(config.eval.rows)
    evaluators: list[Evaluator] = [HeldoutLoss(heldout, chat.tokenizer.token_bytes)]
    if config.task and task:
        evaluators.append(TaskAccuracy(task, chat, seed, config.task.eval_prompts))
    with groups.joined(env, layout, config.parallel.backend) as mesh, lack_is_told(config, initial.model, mesh):
        title, lineage = config.run.name, initial.lineage
        return Trainer(
            config,
            initial.model,
            source,
            NextToken(),
            mesh,
            evaluators,
            lineage,
            title,
            resume=args.resume,
            profiled=profiled,
        ).fit()


def shown_samples(number: str) -> int:
    """Returns the number of samples that --show asks for, 0 for none. Raises ConfigError if it is not one."""
    if number and not (number.isascii() and number.isdigit() and int(number) > 0):
        raise ConfigError(f"--show {number} is no number of samples; give one above 0, such as --show 3")
    return int(number or 0)


if __name__ == "__main__":
    entrypoint(main, prints_errors=is_main(), on_error=report_to_torchrun)
