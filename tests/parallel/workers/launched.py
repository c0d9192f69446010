"""Main module of ranks that launch.ranks starts: one training run of tests/parallel/workers/training.py.

python -m launch.ranks --nproc-per-node 2 tests.parallel.workers.launched '{"run_dir": ..., "model": ..., "steps": 9}'
"""

import json
import sys
from typing import Any

import torch

from pretrain.parallel import groups
from tests.parallel.workers.training import make_trainer


def main() -> int:
    torch.set_num_threads(1)
    options: dict[str, Any] = json.loads(sys.argv[1])
    trainer = make_trainer(parallel={}, at={}, **options)
    try:
        return trainer.fit()
    finally:
        groups.stop()


if __name__ == "__main__":
    sys.exit(main())
