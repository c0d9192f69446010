"""Operations of a token, counted by hand, and the rate of a machine's own matrix products."""

from typing import Any

import pytest
import torch

from configs.model import ModelConfig
from configs.model_parts import AttentionConfig, DeltaConfig
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


def test_a_gated_delta_net_costs_three_passes_over_its_states() -> None:
    """A state is read at a key, written there, and read at a query, whatever the length of rows."""
    width, heads, size_k, size_v, kernel = 16, 3, 4, 5, 2
    delta = DeltaConfig(
        num_key_heads=1, num_value_heads=heads, key_head_dim=size_k, value_head_dim=size_v, kernel_size=kernel
    )
    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "num_layers": 1,
        "hidden_size": width,
        "ffn_hidden_size": 24,
        "num_heads": 4,
    }
    model = ModelConfig(**sizes, num_kv_heads=2, attention=AttentionConfig(delta=delta), tie_embeddings=True)
    channels, values = 2 * size_k + heads * size_v, heads * size_v
    projections = 2 * width * (channels + values + 2 * heads + values)
    state = 3 * 2 * heads * size_k * size_v
    forward = projections + 2 * channels * kernel + state + 2 * 3 * width * 24 + 2 * 32 * width
    ones = 2 * (3 * width + size_v + 2 * heads)  # weights of norms and decays are multiplied one by one
    assert flops_per_token(model, 10) == flops_per_token(model, 99) == 3 * (forward + ones)


def test_no_peak_is_made_up_for_a_cpu() -> None:
    assert peak_flops(CPU, torch.float32) is None and peak_flops(CPU, torch.bfloat16) is None
    assert 1e8 < measured_flops(CPU, torch.float32) < 1e14
