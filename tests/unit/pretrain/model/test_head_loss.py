"""Head and loss in chunks against PyTorch's cross entropy of whole logits."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.model import head_loss
from pretrain.model.batch import Batch
from pretrain.model.documents import Documents
from pretrain.model.head_loss import HeadLoss
from pretrain.model.losses import LossFunction, NextToken, SquaredValues

ROWS, LENGTH, HIDDEN, VOCAB = 3, 11, 8, 29


class Squared:
    """A loss that no one knows the derivative of before the log-probabilities."""

    metrics: tuple[str, ...] = ("logprob",)
    temperature = 0.7
    is_linear = False

    def __call__(self, logprobs_BS: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return logprobs_BS.square() * (1 + batch.positions % 3), {"logprob": logprobs_BS.detach()}


class Tempered(NextToken):
    temperature = 1.7


def batch(trained: float = 0.6) -> Batch:
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH))
    mask = torch.rand(ROWS, LENGTH) * (torch.rand(ROWS, LENGTH) < trained)  # weights, as RL has
    segments = torch.zeros_like(tokens)
    return Batch(
        tokens=tokens,
        labels=torch.randint(0, VOCAB, (ROWS, LENGTH)),
        loss_mask=mask,
        positions=torch.arange(LENGTH).expand(ROWS, LENGTH),
        segments=segments,
        sources=torch.tensor([0, 1, 0]),
        trained=mask.flatten().nonzero()[:, 0],
        documents=Documents.of(segments),
        lengths=torch.full_like(tokens, LENGTH),
    )


def expected(x: torch.Tensor, weight: torch.Tensor, batch: Batch, loss_fn: LossFunction, scale: float) -> Any:
    """Computes the loss, the losses of both sources and the logprobs from all logits, without chunks."""
    logprobs_N = (x @ weight.t() / loss_fn.temperature).log_softmax(-1)
    logprobs_N = logprobs_N.gather(1, batch.labels.flatten()[batch.trained][:, None])[:, 0]
    logprobs_BS = x.new_zeros(batch.labels.numel()).index_copy(0, batch.trained, logprobs_N).view_as(batch.labels)
    loss_B = (loss_fn(logprobs_BS, batch)[0] * batch.loss_mask).sum(1)
    return loss_B.sum() * scale, torch.stack((loss_B[0] + loss_B[2], loss_B[1])), (logprobs_BS * batch.loss_mask).sum()


@pytest.mark.parametrize("loss_fn", [NextToken(), Tempered(), Squared()])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("tokens", [4, 1000])
def test_chunks_give_the_loss_and_gradients_of_whole_logits(
    loss_fn: LossFunction, dtype: torch.dtype, tolerance: float, tokens: int
) -> None:
    micro_batch = batch()
    x = torch.randn(len(micro_batch.trained), HIDDEN, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, dtype=dtype, requires_grad=True)
    loss = HeadLoss(micro_batch, loss_fn, scale=0.25, num_sources=2)
    with mock.patch.multiple(head_loss, CHUNK_CPU=1, LEAST_TOKENS=tokens):
        found = loss(x, weight, VOCAB, None)
        with torch.no_grad():
            assert float(HeadLoss(micro_batch, loss_fn, 0.25, 2)(x, weight, VOCAB, None)) == float(found.detach())
    right, by_source, logprob = expected(x, weight, micro_batch, loss_fn, 0.25)
    torch.testing.assert_close(found, right, rtol=tolerance, atol=0)
    torch.testing.assert_close(loss.sums[:2], by_source.detach().double(), rtol=tolerance, atol=0)
    if loss_fn.metrics:
        torch.testing.assert_close(loss.sums[4], logprob.detach().double(), rtol=tolerance, atol=0)
    ours, theirs = torch.autograd.grad(3 * found, (x, weight)), torch.autograd.grad(3 * right, (x, weight))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.linalg.vector_norm(one - other) <= 3 * tolerance * torch.linalg.vector_norm(other)


def test_gradients_of_the_head_are_summed_over_chunks_in_fp32() -> None:
    """Adds 40,000 equal tokens, whose gradient is one's times 40,000; a sum in bf16 stops growing after 256."""
    tokens = torch.zeros(1, 40_000, dtype=torch.int64)
    micro_batch = Batch(
        *(tokens, tokens, torch.ones(1, 40_000), tokens, tokens, torch.zeros(1, dtype=torch.int64)),
        trained=torch.arange(40_000),
        documents=Documents.of(tokens),
        lengths=tokens + 40_000,
    )
    x, weight = torch.ones(40_000, 8, dtype=torch.bfloat16), torch.zeros(2, 8, dtype=torch.bfloat16, requires_grad=True)
    with mock.patch.multiple(head_loss, CHUNK_CPU=1, LEAST_TOKENS=1000):
        HeadLoss(micro_batch, NextToken(), 1.0, 1)(x, weight, 2, None).backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
    assert weight.grad[0, 0].item() == pytest.approx(-20_000, rel=2**-8)


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_values_of_a_scalar_head_get_the_loss_function_s_gradient_where_the_mask_is(outputs: int) -> None:
    micro_batch = batch()
    values = torch.randn(len(micro_batch.trained), outputs, requires_grad=True)
    loss = HeadLoss(micro_batch, SquaredValues(), scale=0.25, num_sources=2)
    found = loss.of_values(values)
    weights = micro_batch.loss_mask.flatten()[micro_batch.trained]
    right = 0.25 * ((values - 1).square().sum(1) * weights).sum()
    torch.testing.assert_close(found, right)
    assert float(loss.sums[:2].sum()) == pytest.approx(4 * float(right.detach()), rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(found, values)[0], 0.5 * (values.detach() - 1) * weights[:, None])


def test_nothing_as_large_as_all_logits_is_made() -> None:
    micro_batch, largest = batch(trained=1.0), 0

    class LargestTensor(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    x = torch.randn(len(micro_batch.trained), HIDDEN, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, requires_grad=True)
    with mock.patch.multiple(head_loss, CHUNK_CPU=1, LEAST_TOKENS=4), LargestTensor():
        for loss_fn in (NextToken(), Squared()):
            HeadLoss(micro_batch, loss_fn, 1.0, 2)(x, weight, VOCAB, None).backward()
    assert largest == max(x.numel(), weight.numel()) < len(x) * VOCAB


def test_padding_of_the_vocabulary_has_no_probability_and_no_gradient() -> None:
    micro_batch = batch()
    x = torch.randn(len(micro_batch.trained), HIDDEN)
    weight = torch.randn(VOCAB + 3, HIDDEN, requires_grad=True)
    found = HeadLoss(micro_batch, NextToken(), 1.0, 2)(x, weight, VOCAB, None)
    found.backward()
    torch.testing.assert_close(found, expected(x, weight[:VOCAB], micro_batch, NextToken(), 1.0)[0])
    assert weight.grad is not None and weight.grad[:VOCAB].any() and not weight.grad[VOCAB:].any()


def test_a_micro_batch_without_trained_tokens_has_gradients_of_zero() -> None:
    micro_batch = batch().weightless()
    x, weight = torch.randn(0, HIDDEN, requires_grad=True), torch.randn(VOCAB, HIDDEN, requires_grad=True)
    for loss_fn in (NextToken(), Squared()):
        loss = HeadLoss(micro_batch, loss_fn, 1.0, 2)(x, weight, VOCAB, None)
        assert float(loss.detach()) == 0 and not torch.autograd.grad(loss, weight)[0].any()


@pytest.mark.parametrize("loss_fn", [NextToken(), Squared()], ids=["one pass", "two passes"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_logits_in_bf16_give_part_by_part_what_whole_ones_give(loss_fn: LossFunction, softcap: float | None) -> None:
    """A CPU's caches hold the parts; each row of logits is computed alone, so all numbers are the same."""
    micro_batch = batch(trained=1.0)
    x = torch.randn(len(micro_batch.trained), HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    found = []
    for elements in (2**17, 4 * VOCAB):  # one part, and parts of four rows
        with mock.patch("pretrain.model.cache_parts.ELEMENTS", elements):
            loss = HeadLoss(micro_batch, loss_fn, 1.0, 2)(x, weight, VOCAB, None, softcap)
        found.append((loss, *torch.autograd.grad(loss, (x, weight))))
    assert found[0][1].any()
    for whole, parts in zip(*found, strict=True):
        assert torch.equal(whole, parts)
