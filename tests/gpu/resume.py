"""Restores the checkpoint that `speed` saved, in a new process, and repeats its next step, bit by bit."""

import argparse
import json
import shutil
import sys
import time
from typing import Any

import torch

from pretrain.checkpoint import state, storage
from tests.gpu import common, speed


def part(args: argparse.Namespace) -> dict[str, Any]:
    before, folder = args.result.parent / "speed.json", args.result.parent / "saved"
    if not before.is_file() or "next" not in (expected := json.loads(before.read_text())):
        raise RuntimeError("the part `speed` left no checkpoint to resume from")
    torch.use_deterministic_algorithms(True, warn_only=True)
    model, train, dtype = speed.shape(args)
    with common.engine(model, train, dtype) as engine:
        started = time.perf_counter()
        state.restore(engine, storage.directory(folder, speed.SAVED_STEP))
        seconds = time.perf_counter() - started
        found = speed.next_step(engine, model, train)
    shutil.rmtree(folder)
    differ = [key for key in found if found[key] != expected["next"][key]]
    if differ:
        said = "; ".join(f"{key} {expected['next'][key]} before and {found[key]} after" for key in differ)
        raise RuntimeError(f"the step after the checkpoint is another one after resuming: {said}")
    return {"restore_s": seconds, "resume": "the next step is the same, bit by bit"}


if __name__ == "__main__":
    sys.exit(common.run(part))
