"""One rank of the test pool: takes calls from harness.py, runs each in a fresh world, and answers in JSON.

Between calls all global state is reset: process groups (torch's, megatron-core's, DeepSpeed's), the random state, the
default dtype, and the launcher's variables. Processes are started and ended by harness.py.
"""

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import signal
import sys
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from launch.environment import ClusterEnvironment
from pretrain.proof.shared_groups import forget_groups, share_groups


def serve(descriptor: int) -> None:
    """Serves calls until the pool closes its end of the connection."""
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    torch.set_num_threads(1)
    share_groups()
    connection = Connection(descriptor)
    while True:
        try:
            message = json.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            reply = {"result": run(message)}
            data = json.dumps(reply, default=str).encode()
        except BaseException:
            data = json.dumps({"error": traceback.format_exc()}).encode()
        # Leaving the groups closes this rank's sockets, so that ranks that wait for it fail at once instead of
        # hanging. An error is sent before that, since the pool takes the first answer as the cause.
        if data.startswith(b'{"error"'):
            connection.send_bytes(data)
            leave_world()
        else:
            leave_world()
            connection.send_bytes(data)


def run(message: dict[str, Any]) -> Any:
    """Enters the world of `message` and calls its function."""
    env = ClusterEnvironment(
        launcher="torchrun",
        rank=message["rank"],
        world_size=message["world_size"],
        local_rank=message["rank"],
        local_world_size=message["world_size"],
        node_rank=0,
        master_address="127.0.0.1",
        master_port=message["port"],
    )
    os.environ.update(env.as_variables())
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    gc.freeze()  # spares the garbage collector the objects made by imports
    if message["process_group"]:
        dist.init_process_group(
            "gloo",
            init_method=env.init_method,
            rank=env.rank,
            world_size=env.world_size,
            timeout=timedelta(minutes=10),  # longer than the pool's, which shows stacks when it ends
        )
    module, _, name = message["function"].partition(":")
    return getattr(importlib.import_module(module), name)(**message["kwargs"])


def leave_world() -> None:
    """Destroys every process group and resets the libraries' globals that refer to one."""
    _free_engines()
    forget_groups()
    if parallel_state := sys.modules.get("megatron.core.parallel_state"):
        parallel_state.destroy_model_parallel()
    if comm := sys.modules.get("deepspeed.comm.comm"):
        comm.cdb = None
    if groups := sys.modules.get("deepspeed.utils.groups"):
        importlib.reload(groups)  # resets two dozen groups in module globals
    if stage3 := sys.modules.get("deepspeed.runtime.zero.parameter_offload"):
        # DeepSpeed numbers a process's parameters and compares the numbers between ranks, which had different calls.
        stage3.Init.param_id = 0
        stage3.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
        stage3.FWD_MODULE_STACK.clear()
    if dist.is_initialized():
        with contextlib.suppress(Exception):  # a peer that failed may have left already
            dist.destroy_process_group()
    # Groups find each other by their number, and one that this rank alone has tried to make counts here alone.
    dist.distributed_c10d._world.group_count = 0
    gc.collect()


def _free_engines() -> None:
    """Destroys DeepSpeed's engines, which keep process groups and their threads alive.

    The garbage collector does not free engines, since autograd's C++ nodes refer to them.
    """
    if deepspeed := sys.modules.get("deepspeed"):
        for engine in [o for o in gc.get_objects() if type(o) is deepspeed.DeepSpeedEngine]:
            with contextlib.suppress(Exception):  # fails if the call has destroyed its groups already
                engine.destroy()
