"""One rank of a proof's pool: takes jobs as lines of JSON from standard input, and answers each with a line.

A job is {"world_size", "port", "config", "precision", "inject", "reference", "start"}. The answer is {} or
{"error": traceback}.
Process groups are new in every job; Python, torch and the libraries stay loaded.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until `groups.joined`, see launch/bootstrap.py

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from configs.layout import Layout
from configs.loader import validate
from configs.train import PretrainConfig
from launch.environment import ClusterEnvironment
from pretrain.parallel import groups
from pretrain.parallel.deepspeed_import import deepspeed
from pretrain.proof.device_rank import prove_device
from pretrain.proof.recorded_step import prove_step
from pretrain.proof.shared_groups import forget_groups, share_groups


def main() -> None:
    """Serves jobs until standard input closes. The one argument is this process's rank."""
    rank, answers = int(sys.argv[1]), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to standard output
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if not torch.cuda.is_available():  # NCCL's groups leave no threads, and each has a stream of its own
        share_groups()
    for line in sys.stdin:
        answer = {}
        try:
            _run(json.loads(line), rank)
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _run(job: dict[str, Any], rank: int) -> None:
    env = ClusterEnvironment(
        launcher="torchrun",
        rank=rank,
        world_size=job["world_size"],
        local_rank=rank,
        local_world_size=job["world_size"],
        node_rank=0,
        master_address="127.0.0.1",
        master_port=job["port"],
    )
    config = validate(PretrainConfig, job["config"])
    layout = Layout.of(env.world_size, config.parallel, config.model, config.train)
    reference = None if job["reference"] is None else Path(job["reference"])
    try:
        with groups.joined(env, layout, config.parallel.backend) as mesh:
            if job["start"] is None:
                prove_step(config, mesh, job["precision"], job["inject"], reference)
            else:
                prove_device(config, mesh, job["precision"], job["inject"], reference, Path(job["start"]))
    finally:
        _forget_ranks()


def _forget_ranks() -> None:
    """Puts back what DeepSpeed remembers of a job's groups and modules: ranks compare some of it in the next job."""
    stage3 = deepspeed.runtime.zero.parameter_offload
    forget_groups()
    importlib.reload(deepspeed.utils.groups)
    stage3.Init.param_id = 0
    stage3.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    stage3.FWD_MODULE_STACK.clear()
    gc.collect()


if __name__ == "__main__":
    main()
