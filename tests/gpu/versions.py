"""Imports everything that training uses, and notes what is there: card, driver, versions, kernels."""

import argparse
import inspect
import platform
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F

from pretrain.model import documents
from tests.gpu import common


def part(args: argparse.Namespace) -> dict[str, Any]:
    import pretrain.proof.device_rank
    import pretrain.trainer  # noqa: F401

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: version(name) for name in ("megatron-core", "deepspeed", "numpy")},
        "varlen_attn": sorted(documents._VARLEN_ARGUMENTS),
        "grouped_mm": hasattr(F, "grouped_mm") and str(inspect.signature(F.grouped_mm)),
        "gpu": platform.processor() or platform.machine(),
    }
    if args.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.split("\n")[0].strip()
        except (OSError, subprocess.TimeoutExpired):
            driver = "unknown"
        found |= {
            "gpu": properties.name,
            "capability": list(torch.cuda.get_device_capability(0)),
            "memory_gib": properties.total_memory / 2**30,
            "driver": driver,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
            "bf16": torch.cuda.is_bf16_supported(),
        }
    return found


if __name__ == "__main__":
    sys.exit(common.run(part))
