"""The loss of distillation: the divergence of the student's distribution from the teacher's, at every trained token."""

import torch

from configs.distill import DistillSection
from posttrain.distillation.divergence_head import DivergenceHead, Settings
from posttrain.distillation.teacher import Teacher
from pretrain.model.batch import Batch
from pretrain.model.head_loss import HeadLoss


class DistillLoss:
    """Divergence of student from teacher per token, as a loss function; the teacher has seen each batch."""

    metrics: tuple[str, ...] = ("student_nll", "teacher_nll", "agreement")
    is_linear = True

    def __init__(self, section: DistillSection, teacher: Teacher, vocab_size: int) -> None:
        """Makes the loss of a student whose vocabulary has `vocab_size` tokens."""
        self.temperature = section.temperature
        self.settings = Settings(section.loss, section.beta, section.temperature, min(vocab_size, teacher.vocab_size))
        self.states = teacher.states

    def head_loss(self, batch: Batch, scale: float, num_sources: int) -> HeadLoss:
        """Returns the loss of a micro-batch, computed with the output head."""
        return DivergenceHead(batch, self, scale, num_sources)

    def __call__(self, measured_BSK: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns the divergence and the metrics per token, each [B, S], from the values [B, S, 4] of the head."""
        divergence_BS, student_BS, teacher_BS, agreement_BS = measured_BSK.unbind(-1)
        return divergence_BS, {"student_nll": -student_BS, "teacher_nll": -teacher_BS, "agreement": agreement_BS}
