"""Log-probabilities, or values, that a model in training gives to the tokens of many rows, computed in its layout."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from pretrain.data.batch_source import micro_batches
from pretrain.model.batch import Batch
from pretrain.parallel.engine import Engine


class KeptValues:
    """A loss function that keeps the values it is called with, one per token, and computes no loss."""

    metrics: tuple[str, ...] = ()
    is_linear = True

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = temperature
        self.found: list[torch.Tensor] = []

    def __call__(self, logprobs_BS: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Keeps log-probabilities, or the values of a critic, [B, S], in host memory."""
        self.found.append(logprobs_BS.detach().float().cpu())
        return torch.zeros_like(logprobs_BS), {}


def token_values(engine: Engine, rows: Sequence[Any], temperature: float = 1.0) -> torch.Tensor:
    """Returns the log-probabilities of the labels of rows (or a critic's values) [N, S], the same on all ranks.

    They are 0 where the loss mask is. Each data-parallel rank computes a share of the rows, whose number must be a
    multiple of the data-parallel ranks times the micro-batch size. Collective: all ranks pass the same rows.
    """
    mesh, recorded = engine.mesh, KeptValues(temperature)
    share, size = len(rows) // mesh.layout.dp, engine.train_config.micro_batch_size
    first = mesh.dp_rank * share
    batches = micro_batches(rows[first : first + share], size)
    engine.evaluate(batches, recorded)
    found = torch.zeros(len(rows), len(rows[0].tokens))
    if mesh.counts_in_sums:
        own = torch.cat(recorded.found[: len(batches)])
        at = mesh.cp_rank * own.shape[1]  # context-parallel ranks have consecutive parts of each row
        found[first : first + share, at : at + own.shape[1]] = own
    dist.all_reduce(found)  # on the host; each number comes from one rank, and the others add 0
    return found
