"""Experts that routers choose while texts are sampled: kept whole, and chosen again by who is given them."""

import numpy as np
import pytest
import torch

from configs.model import ModelConfig
from configs.moe import MoEConfig
from configs.sampling import SamplingConfig
from pretrain.generation.expert_choices import RouterLog, choices_shape
from pretrain.generation.sampling import generate
from pretrain.model import Decoder, init_weights
from pretrain.model.context import ForwardContext

PROMPTS = [[1, 5, 9], [1, 5, 9], [1, 7, 3, 8, 4], [2, 6]]
MOST = [4, 9, 6, 5]


@pytest.fixture
def decoder() -> Decoder:
    moe = MoEConfig(num_experts=6, top_k=2, first_layer=1, num_shared_experts=1, ffn_hidden_size=16)
    config = ModelConfig(
        vocab_size=32,
        num_layers=3,
        hidden_size=32,
        ffn_hidden_size=48,
        num_heads=4,
        num_kv_heads=2,
        init_std=0.3,
        moe=moe,
    )
    model = Decoder(config)
    init_weights(model, seed=1)
    return model.eval()


def passed(decoder: Decoder, tokens: list[int], experts: np.ndarray | None = None) -> np.ndarray:
    """Returns the experts [S, L, k] of a pass over a whole text, of which the first S are given, if any are."""
    tokens_BS = torch.tensor([tokens])
    context = ForwardContext.of(decoder.model_config, torch.arange(len(tokens))[None])
    if experts is not None:
        layers = torch.from_numpy(experts.astype(np.int64)).permute(1, 0, 2)[:, :, None]
        object.__setattr__(context, "experts", {1: layers[0], 2: layers[1]})
    with torch.no_grad(), RouterLog(decoder.routers) as log:
        decoder(tokens_BS, context.positions_SB.t(), context=context)
        return log.taken(tokens_BS.shape)[0]


def test_choices_are_those_of_a_pass_over_the_whole_text(decoder: Decoder) -> None:
    """Samples texts of one prompt, of several lengths, in fewer rows than texts: rows are moved and begun anew."""
    found = generate(decoder, PROMPTS, MOST, SamplingConfig(), seed=3, max_rows=2, keep_experts=True)
    plain = generate(decoder, PROMPTS, MOST, SamplingConfig(), seed=3, max_rows=2)
    assert choices_shape(decoder) == (2, 2) and [one.experts for one in plain] == [None] * 4
    for prompt, one, other in zip(PROMPTS, found, plain, strict=True):
        assert one.tokens == other.tokens and one.experts is not None
        whole = passed(decoder, [*prompt, *one.tokens])
        assert one.experts.shape == (len(prompt) + len(one.tokens) - 1, 2, 2)
        np.testing.assert_array_equal(np.sort(one.experts, -1), np.sort(whole[:-1], -1))
    assert len(np.unique(np.concatenate([one.experts for one in found if one.experts is not None]))) == 6


def test_given_experts_are_taken_and_others_chosen(decoder: Decoder) -> None:
    tokens = [1, 5, 9, 2, 8, 3]
    own = passed(decoder, tokens)
    given = (own + 1) % 6  # two experts as well, and others
    given[4:] = -1
    taken = passed(decoder, tokens, given)
    np.testing.assert_array_equal(taken[:4], given[:4])
    np.testing.assert_array_equal(taken[4:, 0], own[4:, 0])  # the first mixture sees what it saw before
    assert (taken[4:] >= 0).all()
