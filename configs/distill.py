"""Config of distillation by logits: the sections of all training runs, teacher, data, and the divergence."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from configs.initial import InitConfig
from configs.section import Section
from configs.sft import DialogueConfig
from configs.tasks import DemonstrationConfig
from configs.train import TrainerConfig


class TeacherConfig(InitConfig):
    """The teacher, which is not trained: a run, one of its checkpoints, or a Hugging Face folder."""

    section: ClassVar[str] = "teacher"
    names: ClassVar[str] = "the teacher"


class DistillData(DialogueConfig):
    """Texts whose next tokens the teacher and the student predict: dialogues, or the rows of a data plan."""

    plan: str | None = None
    """The folder of a data plan, whose rows are learnt in place of dialogues."""


class DistillSection(Section):
    """The divergence from the teacher, and the share of steps that learn from the student's own samples."""

    loss: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """The divergence of each token: KL(teacher || student), KL(student || teacher), or the Jensen-Shannon divergence;
    posttrain/distillation/divergences.py writes out each formula."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """jsd: the weight of the teacher in the mixture of both; small values are close to forward_kl."""
    temperature: float = Field(default=1.0, gt=0)
    """The temperature of both distributions in the loss; the loss is not multiplied by its square."""
    on_policy: float = Field(default=0.0, ge=0, le=1)
    """The share of steps, evenly spread, on completions that the student samples (GKD's lambda); the others learn from
    data."""
    sampling_temperature: float = Field(default=1.0, gt=0)
    """The temperature at which the student samples."""
    sampler: Literal["whole", "split"] = "whole"
    """How weights come to sampling: each rank gathers a whole copy, or ranks of tp and ep sample with their slices."""


class DistillConfig(TrainerConfig):
    """The root of a config of distillation by logits."""

    init: InitConfig
    """The student to start from."""
    teacher: TeacherConfig
    """The teacher, which has the same tokenizer as the student."""
    data: DistillData = DistillData()
    """Texts whose next tokens the teacher and the student predict: dialogues, or the rows of a data plan."""
    task: DemonstrationConfig | None = None
    """A task whose demonstrations are learnt too, whose problems the student answers in steps on its own samples, and
    on whose held-out problems it is scored; files without answers and rewards are prompts alone."""
    distill: DistillSection = DistillSection()
    """The divergence from the teacher, and the share of steps that learn from the student's own samples."""

    @model_validator(mode="after")
    def _something_to_learn(self) -> "DistillConfig":
        data, share = self.data, self.distill.on_policy
        solved = self.task is not None and self.task.is_scored and self.task.demonstrations > 0
        if data.plan and (data.dialogues or solved):
            raise ValueError(
                "data.plan has rows of its own, beside which there are no dialogues; leave out data.plan, or leave out "
                "data.dialogues and set task.demonstrations=0"
            )
        if share < 1 and not (data.dialogues or data.plan or solved):
            shown = "" if self.task and not self.task.is_scored else ", or task.demonstrations above 0"
            raise ValueError(
                f"distill.on_policy = {share:g} leaves steps that need data: set data.dialogues or data.plan{shown}, "
                f"or distill.on_policy=1{'' if self.task else ' and [task]'}"
            )
        if share > 0 and self.task is None:
            raise ValueError(
                f"distill.on_policy = {share:g} needs prompts for the student: set [task], such as one of kind 'file' "
                'with task.answer_key="", or distill.on_policy=0'
            )
        return self
