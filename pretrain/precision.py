"""The dtype that a device computes in."""

import torch

from configs.train import Precision
from pretrain.model.products import multiplies_bf16_fast

FIRST_WITH_BF16 = (8, 0)  # capability of the first GPUs that multiply bf16: Ampere; older ones emulate it


def choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Returns the dtype of weights in the forward pass: for `auto` bf16 where the device multiplies it faster."""
    if precision == Precision.AUTO:
        if device.type == "cuda":
            fast = torch.cuda.get_device_capability(device) >= FIRST_WITH_BF16
        else:
            fast = multiplies_bf16_fast()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if precision == Precision.BF16 else torch.float32
