"""Functions run in the ranks: gradients of the losses of RL on the same samples, however these are divided."""

from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from safetensors.torch import save_file

from configs.rl import RLSection
from posttrain.algorithms.dialects import DIALECTS
from posttrain.rl.logprob_check import LogprobCheck
from posttrain.rl.policy_loss import PolicyLoss
from posttrain.rl.rows import RolloutRow
from pretrain.batch_source import micro_batches
from pretrain.parallel import groups, zero
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
        engine.accumulate(batches, PolicyLoss(DIALECTS[name].policy, settings, 0.9, LogprobCheck(float("inf"))))
        for chunk in engine.module.chunks:
            for parameter, value in chunk.named_global_parameters():
                tensors[f"{name}/{parameter}"] = mesh.gather_whole(zero.full_gradient(value), value).clone()
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
