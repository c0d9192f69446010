"""Which key-value heads a rank of context parallelism takes, for every way to share them among query heads."""

import pytest
import torch

from pretrain.parallel.context_parallel import needed_heads

SHAPES = [
    (heads, kv_heads, parts)
    for heads in (4, 6, 8, 12, 24)
    for kv_heads in range(1, heads + 1)
    for parts in range(1, heads + 1)
    if heads % kv_heads == 0 and heads % parts == 0
]


@pytest.mark.parametrize(("heads", "kv_heads", "parts"), SHAPES)
def test_every_query_head_gets_its_key_value_head(heads: int, kv_heads: int, parts: int) -> None:
    x = torch.arange(kv_heads).view(1, 1, kv_heads, 1)
    expected = x.repeat_interleave(heads // kv_heads, 2).chunk(parts, 2)
    for part in range(parts):
        own = needed_heads(x, heads, parts, part)
        sharing, rest = divmod(heads // parts, own.shape[2])
        assert rest == 0 and torch.equal(own.repeat_interleave(sharing, 2), expected[part])
        assert sharing == 1 or len(own.unique()) == own.shape[2]
