"""Assignment of samples to ranks and micro-batches, and rows stacked into batches."""

import numpy as np
import pytest
import torch

from data_pipeline.mixture.rows import Row
from pretrain.data.batch_source import micro_batches, share_of_rank


def row(i: int) -> Row:
    return Row(*(np.full(4, i + k) for k in range(2)), np.ones(4, bool), np.arange(4), np.zeros(4, int), source=i % 2)


@pytest.mark.parametrize("dp", [1, 2, 3, 6])
def test_ranks_cover_a_global_batch_once_in_the_same_micro_batches(dp: int) -> None:
    shares = [share_of_rank(24, 12, rank, dp) for rank in range(dp)]
    assert [i for share in shares for i in share] == list(range(24, 36))
    batches = [batch for share in shares for batch in micro_batches([row(i) for i in share], 2)]
    assert [batch.tokens[:, 0].tolist() for batch in batches] == [[i, i + 1] for i in range(24, 36, 2)]
    assert batches[0].loss_mask.dtype == torch.float32 and batches[0].sources.tolist() == [0, 1]
