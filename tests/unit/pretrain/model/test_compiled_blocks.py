"""Blocks are compiled as one graph each, once for all batches; test_layouts.py tests what they compute."""

from typing import Any

import pytest
import torch

from configs.adapters import AdapterConfig
from configs.loader import validate
from configs.model import ModelConfig
from pretrain.data.batch_source import collate
from pretrain.model import Decoder, LayerContext, init_weights
from pretrain.model.adapters import adapters_off, add_adapters
from pretrain.model.context import ForwardContext
from pretrain.model.decoder import Block
from pretrain.model.moe.balance import LossDenominators
from tests.parallel.matrix import MODELS
from tests.parallel.workers.layouts import rows


class Graphs:
    """A compiler that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.count += 1
        return graph.forward


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3, "dropout": 0.3},
    "dora": {"kind": "dora", "rank": 3},
    "bottleneck": {"kind": "bottleneck", "bottleneck_size": 5},
    "p_tuning_v2": {"kind": "p_tuning_v2", "virtual_tokens": 3},
}


@pytest.mark.parametrize(
    "kind", [*(pytest.param(name, marks=pytest.mark.full) for name in ADAPTERS if name != "dora"), "dora"]
)
def test_a_block_with_an_adapter_computes_compiled_what_it_does_otherwise(kind: str) -> None:
    """Compares a compiled block with an adapter, its gradients, and what the base computes with adapters off."""
    torch._dynamo.reset()
    config, context = validate(ModelConfig, MODELS["dense"]), LayerContext()
    decoder = Decoder(config, context=context).train()
    add_adapters(decoder, validate(AdapterConfig, ADAPTERS[kind]), context, std=0.1)
    init_weights(decoder, 0)
    block, compiler = decoder.blocks[0], Graphs()
    batch = collate(rows(0, 2, config.vocab_size), 0)
    context_of_block = ForwardContext.of_batch(config, batch, virtual=decoder.virtual)

    def found() -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        block.zero_grad()
        output = step(block, context_of_block)
        gradients = {name: p.grad for name, p in block.named_parameters() if ".adapter." in f".{name}"}
        with adapters_off([decoder]):
            return output, step(block, ForwardContext.of_batch(config, batch)), gradients

    expected = found()
    assert not torch.equal(expected[0], expected[1]) and all(p is not None for p in expected[2].values())
    vars(block)["forward"] = torch.compile(block.forward, backend=compiler)
    torch.testing.assert_close(found(), expected)
    assert compiler.count >= 1


def block_and_context(model: str, first_sample: int, dropout: float) -> tuple[Block, ForwardContext]:
    config = validate(ModelConfig, MODELS[model])
    decoder = Decoder(config, context=LayerContext(dropout=dropout)).train()
    init_weights(decoder, 0)
    block = decoder.blocks[0]
    if block.is_moe:
        block.moe.balance.denominators = LossDenominators(sequences=2, tokens=64, scale=1.0)
    return block, context_of(config, first_sample)


def context_of(config: ModelConfig, first_sample: int) -> ForwardContext:
    return ForwardContext.of_batch(config, collate(rows(first_sample, 2, config.vocab_size), first_sample))


def step(block: Block, context: ForwardContext) -> torch.Tensor:
    length, batch = context.positions_SB.shape
    x = torch.randn(
        length, batch, block.config.hidden_size, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    y = block(x, context)
    y.sum().backward()
    return y.detach()


@pytest.mark.parametrize(
    "model",
    [*(pytest.param(name, marks=pytest.mark.full) for name in ("dense", "moe", "capacity", "delta")), "deepseek"],
)
def test_a_block_is_one_graph_whatever_the_batch(model: str) -> None:
    """Counts graphs over batches that differ in samples, documents and counts of experts.

    The second batch may compile once more, for any number of documents.
    """
    torch._dynamo.reset()
    compiler = Graphs()
    block, context = block_and_context(model, 0, dropout=0.2)
    expected = step(block, context)
    block.compile(backend=compiler)
    torch.testing.assert_close(step(block, context), expected)
    assert compiler.count == 1
    seen, built = [expected], []
    for first_sample in (2, 4, 6, 8):
        seen.append(step(block, context_of(validate(ModelConfig, MODELS[model]), first_sample)))
        built.append(compiler.count)
    assert built[0] == built[-1], f"compiled again for other batches: {built}"
    assert all(not torch.equal(one, seen[0]) for one in seen[1:])


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_layers_share_compiled_code(model: str) -> None:
    """Compiles a model with more layers than torch.compile makes variants of one function."""
    torch._dynamo.reset()
    config, compiler = validate(ModelConfig, {**MODELS[model], "num_layers": 4}), Graphs()
    decoder, context = Decoder(config, context=LayerContext()).eval(), context_of(config, 0)
    init_weights(decoder, 0)
    built = []
    for index, block in decoder.blocks.items():
        block.compile(backend=compiler)
        step(block, context.of_layer(index))
        built.append(compiler.count)
    assert built == [1] * 4, f"compiled again for other layers: {built}"
