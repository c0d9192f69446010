"""One rank of the test pool: takes calls from harness.py, runs them in a fresh world, answers in JSON.

Between calls everything global is put back: process groups (torch's, megatron-core's, deepspeed's), the
random state, the default dtype, and the launcher's variables. Leaves out starting and ending processes.
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
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from launch.environment import ClusterEnvironment

_new_group = dist.new_group
_groups: dict[tuple[Any, ...], Any] = {}


def serve(descriptor: int) -> None:
    """Serves calls until the pool closes its end of the connection."""
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    torch.set_num_threads(1)
    dist.new_group = one_group_for_the_same_ranks
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
        # Leaving the groups before answering closes this rank's sockets: ranks that wait for it fail at once
        # instead of hanging. The pool takes the first answer for the cause, so an error is sent first.
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
    gc.freeze()  # what the imports brought is looked at no more
    if message["process_group"]:
        dist.init_process_group(
            "gloo",
            init_method=env.init_method,
            rank=env.rank,
            world_size=env.world_size,
            timeout=timedelta(minutes=10),  # longer than any test's: the pool's timeout shows stacks, gloo's none
        )
    module, _, name = message["function"].partition(":")
    return getattr(importlib.import_module(module), name)(**message["kwargs"])


def one_group_for_the_same_ranks(ranks: Sequence[int] | None = None, *args: Any, **kwargs: Any) -> Any:
    """Makes a group the first time that a world asks for these ranks, and gives the same one from then on.

    Each gloo group has three threads and connections of its own. megatron-core makes seventeen groups in any layout, of
    which most have the same ranks.
    """
    key = (dist.group.WORLD, None if ranks is None else tuple(ranks), kwargs.get("backend"))
    if key not in _groups:
        _groups[key] = _new_group(ranks, *args, **kwargs)
    return _groups[key]


def leave_world() -> None:
    """Destroys every process group and what the libraries remember of it."""
    _free_engines()
    _groups.clear()
    if parallel_state := sys.modules.get("megatron.core.parallel_state"):
        parallel_state.destroy_model_parallel()
    if comm := sys.modules.get("deepspeed.comm.comm"):
        comm.cdb = None
    if groups := sys.modules.get("deepspeed.utils.groups"):
        importlib.reload(groups)  # it keeps two dozen groups in module globals; this puts all of them back
    if stage3 := sys.modules.get("deepspeed.runtime.zero.parameter_offload"):
        # It numbers a process's modules and parameters, ranks compare numbers, and they were in different calls before.
        stage3.Init.param_id = 0
        stage3.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
        stage3.FWD_MODULE_STACK.clear()
    if dist.is_initialized():
        with contextlib.suppress(Exception):  # a peer that failed may have left already
            dist.destroy_process_group()
    gc.collect()


def _free_engines() -> None:
    """Engines hook into autograd's C++ nodes, which no garbage collector sees through; they hold groups, and every
    gloo group has threads of its own.
    """
    if deepspeed := sys.modules.get("deepspeed"):
        for engine in [o for o in gc.get_objects() if type(o) is deepspeed.DeepSpeedEngine]:
            with contextlib.suppress(Exception):  # where a call has left its groups by itself
                engine.destroy()
