"""The largest attention logit against all products of a row, under a mask of tokens by tokens."""

import math

import pytest
import torch

from pretrain.model.attention_scores import ScoreRule, largest_logit
from pretrain.model.documents import Documents
from pretrain.parallel.details import described

HEADS, DIM, LENGTH = 4, 10, 37


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize(
    ("rule", "reach"), [(ScoreRule(), 99), (ScoreRule("sliding", 5, softcap=1.0), 5), (ScoreRule("sliding", 1), 1)]
)
def test_the_largest_logit_is_that_of_all_pairs_that_see_each_other(
    rule: ScoreRule, reach: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.model.attention_scores.QUERIES", 8)  # documents of several parts
    for seed in range(6):
        draw = torch.Generator().manual_seed(seed)
        cuts = (torch.rand(3, LENGTH, generator=draw) < 0.1).long()
        segments_BT = cuts.cumsum(1)
        segments_BT[1, -5:] = -1  # padding
        q, k = (torch.randn(LENGTH, 3, n, DIM, generator=draw, dtype=torch.float64) for n in (HEADS, kv_heads))
        shared = k.repeat_interleave(HEADS // kv_heads, dim=2)
        products = torch.einsum("qbnd,kbnd->bnqk", q, shared) / math.sqrt(DIM)
        index = torch.arange(len(q))
        distance = index[:, None] - index
        seen = (segments_BT[:, :, None] == segments_BT[:, None]) & (distance >= 0) & (distance < reach)
        expected = products.masked_fill(~seen[:, None], -torch.inf).max()
        torch.testing.assert_close(largest_logit(q, k, Documents.of(segments_BT), rule), expected)


def test_layers_without_attention_logits_are_left_out() -> None:
    found = {
        "activations": torch.tensor([[8.0, 2.0], [27.0, 3.0]]),
        "logits": torch.tensor([-torch.inf, 4.0]),
        "norms": torch.tensor([0.25, 4.0]),
    }
    assert described(found) == {
        "activation_rms_by_layer": {"layer 0": 2.0, "layer 1": 3.0},
        "attention_logit": 4.0,
        "attention_logit_by_layer": {"layer 1": 4.0},
        "update_norm": 0.5,
        "weight_norm": 2.0,
        "update_ratio": 0.25,
    }
    assert described({}) == {}
