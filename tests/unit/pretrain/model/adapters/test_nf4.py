"""NF4 with double quantisation: published levels, hand-made blocks, slices, layers, and bitsandbytes where it is."""

import gc
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from configs.adapters import AdapterConfig
from configs.loader import ConfigError, validate
from configs.model import ModelConfig
from pretrain.model import Decoder, LayerContext, Slices, build_single, init_weights
from pretrain.model.adapters import add_adapters, is_adapter, merged, nf4
from pretrain.model.adapters.quantized_base import QuantizedWeight, quantized_weights
from pretrain.model.slices import Marks, TensorSplit, mark

TINY = {"vocab_size": 32, "num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 24, "num_heads": 4, "num_kv_heads": 2}
LORA: dict[str, Any] = {"rank": 2, "base": "nf4"}
TOKENS, POSITIONS = torch.arange(10)[None], torch.arange(10)[None]


def test_levels_are_those_that_were_published() -> None:
    """Compares with the table of QLoRA's appendix E; the dynamic type reaches from 5.5e-7 to 1 in 7 powers of ten."""
    assert nf4.LEVELS[3:6] == (-0.39491748809814453, -0.28444138169288635, -0.18477343022823334)
    levels = nf4.dynamic_levels()
    assert len(levels) == len(set(levels.tolist())) == 256
    positive = levels[levels > 0]
    assert float(positive[0]) == pytest.approx(5.5e-7) and float(positive[-2]) == pytest.approx(0.99296875)
    assert (len(positive), float(levels[0])) == (128, pytest.approx(-0.99296875))


def test_a_block_of_levels_keeps_its_values() -> None:
    """Quantises two blocks whose scales, 2 and 4, lie one deviation from their mean, which 8 bits hold exactly."""
    levels = torch.tensor(nf4.LEVELS)
    whole = torch.cat((2 * levels.repeat(4), 4 * levels.flip(0).repeat(4))).view(8, 16)
    found = nf4.quantized(whole)
    assert found.codes[:16].tolist() == list(range(16)) and found.codes[64:80].tolist() == list(range(15, -1, -1))
    assert (float(found.mean), found.scale_blocks.tolist()) == (3.0, [1.0])
    assert nf4.packed(found.codes)[:3].tolist() == [0x01, 0x23, 0x45]
    assert torch.equal(nf4.unpacked(nf4.packed(found.codes[:5]), 5), found.codes[:5])
    # The lowest level of the dynamic type is no -1, so the first block's scale is 3 - 0.993.
    assert torch.allclose(found.tensor()[4:], whole[4:])
    assert torch.allclose(found.tensor()[:4], whole[:4] * (3 - 0.99296875) / 2)


def test_rounding_moves_no_value_by_more_than_half_a_step() -> None:
    tensor = torch.randn(50, 70, generator=torch.Generator().manual_seed(1))
    largest = max(b - a for a, b in zip(nf4.LEVELS, nf4.LEVELS[1:], strict=False)) / 2
    error = (nf4.rounded(tensor) - tensor).abs().max() / tensor.abs().max()
    assert 0.05 < float(error) < largest + 0.01
    assert torch.equal(nf4.rounded(torch.zeros(3, 5)), torch.zeros(3, 5))


@pytest.mark.parametrize("dim", [0, 1])
def test_slices_of_whole_blocks_have_the_values_of_the_whole(dim: int) -> None:
    whole, parts = torch.randn(8, 256), []
    for rank in range(4):
        weight = nn.Parameter(torch.empty((2, 256) if dim == 0 else (8, 64)))
        mark(weight, Marks(split=TensorSplit(dim, whole.shape[dim])))
        own = QuantizedWeight(weight)
        own.fill(whole, Slices(tp=4, tp_rank=rank))
        parts.append(own.weight())
    assert torch.equal(torch.cat(parts, dim), nf4.rounded(whole))


@pytest.mark.parametrize("dim", [0, 1])
def test_slices_have_the_values_of_the_whole(dim: int) -> None:
    """Quantises slices in whose rows blocks of 64 begin and end, the last padded with zeros."""
    whole = torch.randn(22, 30)
    expected = nn.functional.pad(nf4.rounded(whole), (0, 2, 0, 2))
    parts = []
    for rank in range(4):
        shape = (6, 30) if dim == 0 else (22, 8)
        weight = nn.Parameter(torch.empty(shape))
        mark(weight, Marks(split=TensorSplit(dim, whole.shape[dim])))
        own = QuantizedWeight(weight)
        own.fill(whole, Slices(tp=4, tp_rank=rank))
        parts.append(own.weight())
        assert own.codes.numel() == weight.numel() / 2
    assert torch.equal(torch.cat(parts, dim), expected[:, :30] if dim == 0 else expected[:22])


def qlora(std: float = 0.3) -> Decoder:
    built = Decoder(validate(ModelConfig, TINY))
    add_adapters(built, validate(AdapterConfig, LORA), LayerContext(), std)
    init_weights(built, seed=3)
    return built


def test_a_base_in_four_bits_computes_as_its_rounded_weights_and_merges_into_them() -> None:
    tuned = qlora()
    plain = Decoder(validate(ModelConfig, TINY))
    init_weights(plain, seed=3)
    weights = {name: p.detach() for name, p in plain.named_global_parameters()}
    made = dict(quantized_weights(tuned))
    assert len(made) == 2 * 7 and not {name for name, _ in tuned.named_global_parameters()} & made.keys()
    for name, own in made.items():
        assert torch.equal(own.weight(), nf4.rounded(weights[name]))
        weights[name] = own.weight()
    adapters = {name: p.detach() for name, p in tuned.named_global_parameters() if is_adapter(name)}
    whole = merged(list(adapters), {**weights, **adapters}.__getitem__, validate(AdapterConfig, LORA))
    merged_model = build_single(tuned.model_config, {**weights, **{name: read() for name, read in whole.items()}})
    assert torch.allclose(tuned(TOKENS, POSITIONS), merged_model(TOKENS, POSITIONS), atol=1e-5)


def test_no_weight_is_kept_between_forward_and_backward() -> None:
    """Looks for weights after the forward pass, where all that it made are gone; the backward pass makes them again."""
    tuned = qlora()
    alive: list[weakref.ref[torch.Tensor]] = []
    right = QuantizedWeight.weight

    def noted(self: QuantizedWeight) -> torch.Tensor:
        tensor = right(self)
        alive.append(weakref.ref(tensor))
        return tensor

    for name, parameter in tuned.named_global_parameters():
        parameter.requires_grad_(is_adapter(name))
    with mock.patch.object(QuantizedWeight, "weight", noted):
        loss = tuned(TOKENS, POSITIONS).square().mean()
        gc.collect()
        assert len(alive) >= 14 and not any(ref() is not None for ref in alive)
        count = len(alive)
        loss.backward()
        assert len(alive) == count + 11  # queries, keys and values of the first layer pass no gradient on
    assert all(bool(p.grad.any()) for name, p in tuned.named_global_parameters() if p.grad is not None)


def test_what_four_bits_do_not_serve_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"adapter.base = 'nf4' has no meaning for adapter.kind = 'dora'"):
        validate(AdapterConfig, {"kind": "dora", "base": "nf4"})
    config = validate(AdapterConfig, LORA)
    with pytest.raises(
        ConfigError, match=r"begins with random ones; name a model in \[init\], or set adapter.base=full"
    ):
        config.check_init(is_trained=False)
    with pytest.raises(ConfigError, match=r"adapter.base = 'nf4' does not serve experts, .*; set adapter.targets="):
        config.targets_in(validate(ModelConfig, {**TINY, "moe": {"num_experts": 4}}))


@pytest.mark.parametrize("shape", [(64, 48), (300, 129), (512, 512)])
def test_codes_are_those_of_bitsandbytes(shape: tuple[int, ...]) -> None:
    """Compares codes; scales may differ where bitsandbytes' search ends beside the nearest of the 256 levels."""
    functional = pytest.importorskip("bitsandbytes").functional
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    ours = nf4.quantized(whole)
    codes, state = functional.quantize_4bit(whole, compress_statistics=True, quant_type="nf4")
    assert torch.equal(nf4.packed(ours.codes), codes.flatten())
    assert torch.equal(ours.scale_blocks, state.state2.absmax) and ours.mean == state.offset
    same = ours.scales == state.absmax
    assert float(same.float().mean()) > 0.99
    theirs = functional.dequantize_4bit(codes, state)
    blocks = same.repeat_interleave(nf4.BLOCK)[: whole.numel()].view(shape)
    assert torch.equal(theirs[blocks], ours.tensor()[blocks])
