"""`train.deterministic` is what torch is told, and it can be taken back."""

import os

import pytest
import torch

from pretrain import determinism


def test_a_run_asks_for_kernels_with_one_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    for deterministic in (True, False):
        determinism.choose(deterministic)
        assert torch.are_deterministic_algorithms_enabled() == cudnn.deterministic == deterministic
        assert cuda.cudnn_sdp_enabled() != deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # cuBLAS reads it once, at its first product
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    determinism.choose(True)
    determinism.choose(False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
