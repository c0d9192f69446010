"""Mixtures of experts: routers compared with transformers' models, balancing losses, capacity, grouped products."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from configs.loader import ConfigError, validate
from configs.model import LayerConfig, ModelConfig
from configs.moe import MoEConfig
from pretrain.model import Decoder, LayerContext, build_single, init_weights
from pretrain.model.moe import MoE
from pretrain.model.moe.balance import Balance, LossDenominators
from pretrain.model.moe.dispatch import Dispatch
from pretrain.model.moe.experts import Experts, most_rows, rows_of_product

HIDDEN, EXPERT, EXPERTS = 16, 24, 8
TRANSFORMERS = {
    "hidden_size": HIDDEN,
    "moe_intermediate_size": EXPERT,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
OURS = {
    "num_experts": EXPERTS,
    "top_k": 3,
    "ffn_hidden_size": EXPERT,
    "num_shared_experts": 2,
    "num_groups": 4,
    "top_groups": 2,
    "routed_scaling": 2.5,
}


def model_config(**moe: Any) -> ModelConfig:
    shape = {"vocab_size": 32, "num_layers": 2, "hidden_size": HIDDEN, "ffn_hidden_size": 40}
    return validate(ModelConfig, {**shape, "num_heads": 2, "num_kv_heads": 2, "moe": {"num_experts": EXPERTS, **moe}})


def layer_config(experts: int, hidden: int, ffn: int) -> LayerConfig:
    shape = {"vocab_size": 32, "num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "head_dim": 2}
    whole = {**shape, "num_heads": 2, "num_kv_heads": 2, "moe": {"num_experts": experts}}
    return replace(validate(ModelConfig, whole).layer(0), hidden_size=hidden, ffn_hidden_size=ffn)


def ours(**moe: Any) -> MoE:
    layer = MoE(model_config(**moe).layer(0), LayerContext())
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def copied(theirs: nn.Module, layer: MoE) -> nn.Module:
    """Copies the weights of `layer` into transformers' layer `theirs` and returns that."""
    modules = dict(theirs.named_modules())
    with torch.no_grad():
        modules["gate"].weight.copy_(layer.router.weight)
        gate_up = torch.cat((layer.experts.gate_proj, layer.experts.up_proj), 1)
        modules["experts"].gate_up_proj.copy_(gate_up)
        modules["experts"].down_proj.copy_(layer.experts.down_proj)
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(modules["shared_experts"], name).weight.copy_(getattr(layer.shared, name).weight)
    return theirs


@pytest.mark.parametrize("renormalize", [True, False])
def test_sigmoid_gate_with_groups_and_bias_is_deepseek_v3s(renormalize: bool) -> None:
    layer = ours(**OURS, gating="sigmoid", group_score="top2", renormalize=renormalize, bias_update_rate=0.1)
    layer.balance.bias.copy_(torch.linspace(-0.4, 0.4, EXPERTS))
    theirs = copied(DeepseekV3MoE(DeepseekV3Config(**TRANSFORMERS, norm_topk_prob=renormalize)), layer)
    theirs.gate.e_score_correction_bias.copy_(layer.balance.bias)
    x_SBH = torch.randn(50, 2, HIDDEN)
    torch.testing.assert_close(layer(x_SBH), theirs(x_SBH))
    layer.balance.bias.zero_()
    assert not torch.allclose(layer(x_SBH), theirs(x_SBH), atol=1e-2), "the bias takes part in choosing"


def test_softmax_gate_with_groups_is_deepseek_v2s() -> None:
    layer = ours(**OURS, group_score="max", renormalize=False)
    config = DeepseekV2Config(**TRANSFORMERS, topk_method="group_limited_greedy", norm_topk_prob=False)
    theirs = copied(DeepseekV2Moe(config), layer)
    x_SBH = torch.randn(50, 2, HIDDEN)
    torch.testing.assert_close(layer(x_SBH), theirs(x_SBH))


def attach(balance: Balance, logits: torch.Tensor, experts: torch.Tensor, valid_SB: torch.Tensor) -> None:
    balance.denominators = LossDenominators(sequences=valid_SB.shape[1], tokens=int(valid_SB.sum()), scale=1.0)
    balance.attach(torch.zeros(len(logits), 1, requires_grad=True), logits, experts, valid_SB)


def test_auxiliary_loss_over_a_micro_batch_is_transformers() -> None:
    """Compares with transformers' loss divided by top_k, since transformers does not divide the shares by it."""
    logits, mask_BS = torch.randn(24, EXPERTS), torch.arange(12)[None] < torch.tensor([[12], [7]])
    moe = MoEConfig(num_experts=EXPERTS, top_k=3, aux_loss="micro_batch")
    balance = Balance(moe, LayerContext())
    attach(balance, logits, logits.topk(3).indices, mask_BS.t())
    by_sequence = logits.unflatten(0, (12, 2)).transpose(0, 1).flatten(0, 1)  # rows in the order of mask_BS
    expected = load_balancing_loss_func((by_sequence,), EXPERTS, 3, mask_BS)
    assert float(balance.aux_loss) == pytest.approx(float(expected) / 3, rel=1e-6)
    assert balance.tokens.sum() == 3 * mask_BS.sum()


def test_auxiliary_loss_over_sequences_is_one_at_perfect_balance_and_grows_with_imbalance() -> None:
    moe = MoEConfig(num_experts=4, top_k=2)
    valid_SB = torch.ones(8, 1, dtype=torch.bool)

    def loss(probs: list[float], experts: torch.Tensor, valid_SB: torch.Tensor) -> float:
        balance = Balance(moe, LayerContext())
        attach(balance, torch.tensor([probs] * 8).log(), experts, valid_SB)
        return float(balance.aux_loss)

    assert loss([0.25] * 4, torch.tensor([[0, 1], [2, 3]] * 4), valid_SB) == pytest.approx(1.0)
    # E/k * sum(share * prob) = 4/2 * (1 * 0.7 + 1 * 0.1)
    assert loss([0.7, 0.1, 0.1, 0.1], torch.tensor([[0, 1]] * 8), valid_SB) == pytest.approx(1.6)
    valid_SB[1:] = False  # only the first token is real
    assert loss([0.7, 0.1, 0.1, 0.1], torch.tensor([[0, 1]] + [[2, 3]] * 7), valid_SB) == pytest.approx(1.6)


def test_global_batch_loss_and_bias_follow_the_last_step() -> None:
    moe = MoEConfig(num_experts=4, top_k=2, aux_loss="global_batch", aux_loss_coef=0.5, bias_update_rate=0.25)
    balance = Balance(moe, LayerContext())
    balance.finish(torch.tensor([6, 2, 4, 4]), changes=torch.tensor(True))  # 8 tokens chose 2 experts each
    balance.finish(torch.tensor([9, 1, 1, 5]), changes=torch.tensor(False))
    assert balance.bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 8)
    attach(balance, probs.log(), torch.tensor([[0, 1]] * 8), torch.ones(8, 1, dtype=torch.bool))
    assert float(balance.aux_loss) == pytest.approx(4 / 2 * (0.75 * 0.4 + 0.25 * 0.3 + 0.5 * 0.2 + 0.5 * 0.1))
    assert balance.state().keys() == {"bias", "load"}


def test_z_loss_pulls_logits_towards_zero() -> None:
    """Compares the loss's gradient by a logit with 2 * logsumexp * softmax / tokens."""
    balance = Balance(MoEConfig(num_experts=4, aux_loss_coef=0.0, z_loss_coef=3.0), LayerContext())
    balance.denominators = LossDenominators(sequences=1, tokens=5, scale=1.0)
    logits = torch.randn(6, 4, requires_grad=True)
    valid_SB = torch.tensor([[True]] * 5 + [[False]])
    x = balance.attach(torch.zeros(6, 1, requires_grad=True), logits, torch.zeros(6, 2, dtype=torch.int64), valid_SB)
    x.sum().backward()
    expected = 3.0 * 2 * logits.logsumexp(-1, keepdim=True) * logits.softmax(-1) / 5
    expected[5] = 0
    torch.testing.assert_close(logits.grad, expected.detach())


def test_capacity_drops_later_tokens_and_nothing_else() -> None:
    experts_TK = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 3]])
    dispatch = Dispatch(experts_TK, num_experts=4, capacity_factor=1.0)  # two rows per expert
    assert dispatch.wanted.tolist() == [4, 2, 1, 1] and dispatch.counts.tolist() == [2, 2, 1, 1]
    weights_TK = torch.tensor([[1.0, 10.0]] * 4)
    x_TH = torch.eye(4)
    y_TH = dispatch.run(x_TH, weights_TK, lambda rows, counts: rows, None)
    assert y_TH.diagonal().tolist() == [11.0, 11.0, 10.0, 10.0]
    unlimited = Dispatch(experts_TK, 4, valid_T=torch.tensor([True, False, True, True]))
    assert unlimited.counts.tolist() == [3, 2, 0, 1]
    assert unlimited.run(x_TH, weights_TK, lambda rows, counts: rows, None).diagonal().tolist() == [11, 0, 11, 11]


@pytest.mark.parametrize("capacity_factor", [None, 0.6])
def test_rows_of_nobody_may_hold_anything(capacity_factor: float | None) -> None:
    """Fills rows that no expert takes, which the grouped product leaves undefined: nothing comes of them."""
    torch.manual_seed(1)
    x_TH, weights_TK = torch.randn(12, 5, requires_grad=True), torch.rand(12, 3, requires_grad=True)
    experts_TK = torch.rand(12, 6).topk(3).indices
    valid_T = torch.arange(12) % 4 != 1
    dispatch = Dispatch(experts_TK, 6, valid_T, capacity_factor)
    factors_E, taken = torch.randn(6, 1), torch.zeros(6, dtype=torch.int64)

    def compute(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        outputs = rows[: int(counts.sum())] * factors_E.repeat_interleave(counts, 0)
        return torch.cat((outputs, rows[len(outputs) :] * float("nan")))

    y_TH = dispatch.run(x_TH, weights_TK, compute, None)
    capacity = 12 if capacity_factor is None else math.ceil(capacity_factor * 12 * 3 / 6)
    expected = torch.zeros(12, 5)
    for token in range(12):
        for choice, expert in enumerate(experts_TK[token].tolist()):
            if valid_T[token] and taken[expert] < capacity:
                expected[token] += weights_TK[token, choice] * factors_E[expert] * x_TH[token]
                taken[expert] += 1
    assert taken.tolist() == dispatch.counts.tolist() and (
        capacity_factor is None or dispatch.wanted.sum() > taken.sum()
    )
    torch.testing.assert_close(y_TH, expected)
    toward = torch.randn(12, 5)
    ours = torch.autograd.grad(y_TH, (x_TH, weights_TK), toward)
    for found, right in zip(ours, torch.autograd.grad(expected, (x_TH, weights_TK), toward), strict=True):
        torch.testing.assert_close(found, right)


def test_no_token_is_dropped_outside_of_training() -> None:
    limited, free = ours(capacity_factor=0.1), ours()
    free.load_state_dict(limited.state_dict())
    x_SBH = torch.randn(30, 2, HIDDEN)
    assert torch.equal(limited.eval()(x_SBH), free(x_SBH))
    assert not torch.equal(limited.train()(x_SBH), free(x_SBH)) and limited.balance.dropped > 0


@pytest.mark.parametrize("way", ["_grouped", "_aligned", "forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [HIDDEN, 9, 20])
def test_grouped_products_are_a_loop_over_experts(way: str, dtype: torch.dtype, hidden: int) -> None:
    """Multiplies sizes of any kind, although torch's grouped product needs multiples of 4 in fp32 and 8 in bf16."""
    for ffn in (EXPERT, *range(1, 21)):
        experts = Experts(layer_config(5, hidden, ffn), LayerContext(dtype=dtype))
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.3)
        counts = torch.tensor([3, 0, 9, 1, 0])
        expected = results(experts, "", counts)
        for found, right in zip(results(experts, way, counts), expected, strict=True):
            # A sum of K products may round K times; in bf16 sums are in fp32 and only the result is rounded.
            roundoff = 2.0**-8 if dtype == torch.bfloat16 else max(hidden, ffn) * 2.0**-24
            assert torch.linalg.vector_norm(found - right) <= 2 * roundoff * torch.linalg.vector_norm(right), ffn


def test_products_in_bf16_take_few_numbers_of_rows() -> None:
    """Counts the numbers of rows, for each of which a library for CPUs builds code, and the rows that are too many."""
    assert [rows_of_product(n, torch.float32) for n in (0, 1, 517)] == [0, 1, 517]
    sizes = [rows_of_product(n, torch.bfloat16) for n in range(2**16)]
    assert sizes[:2] == [0, 16] and len(set(sizes)) < 160
    assert all(n <= size <= n + max(15, n // 16) for n, size in enumerate(sizes))
    counts = [1, 17, 255, 257, 1025, 0, 4097]
    assert sum(sizes[n] for n in counts) <= most_rows(sum(counts), len(counts))


def one_by_one(experts: Experts, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Computes each expert by autograd alone."""
    outputs = [
        F.linear(F.silu(F.linear(own, gate)) * F.linear(own, up), down)
        for own, gate, up, down in zip(
            x.split(counts.tolist()), experts.gate_proj, experts.up_proj, experts.down_proj, strict=True
        )
    ]
    return torch.cat(outputs)


def results(experts: Experts, way: str, counts: torch.Tensor) -> list[torch.Tensor]:
    """Returns output and all gradients of a forward and backward pass over the same 13 rows; "" is `one_by_one`."""
    generator = torch.Generator().manual_seed(0)
    shape, dtype = (13, experts.gate_proj.shape[2]), experts.gate_proj.dtype
    x, gradient = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    experts.zero_grad()
    y = getattr(experts, way)(x.requires_grad_(), counts) if way else one_by_one(experts, x.requires_grad_(), counts)
    y.backward(gradient)
    return [y.detach(), x.grad, *(p.grad.clone() for p in experts.parameters())]


@pytest.mark.parametrize("moe", [OURS, {"top_k": 1}, {"gating": "sigmoid", "num_shared_experts": 1}])
def test_parameters_are_counted(moe: dict[str, Any]) -> None:
    config = model_config(**{"num_experts": EXPERTS, **moe})
    assert sum(p.numel() for p in Decoder(config).parameters()) == config.num_parameters()


def test_a_model_is_not_built_without_its_bias() -> None:
    config = model_config(bias_update_rate=0.1)
    decoder = Decoder(config)
    init_weights(decoder, seed=1)
    weights = {**dict(decoder.named_global_parameters()), **decoder.named_balance()}
    weights["layers.1.moe.balance.bias"] = torch.linspace(-1, 1, EXPERTS)
    built = build_single(config, weights)
    assert torch.equal(built.moe_layers[1].balance.bias, weights.pop("layers.1.moe.balance.bias"))
    with pytest.raises(ValueError, match=r"missing \['layers.1.moe.balance.bias'\]"):
        build_single(config, weights)


def test_a_model_that_moves_takes_its_bias_along_in_full_precision() -> None:
    decoder = Decoder(model_config(bias_update_rate=0.1, aux_loss="global_batch"))
    left = [name for part in decoder.modules() for name, value in vars(part).items() if isinstance(value, torch.Tensor)]
    assert left == []  # what is neither parameter nor buffer would stay behind
    decoder.moe_layers[1].balance.bias.fill_(1 + 2**-12)
    decoder.to(torch.bfloat16)
    assert decoder.embedding.weight.dtype == torch.bfloat16
    balance = decoder.named_balance()
    assert {name.split(".")[-1] for name in balance} == {"bias", "load"}
    assert {tensor.dtype for tensor in balance.values()} == {torch.float32}
    assert balance["layers.1.moe.balance.bias"].unique().tolist() == [1 + 2**-12]  # in bf16 it would be 1
    decoder.to("meta")
    tensors = [*decoder.parameters(), *decoder.buffers(), *decoder.named_balance().values()]
    assert len(tensors) > 20 and all(tensor.is_meta for tensor in tensors)


@pytest.mark.parametrize(
    ("moe", "words"),
    [
        ({"num_experts": 4, "top_k": 5}, "top_k = 5 is more than model.moe.num_experts = 4"),
        ({"num_experts": 6, "num_groups": 4}, "num_experts = 6 is not a multiple of model.moe.num_groups = 4"),
        ({"num_experts": 8, "num_groups": 4, "top_groups": 5}, "top_groups = 5 is more than model.moe.num_groups = 4"),
        ({"num_experts": 8, "num_groups": 4, "top_k": 3}, "top_k = 3 is more than the 2 of 1 groups"),
        ({"num_experts": 4, "num_groups": 4, "top_groups": 4, "group_score": "top2"}, "set model.moe.group_score=max"),
    ],
)
def test_impossible_routers_are_refused(moe: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        model_config(**moe)
    assert words in str(raised.value)


def test_capacity_is_a_fair_share_times_the_factor() -> None:
    experts_TK = torch.zeros(10, 1, dtype=torch.int64)
    dispatch = Dispatch(experts_TK, 4, capacity_factor=1.25)
    assert dispatch.counts[0] == math.ceil(1.25 * 10 / 4)
