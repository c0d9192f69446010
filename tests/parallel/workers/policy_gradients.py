"""Functions run in the ranks: gradients of the losses of RL and SFT on the same samples, however these are divided."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from configs.rl import RLSection
from posttrain.algorithms.dialects import DIALECTS
from posttrain.chat.dialogues import Example
from posttrain.chat.sft_data import pack
from posttrain.rl.policy_loss import PolicyLoss
from posttrain.rl.rollout_rows import RolloutRow
from pretrain.data.batch_source import micro_batches
from pretrain.model.losses import NextToken
from pretrain.parallel import groups, zero
from pretrain.parallel.engine import Engine
from tests.parallel.workers.layouts import GLOBAL_BATCH, SEQ_LENGTH, make_engine

EXTRA = ("rollout_logprobs", "old_logprobs", "ref_logprobs", "advantages")


def gradients(
    model: dict[str, Any], parallel: dict[str, Any], out: str, micro: int, packed: bool, dialects: list[str]
) -> None:
    """Writes the whole gradient of each parameter for each dialect's loss on the same eight samples."""
    engine = make_engine(model, parallel)
    mesh, layout = engine.mesh, engine.mesh.layout
    samples = [_sample(i, engine.model_config.vocab_size) for i in range(GLOBAL_BATCH)]
    rows = [_row(samples[i : i + 2]) for i in range(0, GLOBAL_BATCH, 2)] if packed else [_row([s]) for s in samples]
    share = len(rows) // layout.dp
    batches = micro_batches(rows[mesh.dp_rank * share :][:share], micro)
    settings = RLSection(kl="loss", kl_coef=0.1, correction="truncate", correction_high=1.2)
    tensors = {}
    for name in dialects:
        engine.accumulate(batches, PolicyLoss(DIALECTS[name].policy, settings, 0.9))
        tensors |= _whole_gradients(engine, f"{name}/")
    _save(engine, tensors, out)


def replayed_gradients(model: dict[str, Any], parallel: dict[str, Any], out: str, micro: int, chosen: bool) -> None:
    """Writes the whole gradient of each parameter of one loss on eight samples whose experts are drawn at random.

    Without `chosen` the routers choose by themselves. The last tokens of each sample have no choices.
    """
    engine = make_engine(model, parallel)
    mesh, config = engine.mesh, engine.model_config
    assert config.moe is not None
    layers, experts, most = sum(layer.moe is not None for layer in config.layers), config.moe.num_experts, 8
    rows = []
    for i in range(GLOBAL_BATCH):
        order = np.random.default_rng(i).permuted(np.tile(np.arange(experts), (SEQ_LENGTH, layers, 1)), axis=-1)
        own = np.where(np.arange(SEQ_LENGTH)[:, None, None] < most, order[..., : config.moe.top_k], -1)
        rows.append(replace(_row([_sample(i, config.vocab_size)]), experts=own.astype(np.int16) if chosen else None))
    share = len(rows) // mesh.layout.dp
    batches = micro_batches(rows[mesh.dp_rank * share :][:share], micro)
    loss = PolicyLoss(DIALECTS["grpo@trl"].policy, RLSection(), 0.9)
    engine.accumulate(batches, loss)
    _save(engine, _whole_gradients(engine), out)


def dialogue_gradients(model: dict[str, Any], parallel: dict[str, Any], out: str, micro: int, seq_length: int) -> None:
    """Writes the whole gradient of each parameter for the loss of SFT on eight dialogues."""
    engine = make_engine(model, parallel)
    mesh, vocab = engine.mesh, engine.model_config.vocab_size
    examples = []
    for number in range(GLOBAL_BATCH):
        draw = np.random.default_rng(number)
        length = 17 + number % 8  # one in a row of 24 tokens, two in a row of 48
        answer = np.arange(length) % 9 >= draw.integers(2, 7, length)
        examples.append(Example(str(number), draw.integers(3, vocab, length), answer))
    rows = pack(examples, seq_length, 0, source=0)
    share = len(rows) // mesh.layout.dp
    engine.accumulate(micro_batches(rows[mesh.dp_rank * share :][:share], micro), NextToken())
    _save(engine, _whole_gradients(engine), out)


def _whole_gradients(engine: Engine, prefix: str = "") -> dict[str, torch.Tensor]:
    """Gathers the gradient of each parameter of this rank's stage. Collective."""
    return {
        prefix + name: engine.mesh.gather_whole(zero.full_gradient(value), value).clone()
        for chunk in engine.module.chunks
        for name, value in chunk.named_global_parameters()
    }


def _save(engine: Engine, tensors: dict[str, torch.Tensor], out: str) -> None:
    """Writes the tensors of a stage, on the first of its ranks, and leaves the process groups."""
    mesh = engine.mesh
    if dist.get_rank(mesh.zero_group) == 0 and mesh.tp_rank == 0:
        save_file(tensors, str(Path(out) / f"stage_{mesh.pp_rank}.safetensors"))
    groups.stop()


def _sample(number: int, vocab_size: int) -> dict[str, np.ndarray]:
    """Returns a prompt and a completion of different lengths, 12 tokens at most, with the arrays of the loss."""
    draw = np.random.default_rng(number)
    prompt, answer = 2 + number % 3, 3 + number % 6
    length = prompt + answer - 1
    sampled = np.arange(length) >= prompt - 1
    old = -np.log(vocab_size) + draw.normal(0, 0.3, length)
    values = {
        "tokens": draw.integers(3, vocab_size, length),
        "labels": draw.integers(3, vocab_size, length) * sampled,
        "loss_mask": sampled / answer,  # each completion counts alike
        "old_logprobs": old,
        "rollout_logprobs": old + draw.normal(0, 0.2, length),
        "ref_logprobs": old + draw.normal(0, 0.5, length),
        "advantages": np.full(length, draw.normal()),
    }
    return {name: value * sampled if name in EXTRA else value for name, value in values.items()}


def _row(samples: list[dict[str, np.ndarray]]) -> RolloutRow:
    arrays = {name: np.zeros(SEQ_LENGTH, samples[0][name].dtype) for name in samples[0]}
    positions, segments, at = np.zeros(SEQ_LENGTH, np.int64), np.full(SEQ_LENGTH, -1), 0
    for segment, sample in enumerate(samples):
        here = slice(at, at := at + len(sample["tokens"]))
        for name, value in sample.items():
            arrays[name][here] = value
        positions[here], segments[here] = np.arange(len(sample["tokens"])), segment
    extra = {name: arrays[name].astype(np.float32) for name in EXTRA}
    mask = arrays["loss_mask"].astype(np.float32)
    return RolloutRow(arrays["tokens"], arrays["labels"], mask, positions, segments, 0, extra)
