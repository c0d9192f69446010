"""Imports DeepSpeed without its log lines and, on machines without CUDA, sets its device to the CPU.

Left alone, DeepSpeed would guess its accelerator and compile a shared-memory all-reduce at first use; a machine may
lack the compiler, and gloo is enough on a CPU. With CUDA nothing is changed. megatron-core is in pretrain/megatron.py.
"""

import logging
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import torch

from pretrain import megatron

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# DeepSpeed would import MLflow if it could, for an autotuner that Trivium does not use: seconds on every rank.
with warnings.catch_warnings(), megatron.not_installed("mlflow"):
    warnings.simplefilter("ignore")
    import deepspeed
    import deepspeed.comm.comm

    # With its first ZeRO optimizer of any kind DeepSpeed imports Muon, whose functions are under torch.compile. That
    # would load the whole compiler, which takes each rank seconds, for functions that Trivium does not use.
    with mock.patch.object(torch, "compile", lambda function: function):
        import deepspeed.runtime.zero.muon.muon_optimizer

__all__ = ["deepspeed", "device_as_local_rank", "redirect_to_cpu"]

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module=r"deepspeed\.")


def device_as_local_rank(device: torch.device) -> AbstractContextManager[object]:
    """Returns a context in which DeepSpeed uses this `device`: it takes the local rank for the number of its GPU.

    The two differ where a launcher shows each rank only its own GPU, which then has number 0.
    """
    if device.type != "cuda":
        return nullcontext()
    names = {"LOCAL_RANK", *({"OMPI_COMM_WORLD_LOCAL_RANK"} & os.environ.keys())}  # DeepSpeed wants both to be equal
    return mock.patch.dict(os.environ, dict.fromkeys(names, str(device.index)))


def redirect_to_cpu() -> None:
    """Makes megatron-core and DeepSpeed run on the CPU where there is no CUDA device."""
    megatron.redirect_to_cpu()
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
