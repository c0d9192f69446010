"""One rank of one contender, as a process: for every line "step N" or "profile N" it takes a step and answers in JSON.

N is the number of documents in a row.

It waits for the next line without using a core, so contenders can take turns.
"""

import json
import os
import sys
import time
from typing import Any

import torch

from tests.bench.training import contenders
from tests.bench.training.contenders import Contender, Step

# Parts of a step, and the beginnings of the names that torch gives their operations; "rest" is what remains.
PARTS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul", "aten::_grouped_mm"),
    "attention": ("aten::_scaled_dot_product", "aten::scaled_dot_product"),
    "loss": ("aten::_log_softmax", "aten::nll_loss", "aten::cross_entropy", "aten::_log_softmax_backward"),
    "optimizer": ("aten::_fused_adamw",),
    "communication": ("gloo:", "c10d::"),
}


def main() -> None:
    """Reads the contender and the number of threads from the command line."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print, too
    contender = Contender(**json.loads(sys.argv[1]))
    torch.set_num_threads(int(sys.argv[2]))
    with contenders.build(contender) as step:
        for line in sys.stdin:
            print(json.dumps(_answer(*line.split(), step)), file=answers, flush=True)


def _answer(asked: str, documents: str, step: Step) -> dict[str, Any]:
    if asked == "profile":
        return shares(step, int(documents))
    started, used = time.perf_counter(), time.process_time()
    loss = step(int(documents))
    return {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used, "loss": loss}


def shares(step: Step, documents: int) -> dict[str, float]:
    """Takes a step under torch's profiler and returns the share of its time in each part."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        started = time.perf_counter()
        step(documents)
        seconds = time.perf_counter() - started
    spent = dict.fromkeys(PARTS, 0.0)
    for event in profile.key_averages():
        for part, names in PARTS.items():
            if event.key.startswith(names):
                spent[part] += event.self_cpu_time_total / 1e6 / seconds
    return {**{part: round(share, 4) for part, share in spent.items()}, "rest": round(1 - sum(spent.values()), 4)}


if __name__ == "__main__":
    main()
