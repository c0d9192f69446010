"""Multi-token prediction against a plain reference that sees one document at a time, as DeepSeek-V3's paper has it."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from configs.loader import plain, validate
from configs.model import ModelConfig
from export.conversion.tensor_shapes import parameters
from pretrain.checkpoint.whole_model import _without_modules
from pretrain.data.batch_source import micro_batches
from pretrain.flops import flops_per_token
from pretrain.model import Decoder, init_weights
from pretrain.model.batch import Batch
from pretrain.model.context import ForwardContext
from pretrain.model.decoder import Block, MTPBlock
from pretrain.model.head_loss import HeadLoss
from pretrain.model.losses import NextToken
from pretrain.model.multi_token import Ahead
from pretrain.proof.recorded_step import packed_rows

LENGTH, VOCAB = 24, 61
MODEL: dict[str, Any] = {
    **{"vocab_size": VOCAB, "num_layers": 2, "hidden_size": 40, "ffn_hidden_size": 44, "num_heads": 4},
    **{"num_kv_heads": 2, "head_dim": 6, "init_std": 0.2, "head": {"mtp_depth": 2, "mtp_weight": 0.7}},
}
MOE = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 12, "aux_loss_coef": 0.0, "first_layer": 1}


def model_of(**keys: Any) -> Decoder:
    config = validate(ModelConfig, MODEL | keys)
    decoder = Decoder(config)
    init_weights(decoder, seed=5)
    with torch.no_grad():  # norms that are not one, so that each of them shows
        for name, parameter in decoder.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    return decoder.eval()


def batch_of(rows: int = 4) -> Batch:
    """Packed rows of two documents and padding, with tokens whose labels are the ones that follow them."""
    (batch,) = micro_batches(packed_rows(0, rows, VOCAB, LENGTH), rows, first=0)
    follow = torch.roll(batch.tokens, -1, 1)
    inside = torch.zeros_like(batch.segments, dtype=torch.bool)
    inside[:, :-1] = (batch.segments[:, 1:] == batch.segments[:, :-1]) & (batch.segments[:, :-1] >= 0)
    mask = batch.loss_mask * inside
    return replace(batch, labels=follow * inside, loss_mask=mask, trained=mask.flatten().nonzero()[:, 0])


def loss_of(decoder: Decoder, batch: Batch, depth: int = 2) -> tuple[torch.Tensor, HeadLoss]:
    config = decoder.model_config
    batch = batch.with_ahead(depth)
    loss = HeadLoss(batch, NextToken(), 0.01, 2, config.head.mtp_weight / max(1, depth))
    total = decoder(batch.tokens, batch.positions, batch.segments, wanted=batch.trained, loss=loss)
    return total, loss


def plain_losses(decoder: Decoder, batch: Batch) -> list[torch.Tensor]:
    """Returns the summed losses of the model and of each module, document by document and token by token."""
    config, sums = decoder.model_config, [torch.zeros(()) for _ in range(1 + decoder.model_config.head.mtp_depth)]
    states: list[torch.Tensor] = []
    hook = decoder.final_norm.register_forward_hook(lambda _, __, output: states.append(output))
    for row in range(len(batch.tokens)):
        for segment in batch.segments[row].unique().tolist():
            own = (batch.segments[row] == segment).nonzero()[:, 0]
            if segment < 0:
                continue
            tokens, mask = batch.tokens[row, own], batch.loss_mask[row, own]
            positions = torch.arange(len(tokens))
            logits = decoder(tokens[None], positions[None])[0]
            sums[0] = sums[0] - sum(m * logits[i].log_softmax(-1)[tokens[i + 1]] for i, m in enumerate(mask) if m)
            h = states.pop()
            for k, layer in enumerate(config.mtp_layers, start=1):
                if len(tokens) <= k:
                    break
                block = decoder.blocks[layer.index]
                assert isinstance(block, MTPBlock)
                # h'_i = M [norm(Emb(t_{i+k})); norm(h_i)] for i = 1 .. T - k
                scale = math.sqrt(config.hidden_size) if config.scale_embedding else 1.0
                e = F.embedding(tokens[k:], decoder.embedding.weight)[:, None] * scale
                joint = torch.cat((block.embedding_norm(e), block.hidden_norm(h[: len(tokens) - k])), -1)
                joint = joint @ block.joint_proj.weight.t()
                context = ForwardContext.of(config, positions[None, : len(tokens) - k])
                h = block.output_norm(Block.forward(block, joint, context))
                logits = decoder._logits(h[:, 0])
                for i in range(len(tokens) - k - 1):  # t_{i+k+1} is predicted
                    if mask[i + k]:
                        sums[k] = sums[k] - mask[i + k] * logits[i].log_softmax(-1)[tokens[i + k + 1]]
    hook.remove()
    return sums


@pytest.mark.parametrize(
    "keys", [{}, {"tie_embeddings": True, "moe": MOE}, {"head": {**MODEL["head"], "softcap": 3.0}}]
)
def test_losses_and_gradients_are_those_of_the_paper_in_each_document_alone(keys: dict[str, Any]) -> None:
    decoder, batch = model_of(**keys), batch_of()
    total, loss = loss_of(decoder, batch)
    total.backward()
    found = {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}
    decoder.zero_grad()
    main, *modules = plain_losses(decoder, batch)
    expected = 0.01 * (main + 0.7 / 2 * sum(modules))
    expected.backward()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert loss.all_sums[-2:].tolist() == pytest.approx([float(one.detach()) for one in modules], rel=1e-5)
    assert float(loss.sums[:2].sum()) == pytest.approx(float(main.detach()), rel=1e-5)
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
        assert found[name].any(), name


def test_targets_do_not_cross_documents_or_the_end_of_a_row() -> None:
    tokens = torch.arange(1, 9)[None]
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1]])
    labels = torch.tensor([[2, 3, 0, 5, 6, 7, 70, 0]])  # the second document goes on with 70 after this row
    mask = torch.tensor([[1.0, 1, 0, 1, 1, 1, 1, 0]])
    one, two = (Ahead.of(tokens, labels, mask, segments, distance) for distance in (1, 2))
    assert one.loss_mask.tolist() == [[1, 0, 0, 1, 1, 1, 0, 0]]
    assert [one.tokens[0, i].item() for i in one.trained] == [2, 5, 6, 7]
    assert [one.labels[0, i].item() for i in one.trained] == [3, 6, 7, 70]
    assert one.valid.tolist() == [[True, True, False, True, True, True, False, False]]
    assert [(two.tokens[0, i].item(), two.labels[0, i].item()) for i in two.trained] == [(6, 7), (7, 70)]
    assert two.trained.tolist() == [3, 4]


def test_modules_change_nothing_where_they_are_not_trained() -> None:
    """Compares logits, and an evaluation's loss, which has no tokens ahead, with those of a model without modules."""
    decoder, batch = model_of(), batch_of()
    bare = Decoder(decoder.model_config.without_mtp())
    bare.load_state_dict({name: tensor for name, tensor in decoder.state_dict().items() if name in bare.state_dict()})
    rows = batch.tokens, batch.positions, batch.segments
    assert torch.equal(decoder(*rows), bare(*rows))
    (total, loss), (same, _) = loss_of(decoder, batch, depth=0), loss_of(bare, batch, depth=0)
    assert torch.equal(total, same) and not loss.modules


def test_parameters_and_operations_of_modules_are_counted() -> None:
    decoder = model_of(moe=MOE)
    config = decoder.model_config
    assert sum(parameter.numel() for parameter in decoder.parameters()) == config.num_parameters()
    assert config.num_parameters(active=True) == config.without_mtp().num_parameters(active=True)
    joint = 2 * 40 * 40 + 3 * 40
    inside = 2 * 40 * (4 + 2) * 6 + 2 * 40
    block = inside + 4 * 40 + 2 * 3 * 12 * 40
    further = flops_per_token(config, LENGTH) - flops_per_token(config.without_mtp(), LENGTH)
    assert further == 2 * (6 * (joint + block + VOCAB * 40) + 6 * 4 * 6 * LENGTH)


def test_a_run_that_left_modules_out_reads_the_rest_of_its_base() -> None:
    """Reads adapters and frozen weights on top of a base that has modules which the run does not have."""
    config = model_of().model_config
    shapes = {name: (1,) for name in parameters(config)}
    for depth in (0, 1, 2):
        head = config.head.model_copy(update={"mtp_depth": depth})
        own = plain(config.model_copy(update={"head": head}))
        found = _without_modules(shapes, {"config": {"model": own}})
        assert found.keys() == parameters(validate(ModelConfig, own)).keys()
    assert _without_modules(shapes, {}) == shapes
