"""Divergences of a student's next-token distribution q from a teacher's p, as pure functions.

forward_kl  KL(p || q), the distillation of Hinton et al. 2015 (arXiv 1503.02531) and Kim and Rush 2016
reverse_kl  KL(q || p), as in MiniLLM (Gu et al. 2024, arXiv 2306.08543) and GKD
jsd         beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, the generalized Jensen-Shannon
            divergence of GKD (Agarwal et al. 2024, arXiv 2306.13649, equation 3); TRL's GKD has the same

Both distributions are softmaxes of logits divided by a temperature. The value is not multiplied by its square, as
Hinton et al. do, so that the temperature does not change what a learning rate means less than it must.

N tokens, V vocabulary.
"""

import math
from typing import Literal

import torch

Kind = Literal["forward_kl", "reverse_kl", "jsd"]


def divergence(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor, kind: Kind, beta: float = 0.5, temperature: float = 1.0
) -> torch.Tensor:
    """Returns the divergence [N] of each token from whole logits, for autograd; training computes it chunk by chunk."""
    logq_NV, logp_NV = ((logits / temperature).log_softmax(-1) for logits in (student_NV, teacher_NV))
    return terms(logq_NV, logp_NV, kind, beta)[0].sum(-1)


def terms(
    logq_NV: torch.Tensor, logp_NV: torch.Tensor, kind: Kind, beta: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (summands, slopes), each [N, V], from log-probabilities of student and teacher.

    The divergence is the sum of the summands. Its derivative by the student's logit v, divided by the temperature, is
    slopes_v - q_v * (sum of the slopes): q times the derivative by q, but for a constant, which cancels.
    """
    if kind == "forward_kl":
        p_NV = logp_NV.exp()
        return p_NV * (logp_NV - logq_NV), -p_NV
    q_NV = logq_NV.exp()
    if kind == "reverse_kl":
        summands_NV = q_NV * (logq_NV - logp_NV)
        return summands_NV, summands_NV
    logm_NV = torch.logaddexp(logp_NV + math.log(beta), logq_NV + math.log1p(-beta))
    of_student_NV = (1 - beta) * q_NV * (logq_NV - logm_NV)
    return beta * logp_NV.exp() * (logp_NV - logm_NV) + of_student_NV, of_student_NV
