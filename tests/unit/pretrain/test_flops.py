"""Operations of a token, counted by hand, and the rate of a machine's own matrix products."""

import pytest
import torch

from configs.model import ModelConfig
from pretrain.flops import flops_per_token, measured_flops, peak_flops

CPU = torch.device("cpu")


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_costs_its_products_and_half_of_the_score_matrix(tied: bool) -> None:
    """Counts by hand: a product of an [m, k] weight costs 2mk a token forward, and twice that backward."""
    width, inner, length, vocab = 16, 24, 10, 32
    model = ModelConfig(
        vocab_size=vocab,
        num_layers=2,
        hidden_size=width,
        ffn_hidden_size=inner,
        num_heads=4,
        num_kv_heads=2,
        tie_embeddings=tied,
    )
    layer = 2 * (width * width * 2 + width * width // 2 * 2 + 3 * width * inner)
    scores = 2 * 2 * width * length / 2  # q k and p v for all heads, over the half of the row that a token sees
    forward = 2 * (layer + scores) + 2 * vocab * width
    norms = 2 * (2 * 2 * width) + 2 * width  # weights of norms are multiplied too, one by one
    assert flops_per_token(model, length) == 3 * (forward + norms)


def test_no_peak_is_made_up_for_a_cpu() -> None:
    assert peak_flops(CPU, torch.float32) is None and peak_flops(CPU, torch.bfloat16) is None
    assert 1e8 < measured_flops(CPU, torch.float32) < 1e14
