"""Imports DeepSpeed without its log lines and, on machines without CUDA, sets its device to the CPU.

Left alone, DeepSpeed would guess its accelerator and compile a shared-memory all-reduce at first use; a machine may
lack the compiler, and gloo is enough on a CPU. With CUDA nothing is changed. megatron-core is in pretrain/megatron.py.
"""

import logging
import os
import warnings

import torch

from pretrain import megatron

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    import deepspeed.comm.comm

__all__ = ["deepspeed", "redirect_to_cpu"]

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module=r"deepspeed\.")


def redirect_to_cpu() -> None:
    """Makes megatron-core and DeepSpeed run on the CPU where there is no CUDA device."""
    megatron.redirect_to_cpu()
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
