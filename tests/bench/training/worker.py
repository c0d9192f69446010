"""One rank of one contender, as a process: for every line "step N" or "profile N" it takes a step and answers in JSON.

N is the number of documents in a row.

It waits for the next line without using a core, so contenders can take turns.
"""

import json
import os
import resource
import sys
import time
from typing import Any

import torch

from tests.bench.training import contenders
from tests.bench.training.contenders import Contender, Step
from tests.bench.training.shares import shares


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
    spent = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
    unit = 1 if sys.platform == "darwin" else 1024
    return {**spent, "loss": loss, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


if __name__ == "__main__":
    main()
