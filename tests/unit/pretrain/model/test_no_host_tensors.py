"""The model makes every tensor on its own device, and never asks a device for values.

It is run with tensors that have shapes and no values: meta tensors, and with a CUDA build of torch fake CUDA tensors,
which take the code for GPUs in the forward pass. A tensor made on the host fails beside them. The backward pass is run
on meta tensors alone, since autograd needs a real GPU for CUDA tensors.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from configs.loader import validate
from configs.model import ModelConfig
from pretrain.data.batch_source import collate
from pretrain.model import Decoder, LayerContext
from pretrain.model.context import ForwardContext
from pretrain.model.head_loss import HeadLoss
from pretrain.model.losses import NextToken
from pretrain.proof.device_rank import ROWS
from pretrain.proof.devices import CASES

CUDA = pytest.param("cuda:0", marks=pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a CUDA build"))


@contextmanager
def without_values(device: torch.device) -> Iterator[None]:
    with ExitStack() as stack:
        # megatron-core's layers ask for it, perhaps through what `redirect_to_cpu` put in torch's place.
        stack.enter_context(
            mock.patch("megatron.core.tensor_parallel.layers.torch.cuda.current_device", lambda: device)
        )
        stack.enter_context(mock.patch("torch.cuda.get_device_capability", lambda *_: (9, 0)))
        if device.type == "cuda":
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("device", ["meta", CUDA])
def test_a_step_of_the_model_stays_on_its_device(device: str, case: str, dtype: torch.dtype) -> None:
    shape, kind = CASES[case]
    if "moe" in shape and dtype == torch.float32:
        pytest.skip("experts are computed in a loop, whose counts are read on the host")
    if (device, kind, dtype) == ("cuda:0", "packed", torch.float32):
        pytest.skip("documents are computed in a loop, whose boundaries fake tensors do not have")
    config, at = validate(ModelConfig, shape), torch.device(device)
    batch = collate(ROWS[kind](0, 2, config.vocab_size, 64), 0)
    with without_values(at), torch.set_grad_enabled(device == "meta"):
        model = Decoder(config, context=LayerContext(dtype=dtype, device=at))
        off: list[Any] = [
            name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.device != at
        ]
        assert not off
        moved = batch.to(at)
        loss = HeadLoss(moved, NextToken(), 1.0, 2)
        context = ForwardContext.of_batch(config, moved)
        output = model(moved.tokens, moved.positions, moved.segments, wanted=moved.trained, context=context, loss=loss)
        assert output.device == loss.sums.device == at
        if torch.is_grad_enabled():
            output.backward()
            assert all(p.grad is not None and p.grad.device == at for p in model.parameters())
