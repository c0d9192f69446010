"""Functions run in the ranks: a training step over gloo, and the same step rehearsed rank by rank in one process."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch

from configs.layout import Layout
from configs.loader import validate
from configs.model import ModelConfig
from configs.rl import GRPOConfig, PPOConfig
from configs.sft import SFTConfig
from configs.train import PretrainConfig, TrainerConfig
from launch.environment import ClusterEnvironment
from posttrain.rehearsed_steps import grpo_step, ppo_step, sft_step
from pretrain.model import head_loss
from pretrain.model.moe.router import Router
from pretrain.parallel import collectives, gradients, groups
from pretrain.parallel.groups import Mesh
from pretrain.proof.shared_groups import forget_groups
from pretrain.rehearsal import rehearsal_rank as rehearsal
from pretrain.rehearsal.collective_calls import GroupCall, recorded
from pretrain.rehearsal.comparison import mismatch

KINDS: dict[str, tuple[type[TrainerConfig], dict[str, Any]]] = {
    "pretraining": (PretrainConfig, {"data": {"plan": "unused"}}),
    "sft": (SFTConfig, {"init": {"run": "unused"}, "data": {"dialogues": ["unused"]}}),
    "qlora": (
        SFTConfig,
        {"init": {"run": "unused"}, "data": {"dialogues": ["unused"]}, "adapter": {"rank": 4, "base": "nf4"}},
    ),
    "adalora": (
        SFTConfig,
        {
            "init": {"run": "unused"},
            "data": {"dialogues": ["unused"]},
            "adapter": {"kind": "adalora", "rank": 4, "target_rank": 2, "budget_steps": 1, "prune_every": 1},
        },
    ),
    "grpo": (GRPOConfig, {"init": {"run": "unused"}, "task": {}, "rl": {"kl": "loss"}}),
    "ppo": (PPOConfig, {"init": {"run": "unused"}, "task": {}}),
    "ppo with text": (
        PPOConfig,
        {"init": {"run": "unused"}, "task": {}, "ppo": {"text_plan": "unused", "text_rows": 12}},
    ),
}
STEPS: dict[str, Callable[..., rehearsal.PreparedStep]] = {
    "pretraining": rehearsal.pretraining_step,
    "sft": sft_step,
    "qlora": sft_step,
    "adalora": sft_step,
    "grpo": grpo_step,
    "ppo": ppo_step,
    "ppo with text": ppo_step,
}


def config_of(model: dict[str, Any], parallel: dict[str, Any], kind: str = "pretraining") -> TrainerConfig:
    """Returns the config of a small run, of four micro-batches of 48 tokens or more on each rank."""
    schema, own = KINDS[kind]
    tree = {
        "run": {"dir": "unused"},
        **({"model": model} if kind == "pretraining" else {}),
        **own,
        "train": {
            "steps": 1,
            "global_batch_size": 16,
            "micro_batch_size": 2,
            "seq_length": 48,
            "precision": "fp32",
        },
        "optimizer": {"lr": 0.001},
        "parallel": parallel,
    }
    return validate(schema, tree)


def described(call: GroupCall) -> list[Any]:
    """Returns what a call asks for, without what differs between a rehearsal and the test's ranks.

    The test's ranks share one process group between all groups of the same ranks, and have one kind of memory.
    """
    exchanged = list(call.sent), list(call.received)
    return [list(call.group.ranks), call.operation, call.dtype, call.numel, call.peer, *exchanged, call.phase]


def opened(
    model: dict[str, Any], parallel: dict[str, Any], world: int, kind: str = "pretraining"
) -> tuple[TrainerConfig, ModelConfig, Layout]:
    """Returns config, model and layout of a run."""
    config, decoder = config_of(model, parallel, kind), validate(ModelConfig, model)
    return config, decoder, Layout.of(world, config.parallel, decoder, config.train)


def step(model: dict[str, Any], parallel: dict[str, Any], on_cpu: bool, kind: str = "pretraining") -> list[list[Any]]:
    """Takes the step in this rank of the world and returns its calls."""
    env = ClusterEnvironment.read()
    config, decoder, layout = opened(model, parallel, env.world_size, kind)
    mesh = groups.start(env, layout)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Router, "_choose", _evenly))
        if not on_cpu:  # over gloo, but by the collectives that GPUs use
            stack.enter_context(mock.patch.object(collectives, "sends_parts", lambda flat: False))
            stack.enter_context(mock.patch.object(head_loss, "CHUNK_CPU", head_loss.CHUNK_GPU))
        prepared = STEPS[kind](config, decoder, mesh, rehearsal.maker(config, on_cpu=True))
        with recorded(rehearsal.group_names(mesh)) as calls:
            prepared.take()
    groups.stop()
    return [described(call) for call in calls]


def _evenly(router: Router, scores_TE: torch.Tensor) -> torch.Tensor:
    """Chooses experts in turn, each of them equally often."""
    tokens, experts = scores_TE.shape
    return torch.arange(tokens * router.moe.top_k).view(tokens, -1) % experts


def rehearsed(
    model: dict[str, Any],
    parallel: dict[str, Any],
    world: int,
    on_cpu: bool,
    kind: str = "pretraining",
    fault: str = "",
) -> dict[str, Any]:
    """Rehearses all ranks of a world in this process; returns their calls and what the comparison says.

    The rank of tensor-parallel number 1 has a `fault`: "missing" leaves out sums of gradients, "smaller" sums a part.
    """
    config, decoder, layout = opened(model, parallel, world, kind)
    prepare = "" if kind == "pretraining" else f"{grpo_step.__module__}:{STEPS[kind].__name__}"
    found = {}
    for number in range(world):
        with ExitStack() as stack:
            if fault and number % layout.tp == 1:
                stack.enter_context(mock.patch.object(gradients, "_sum", FAULTS[fault]))
            done = rehearsal.rehearse(config, decoder, layout, number, on_cpu, prepare=prepare)
        assert not done.failure, done.failure
        found[number] = done.calls
        forget_groups()
    return {
        "calls": [[described(call) for call in calls] for calls in found.values()],
        "mismatch": mismatch(found),
    }


_SUM = gradients._sum
FAULTS: dict[str, Any] = {
    "missing": lambda parameters, group: None,
    "smaller": lambda parameters, group: _SUM(parameters[1:], group),
}


def memory(model: dict[str, Any], parallel: dict[str, Any]) -> list[Any]:
    """Returns the bytes of weights, gradients and optimizer state of this rank, after a real step and rehearsed."""
    env = ClusterEnvironment.read()
    config, decoder, layout = opened(model, parallel, env.world_size)
    mesh: Mesh = groups.start(env, layout)
    prepared = rehearsal.pretraining_step(config, decoder, mesh, rehearsal.maker(config, on_cpu=True))
    prepared.take()
    real = rehearsal.memory_of(prepared.engines)
    groups.stop()
    forget_groups()
    done = rehearsal.rehearse(config, decoder, layout, env.rank, on_cpu=True)
    return [real, (done.parameters, done.memory)]
