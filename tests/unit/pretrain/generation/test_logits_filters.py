"""Changes to logits before sampling: each function against transformers' processor, and hand-made cases."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from configs.loader import ConfigError
from configs.sampling import GREEDY, SamplingConfig
from pretrain.generation.logits_filters import keep_min_p, keep_top_k, keep_top_p, penalize_repetition, processed
from pretrain.generation.sampling import draw


def cases() -> list[torch.Tensor]:
    """Returns logits [B, V]: normal, nearly one token, all equal, with ties, with -inf, one token, wide, long tails."""
    draws = torch.Generator().manual_seed(0)
    normal = torch.randn(6, 50, generator=draws)
    with_never = normal.masked_fill(torch.rand(6, 50, generator=draws) < 0.6, float("-inf"))
    with_never[:, 7] = 0.0
    tied = torch.randint(-2, 3, (8, 40), generator=draws).float()
    long = torch.randn(2, 70_000, generator=draws) * 3
    return [normal, normal * 30, torch.zeros(2, 9), tied, with_never, normal[:, :1], normal - 1e4, long]


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


@pytest.mark.parametrize("logits", cases())
def test_each_filter_is_that_of_transformers(logits: torch.Tensor) -> None:
    before = logits.clone()
    ids = torch.randint(0, logits.shape[1], (len(logits), 12), generator=torch.Generator().manual_seed(1))
    for k in (1, 2, 5, 39, 10**6):
        same(keep_top_k(logits, k), TopKLogitsWarper(k)(ids, logits))
    for p in (1e-9, 0.1, 0.5, 0.8, 0.95, 0.999999):
        same(keep_top_p(logits, p), TopPLogitsWarper(p)(ids, logits))
    for p in (1e-9, 0.02, 0.3, 0.9999, 1.0):
        same(keep_min_p(logits, p), MinPLogitsWarper(p)(ids, logits))
    for penalty in (0.5, 1.2, 7.0):
        same(penalize_repetition(logits, ids, penalty), RepetitionPenaltyLogitsProcessor(penalty)(ids, logits))
    assert torch.equal(logits, before), "nothing is changed in place"


@pytest.mark.parametrize("logits", cases())
def test_all_options_are_applied_in_the_order_of_transformers(logits: torch.Tensor) -> None:
    ids = torch.randint(0, logits.shape[1], (len(logits), 12), generator=torch.Generator().manual_seed(2))
    for penalty, temperature, top_k, top_p, min_p in ((1.3, 0.7, 20, 0.9, 0.1), (0.8, 2.5, 5, 0.5, 0.3)):
        theirs = LogitsProcessorList(
            [
                RepetitionPenaltyLogitsProcessor(penalty),
                TemperatureLogitsWarper(temperature),
                TopKLogitsWarper(top_k),
                TopPLogitsWarper(top_p),
                MinPLogitsWarper(min_p),
            ]
        )
        sampling = SamplingConfig(penalty, temperature, top_k, top_p, min_p)
        same(processed(logits, sampling, ids), theirs(ids, logits))
        greedy = SamplingConfig(penalty, 0.0, top_k, top_p, min_p)
        same(processed(logits, greedy, ids), theirs[0](ids, logits))
    assert processed(logits, SamplingConfig()) is logits


def test_cases_counted_by_hand() -> None:
    def kept(probs: list[float], top_p: float) -> list[float]:
        result = keep_top_p(torch.tensor([probs]).log(), top_p).exp()[0]
        return [round(value, 4) for value in result.tolist()]

    assert kept([0.3, 0.1, 0.1, 0.5], 0.8) == [0.3, 0, 0, 0.5]
    assert kept([0.15, 0.3, 0.3, 0.25], 0.8) == [0, 0.3, 0.3, 0.25]
    assert kept([0.2, 0.7, 0.1], 0.01) == [0, 0.7, 0]
    assert kept([0.2, 0.7, 0.1], 0.71) == [0.2, 0.7, 0]

    logits = torch.tensor([[-0.1, 0.1, 3.0]])
    # Token 1 twice and token 0 once: the penalty counts a token once.
    penalized = penalize_repetition(logits, torch.tensor([[1, 0, 1]]), 2.0)
    assert penalized[0].tolist() == pytest.approx([-0.2, 0.05, 3.0])

    ties = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]])
    assert keep_top_k(ties, 2).isfinite().tolist() == [[False, True, True, False, True]]

    half = torch.tensor([[0.5, 0.25, 0.2, 0.05]]).log()
    assert keep_min_p(half, 0.45).isfinite().tolist() == [[True, True, False, False]]
    # The likeliest token stays, whatever was cut before, so what is left is compared with the same one.
    assert processed(half, SamplingConfig(top_k=3, min_p=0.45)).isfinite().sum() == 2
    assert processed(half, SamplingConfig(top_k=3, min_p=0.11)).isfinite().sum() == 3


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("repetition_penalty", (0, -1, float("inf"))),
        ("temperature", (-0.1, 1e-9, float("nan"), float("inf"))),
        ("top_k", (-1,)),
        ("top_p", (0, -0.1, 1.01, float("nan"))),
        ("min_p", (-0.1, 1.01, float("nan"))),
    ],
)
def test_values_out_of_range_are_refused_by_name(option: str, values: tuple[float, ...]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=f"{option} = .* is out of range; give "):
            SamplingConfig(**{option: value})


def test_draws_follow_the_filtered_distribution() -> None:
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(3)) * 2
    sampling, ids = SamplingConfig(1.5, 0.8, 40, 0.9, 0.05), torch.tensor([[3, 5, 199, 5]])
    probs = processed(logits, sampling, ids).softmax(-1)[0]
    count = 20_000
    points = (torch.arange(count).double() + 0.5) / count  # each share of [0, 1) once, so counts are off by 1 at most
    tokens, logprobs = draw(logits, torch.zeros(count, dtype=torch.int64), sampling, points, ids)
    counts = torch.bincount(tokens, minlength=200)
    assert 3 < (probs > 0).sum() < 40
    assert (counts - probs * count).abs().max() <= 1.5
    torch.testing.assert_close(logprobs, probs[tokens].log().double(), rtol=0, atol=1e-5)
    first = draw(logits, torch.zeros(1, dtype=torch.int64), GREEDY, points[:1])[0]
    assert first.item() == logits.argmax()


def test_draws_stay_on_their_device() -> None:
    """Draws from meta tensors, beside which a tensor made on the host would fail."""
    logits, at = torch.empty(3, 200, device="meta"), {"device": "meta", "dtype": torch.int64}
    sampling = SamplingConfig(1.5, 0.8, 40, 0.9, 0.05)
    points = torch.empty(5, device="meta", dtype=torch.float64)
    drawn = draw(logits, torch.empty(5, **at), sampling, points, torch.empty(3, 7, **at))
    assert [tensor.device.type for tensor in drawn] == ["meta", "meta"]
