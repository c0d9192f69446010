"""The start of a distillation run, before the ranks join: student, teacher, data and prompts, and whether they fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.distill import DistillConfig
from configs.layout import Layout
from configs.loader import ConfigError
from configs.method_layout import check_method
from configs.tasks import DemonstrationConfig
from launch.environment import ClusterEnvironment
from posttrain.chat import mask_xray
from posttrain.chat.dialogues import Example, read_data
from posttrain.chat.sft_data import SFTSource
from posttrain.distillation.distill_source import StudentSampling, plan_in
from posttrain.distillation.teacher import OpenedTeacher, check_length, check_template, open_teacher
from posttrain.initial_chat_model import InitialChatModel
from posttrain.records import Records
from posttrain.rejection.prompts import open_task
from posttrain.tasks.demonstrations import read_demonstrations
from posttrain.tasks.lengths import check_answers, check_rows
from posttrain.tasks.preflight import check_task
from posttrain.tasks.task import Task
from pretrain.data.batch_source import BatchSource, PlanSource
from pretrain.run.plan_choice import choose_plan


@dataclass(frozen=True)
class OpenedDistillation:
    """The parts of a run that are known before ranks join; `said` are lines about them.

    `data` is None if all steps learn from the student's own samples, `task` if there is neither task nor prompts.
    `heldout` has held-out rows by source.
    """

    student: InitialChatModel
    teacher: OpenedTeacher
    layout: Layout
    data: BatchSource | None
    heldout: Mapping[str, Sequence[Any]]
    task: Task | None
    sampling: StudentSampling | None
    said: list[str]


def opened(config: DistillConfig, resume: str, env: ClusterEnvironment) -> OpenedDistillation:
    """Opens student, teacher, data and prompts of a run. Raises ConfigError if they do not fit together."""
    student = InitialChatModel.open(config.init, config.run.dir, resume, template=config.data.chat_template)
    student.check_rows(config.train.seq_length)
    layout = Layout.of(env.world_size, config.parallel, student.model, config.train, given=student.given)
    teacher = open_teacher(config, student, env.world_size)
    said = [f"note: {note}" for note in (student.note, teacher.initial.note) if note]
    task, longest = open_task(config.task) if config.task else None, 0
    if task is not None:
        lines, longest = _check_task(config, student, teacher, task)
        said += lines
    data: BatchSource | None = None
    heldout: Mapping[str, Sequence[Any]] = {}
    if config.data.plan is not None:
        data, heldout, lines = _plan(config, student, teacher, resume)
        said += lines
    elif config.data.dialogues or _demonstrated(config):
        data, heldout, lines = _dialogues(config, student, teacher, task)
        said += lines
    if config.data.plan is None or task is not None:
        check_template(config, teacher, student.chat.template)
    sampling = None
    if config.distill.on_policy and task is not None:
        check_method(config, layout)
        settings = config.distill
        sampling = StudentSampling(
            task, student.chat, settings.on_policy, settings.sampling_temperature, config.run.seed, longest
        )
    said.append(
        f"{config.train.steps} steps, {config.distill.loss} from the teacher {teacher.pin.checkpoint}, "
        f"{config.distill.on_policy:.0%} of them on the student's own samples, layout {layout}, from "
        f"{student.pin.checkpoint} into {config.run.dir}"
    )
    return OpenedDistillation(student, teacher, layout, data, heldout, task, sampling, said)


def _demonstrated(config: DistillConfig) -> DemonstrationConfig | None:
    """Returns the task that has demonstrations to learn, None if there is none."""
    task = config.task
    return task if task is not None and task.is_scored and task.demonstrations else None


def _plan(
    config: DistillConfig, student: InitialChatModel, teacher: OpenedTeacher, resume: str
) -> tuple[BatchSource, Mapping[str, Sequence[Any]], list[str]]:
    """Opens the rows of data.plan; a run that goes on keeps its own plan where a data run has replaced it."""
    location, length = str(config.data.plan), config.train.seq_length
    choice = choose_plan(location, Path(config.run.dir), resume, config.checkpoint.mirror, plan_in)
    plan = choice.plan
    student.check_plan(location, plan)
    if plan.seq_length != length:
        raise ConfigError(
            f"train.seq_length = {length}, but the plan {plan.path} was built for {plan.seq_length}; set "
            f"train.seq_length={plan.seq_length}"
        )
    if plan.first_sample:
        raise ConfigError(
            f"data.plan = {location!r} continues another plan after its first {plan.first_sample:,} samples; name a "
            "plan that begins at the first sample"
        )
    shorter = "name a plan made with mixture.seq_length={context} or less"
    check_length(config, teacher, length, f"rows of data.plan = {location!r}", shorter)
    rows = config.eval.rows
    heldout = {s: [plan.heldout_row(s, i) for i in range(min(rows, plan.heldout_rows(s)))] for s in plan.sources}
    return PlanSource(plan, choice.common_samples), heldout, [f"data.plan: {choice.reason}"] if choice.reason else []


def _dialogues(
    config: DistillConfig, student: InitialChatModel, teacher: OpenedTeacher, task: Task | None
) -> tuple[BatchSource, Mapping[str, Sequence[Any]], list[str]]:
    chat, seed, length = student.chat, config.run.seed, config.train.seq_length
    parts = 0 if student.continues else config.parallel.sequence_parts
    try:
        solved = read_demonstrations(task, _demonstrated(config), chat, seed, length, parts)
        examples: dict[str, Records[Example]] = {**read_data(config.data, chat, length, parts), **solved}
        masks = mask_xray.describe(examples, chat, mask_xray.IN_REPORT)
        source = SFTSource(examples, length, chat.tokenizer.pad_id, seed, masks)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    lengths = {name: [len(one.tokens) for one in [*found.train, *found.heldout]] for name, found in examples.items()}
    context = teacher.initial.lineage.context
    longer = {name: sum(length > context for length in found) for name, found in lengths.items()}
    given = len(lengths.get("dialogues", []))
    few = sum(longer.values()) == longer.get("dialogues", 0) <= min(config.data.max_bad_share * given, given - 1)
    remedy = "set train.seq_length={context} or less" if few else "leave the longer ones out"
    check_length(config, teacher, max(map(max, lengths.values())), "dialogues", remedy)
    steps, batch = config.train.steps, config.train.global_batch_size
    lines = [f"{name}: {found}" for name, found in examples.items()]
    lines.append(f"{source.rows_per_epoch} rows of {length} tokens; {steps} steps are {source.epochs(steps * batch)}")
    return source, source.heldout(config.eval.rows), lines


def _check_task(
    config: DistillConfig, student: InitialChatModel, teacher: OpenedTeacher, task: Task
) -> tuple[list[str], int]:
    """Checks the prompts that the student answers; returns lines about them, and the longest with its completion."""
    chat, length = student.chat, config.train.seq_length
    context = student.lineage.context or None
    samples = config.distill.on_policy > 0
    lines = check_task(task, chat, length if samples else max(length, context or length), context if samples else None)
    demonstrated = _demonstrated(config)
    drawn = demonstrated.demonstrations if demonstrated else 0
    if samples:
        drawn = max(drawn, config.train.steps * config.train.global_batch_size)
    heldout = config.task.eval_prompts if config.task and config.task.is_scored else 0
    longest = check_answers(task, chat, config.run.seed, drawn, heldout, context)
    most = longest + task.max_new_tokens - 1  # the last token is a label
    if samples:
        check_rows(task, longest, length, config.parallel)
        room = teacher.initial.lineage.context - longest + 1
        fewer = f"set task.max_new_tokens={room} or less" if room > 0 else "choose an easier task"
        check_length(config, teacher, most, f"prompts of {task.name!r} with completions", fewer)
    return lines, most
