"""The pattern `prefix`: a document's context is seen both ways, in training, generation and scoring alike."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from configs.loader import ConfigError, validate
from configs.model import ModelConfig
from configs.sampling import GREEDY
from data_pipeline.mixture.rows import Row
from pretrain.data.batch_source import micro_batches, with_contexts
from pretrain.evaluation.likelihood import likelihoods
from pretrain.generation.sampling import generate
from pretrain.model import Decoder, init_weights
from pretrain.model.attention_scores import ScoreRule, alibi_slopes, attend
from pretrain.model.context import ForwardContext
from pretrain.model.documents import Documents
from pretrain.proof.recorded_step import packed_rows

MODEL: dict[str, Any] = {
    **{"vocab_size": 61, "num_layers": 2, "hidden_size": 40, "ffn_hidden_size": 44, "num_heads": 4},
    **{"num_kv_heads": 2, "head_dim": 6, "init_std": 0.3, "attention": {"pattern": "prefix"}},
}
LATENT = {"kv_rank": 10, "nope_head_dim": 6, "rope_head_dim": 4, "v_head_dim": 7}
KINDS: list[dict[str, Any]] = [
    {},
    {"position": {"kind": "alibi"}, "attention": {"pattern": "prefix", "sinks": True}},
    {"num_kv_heads": 4, "head_dim": None, "attention": {"pattern": "prefix", "latent": LATENT}},
    {"layer_pattern": ["a", "b"], "kinds": {"a": {}, "b": {"pattern": "sliding", "window": 3}}},
]


def model_of(**keys: Any) -> Decoder:
    decoder = Decoder(validate(ModelConfig, MODEL | keys))
    init_weights(decoder, seed=2)
    return decoder.eval()


def whole_logits(decoder: Decoder, tokens: list[int], context: int) -> torch.Tensor:
    """Returns the logits [S, V] of one text with a context, computed at once and without a cache."""
    row, positions = torch.tensor([tokens]), torch.arange(len(tokens))[None]
    made = ForwardContext.of(decoder.model_config, positions, torch.zeros_like(row), contexts_B=torch.tensor([context]))
    return decoder(row, positions, context=made)[0]


@pytest.mark.parametrize("slopes", [None, alibi_slopes(4)])
def test_attention_is_that_of_a_matrix_in_which_contexts_see_both_ways(slopes: torch.Tensor | None) -> None:
    torch.manual_seed(1)
    (batch,) = micro_batches(packed_rows(0, 4, 61, 24), 4)
    mask = (batch.segments >= 0) & (batch.positions >= 3) & (batch.positions % 5 != 3)
    batch = replace(batch, loss_mask=mask.float()).with_contexts()
    q, k, v = (torch.randn(24, 4, heads, 6, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    found = attend(q, k, v, batch.documents, ScoreRule("prefix", slopes_N=slopes))
    gradients = torch.autograd.grad((found * torch.arange(24)[:, None, None, None]).sum(), (q, k, v))

    index = torch.arange(24)
    same = batch.segments[:, :, None] == batch.segments[:, None]
    seen = same & (index[None, :, None] >= index)
    for row in range(4):
        for segment in batch.segments[row].unique():
            own = batch.segments[row] == segment
            trained = (own & (batch.loss_mask[row] > 0)).nonzero()[:, 0]
            if len(trained):  # up to the first token whose next one is predicted
                inside = own & (index <= trained[0])
                seen[row] |= own[:, None] & inside
    assert (seen & (index[None, :, None] < index)).any()
    scores = torch.einsum("sbnd,tbnd->bnst", q, k.repeat_interleave(2, 2)) / 6**0.5
    if slopes is not None:
        distance = (batch.positions[:, :, None] - batch.positions[:, None]).abs()
        scores = scores - slopes.double()[:, None, None] * distance[:, None]
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    expected = torch.einsum("bnst,tbnd->sbnd", weights, v.repeat_interleave(2, 2))
    real = (batch.segments >= 0).t()[..., None, None]
    torch.testing.assert_close(found * real, expected * real)
    wanted = torch.autograd.grad((expected * torch.arange(24)[:, None, None, None]).sum(), (q, k, v))
    if slopes is None:  # positions of padding, which no rule takes distances from, differ
        for one, other in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("keys", KINDS)
def test_generation_sees_prompts_both_ways_whatever_stands_beside_them(keys: dict[str, Any]) -> None:
    decoder, prompts = model_of(**keys), [[3, 9, 27, 20, 60, 58, 52], [5], [8, 16, 32, 3]]
    together = generate(decoder, prompts, 6, GREEDY)
    for prompt, completion in zip(prompts, together, strict=True):
        text = list(prompt)
        for token, logprob in zip(completion.tokens, completion.logprobs, strict=True):
            logits = whole_logits(decoder, text, len(prompt))[-1]
            assert token == int(logits.argmax())
            assert logprob == pytest.approx(float(logits.detach().log_softmax(-1)[token]), abs=1e-4)
            text.append(token)
    causal = whole_logits(decoder, prompts[0], 0)[-1]
    assert not torch.allclose(causal, whole_logits(decoder, prompts[0], 7)[-1], atol=1e-2)


def test_scores_of_continuations_see_what_comes_before_them_both_ways() -> None:
    decoder = model_of()
    text = [3, 9, 27, 20, 60, 58, 52, 1]
    pairs = [(text[:5], text[5:]), (text[:7], text[7:]), (text[:1], text[1:])]
    for (before, after), found in zip(pairs, likelihoods(decoder, pairs, 32), strict=True):
        logits = whole_logits(decoder, text[:-1], len(before)).log_softmax(-1)
        predicted = logits[len(before) - 1 :].gather(1, torch.tensor(after)[:, None])
        assert found.logprob == pytest.approx(float(predicted.detach().sum()), rel=1e-4)


def test_rows_of_a_plan_get_contexts_by_seed_and_number() -> None:
    row = Row(
        tokens=np.arange(20),
        labels=np.arange(20),
        positions=np.arange(20),
        loss_mask=np.array([True] * 8 + [False] + [True] * 8 + [False] * 3),
        segments=np.array([0] * 9 + [1] * 9 + [-1] * 2),
        source=0,
    )
    assert np.array_equal(with_contexts(row, 3, 5).loss_mask, with_contexts(row, 3, 5).loss_mask)
    firsts = set()
    for sample in range(60):
        mask = with_contexts(row, 3, sample).loss_mask
        assert not (mask & ~row.loss_mask).any() and mask[7] and mask[16], "one token at least is trained on"
        begins = np.flatnonzero(mask[:8])[0]
        assert mask[begins:8].all()
        firsts.add(int(begins))
    assert firsts == set(range(8))
    assert any((with_contexts(row, 3, i).loss_mask != with_contexts(row, 4, i).loss_mask).any() for i in range(9))


def test_a_document_on_which_nothing_is_trained_is_causal_and_others_know_their_context() -> None:
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1]])
    mask = torch.tensor([[0.0, 0, 1, 0, 0, 0, 0, 0]])
    documents = Documents.of(segments).with_contexts(mask)
    assert documents.contexts is not None and documents.contexts.tolist() == [[3, 0, 0, 0, 0, 0, 0, 0]]


def test_plain_calls_are_causal() -> None:
    decoder, tokens = model_of(), torch.tensor([[3, 9, 27, 20]])
    plain = Decoder(validate(ModelConfig, MODEL | {"attention": {}}))
    plain.load_state_dict(decoder.state_dict())
    positions = torch.arange(4)[None]
    assert torch.equal(decoder(tokens, positions), plain(tokens, positions))


def test_modules_of_multi_token_prediction_would_see_their_targets() -> None:
    with pytest.raises(ConfigError, match=r"mtp_depth = 1 with the attention pattern 'prefix'.*mtp_depth=0"):
        validate(ModelConfig, MODEL | {"head": {"mtp_depth": 1}})
    kinds = {"near": {"pattern": "prefix"}, "wide": {}}
    with pytest.raises(ConfigError, match="mtp_depth = 1 with the attention pattern 'prefix'"):
        keys = {"attention": {}, "kinds": kinds, "layer_pattern": ["near", "wide"], "head": {"mtp_depth": 1}}
        validate(ModelConfig, MODEL | keys)
