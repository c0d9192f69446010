"""Takes one step of small models in fp32 and bf16, so that a kernel that fails is named by its own line.

The check sets CUDA_LAUNCH_BLOCKING=1, with which a kernel's error is raised where it was started.
"""

import argparse
import sys
from typing import Any

import torch

from configs.loader import validate
from configs.model import ModelConfig
from configs.train import TrainSection
from pretrain.model.losses import NextToken
from pretrain.proof.devices import CASES
from tests.gpu import common

TRAIN = TrainSection(steps=1, global_batch_size=2, micro_batch_size=1, seq_length=64)


def part(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (shape, _) in CASES.items():
        model = validate(ModelConfig, shape)
        for dtype in (torch.float32, torch.bfloat16):
            for recompute in ("none", "full"):
                train = TRAIN.model_copy(update={"recompute": recompute, "dropout": 0.1})
                title = f"{name}, {str(dtype).removeprefix('torch.')}, recompute {recompute}"
                print(title, flush=True)
                with common.engine(model, train, dtype) as engine:
                    assert all(p.device.type == args.device for p in engine.module.parameters())
                    sums = engine.train_step(common.batches(model, train, 0), NextToken(), 1e-3)
                    found[title] = [float(sums.mean_loss), float(sums.grad_norm or 0.0)]
    return found


if __name__ == "__main__":
    sys.exit(common.run(part))
