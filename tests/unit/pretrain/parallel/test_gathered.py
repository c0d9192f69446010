"""Views of gathered weights that autograd saves: freed after the forward pass, made again in the backward pass."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pretrain.parallel.gathered import RebuiltViews


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, second, third = self.weight.unbind()
        return F.linear(F.linear(x, second).relu(), third)


def test_backward_takes_views_of_what_is_gathered_by_then() -> None:
    torch.manual_seed(0)
    stack, x = Stack(), torch.randn(5, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(stack(x).square().sum(), x)
    saved, gathered = RebuiltViews(stack), stack.weight.data.clone()
    with saved:
        loss = stack(x).square().sum()
    stack.weight.data.zero_()  # a saved view would now be zero
    stack.weight.data = gathered
    (found,) = torch.autograd.grad(loss, x)
    assert torch.equal(found, expected)


def test_backward_without_the_weight_is_an_error() -> None:
    stack, x = Stack(), torch.randn(5, 4, requires_grad=True)
    with RebuiltViews(stack):
        loss = stack(x).sum()
    stack.weight.data = torch.empty(0)
    with pytest.raises(RuntimeError, match="out of bounds"):
        loss.backward()
