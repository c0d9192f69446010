"""`train.deterministic`: a GPU computes bit by bit the same each time, so that a resumed run repeats its numbers.

Without it, kernels may add numbers up in an order that changes from run to run. A CPU needs none of this: its kernels
keep to one order for a given number of threads.
"""

import os
from typing import Any

import torch

# A workspace of fixed size for each stream, without which cuBLAS chooses among algorithms as it likes.
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"


def choose(deterministic: bool) -> None:
    """Makes all of torch's operations deterministic, or lets them be as fast as they can.

    It is called before the process's first matrix product, since cuBLAS reads its setting then. An operation of a GPU
    that has no deterministic form raises RuntimeError when it is called. Attention then takes kernels whose backward
    pass has a fixed order: flash attention's deterministic one, and never cuDNN's.
    """
    if deterministic:
        os.environ.setdefault(*_WORKSPACE)
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cuda.enable_cudnn_sdp(not deterministic)
    torch_deterministic: Any = torch.utils.deterministic
    torch_deterministic.fill_uninitialized_memory = False  # else every new tensor is filled first
