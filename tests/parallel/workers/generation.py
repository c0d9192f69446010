"""Functions run in the ranks: generation with a model that is split over them."""

import io
import os
import sys
from typing import Any

from configs.train import ParallelConfig
from export.text_model import loaded
from tests.parallel.workers.posttraining import command


def chat(argv: list[str], typed: str) -> dict[str, Any]:
    """Runs `trivium chat`; the input of the second rank says something else."""
    sys.stdin = io.StringIO(typed if os.environ["RANK"] == "0" else "another rank's input\n")
    return command("export.chat", argv)


def shares(source: str, keys: dict[str, int]) -> list[int]:
    """Returns the numbers of parameters and of cached numbers of this rank."""
    with loaded(source, "latest", ParallelConfig(**keys), "fp32") as model:
        return [sum(p.numel() for p in model.decoder.parameters()), model.decoder.new_cache(2, 16).store.numel()]
