"""Gated delta nets: chunks against the recurrence, documents of packed rows against rows of their own, the cache."""

import math
from typing import Any

import pytest
import torch

from configs.loader import ConfigError, validate
from configs.model import ModelConfig
from configs.sampling import GREEDY, SamplingConfig
from pretrain.generation.sampling import generate
from pretrain.model import Decoder, LayerContext, init_weights
from pretrain.model.delta_net import GatedDeltaNet
from pretrain.model.delta_rule import CHUNK, RuleInputs, by_chunks, convolved, step
from tests.parallel.part_models import PART_MODELS

DELTA = PART_MODELS["delta"]


def random_inputs(length: int, rows: int = 2) -> RuleInputs:
    """Returns random inputs in fp64 of 3 key heads, two value heads for each; some tokens forget nearly everything."""
    generator = torch.Generator().manual_seed(length)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(length, rows, 3, *shape, generator=generator, dtype=torch.float64)

    return RuleInputs(drawn(5), drawn(5), drawn(2, 7), -drawn(2).exp() * 2, drawn(2).sigmoid())


def one_by_one(inputs: RuleInputs, documents_TB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the delta rule token by token, with an empty state at the first token of each document."""
    state, outputs = torch.zeros(inputs.v.shape[1], 3, 2, 5, 7, dtype=torch.float64), []
    for t in range(len(inputs.v)):
        if t:
            state = state * (documents_TB[t] == documents_TB[t - 1])[:, None, None, None, None]
        output, state = step(RuleInputs(*(x[t : t + 1] for x in vars(inputs).values())), state)
        outputs.append(output)
    return torch.cat(outputs), state


def test_a_token_moves_what_the_state_has_at_its_key_to_its_value() -> None:
    """Equation 10 of the paper, written out with the matrix I - β k kᵀ."""
    inputs, state = random_inputs(1, rows=1), torch.randn(1, 3, 2, 5, 7, dtype=torch.float64)
    outputs, after = step(inputs, state)
    for head in range(3):
        q, k = (x[0, 0, head] / x[0, 0, head].norm() for x in (inputs.q, inputs.k))
        for i in range(2):
            alpha, beta = inputs.log_decay[0, 0, head, i].exp(), inputs.beta[0, 0, head, i]
            kept = alpha * (torch.eye(5, dtype=torch.float64) - beta * torch.outer(k, k)) @ state[0, head, i]
            expected = kept + beta * torch.outer(k, inputs.v[0, 0, head, i])
            torch.testing.assert_close(after[0, head, i], expected, atol=1e-5, rtol=1e-5)  # lengths have an epsilon
            torch.testing.assert_close(outputs[0, 0, head, i], expected.T @ q / math.sqrt(5), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, CHUNK, 2 * CHUNK + 23])
def test_chunks_compute_what_the_recurrence_does(length: int) -> None:
    """Documents end within chunks, at their ends, and after one token; outputs, last state and gradients are equal."""
    inputs, documents = random_inputs(length), torch.zeros(length, 2, dtype=torch.long)
    for number, start in enumerate((37, CHUNK, 100, 101), 1):
        documents[start:, 0] = number
    leaves = [x.requires_grad_() for x in vars(inputs).values()]
    for own in (documents, None):
        expected = one_by_one(inputs, torch.zeros_like(documents) if own is None else own)
        found = by_chunks(inputs, own)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
        factors = [torch.randn_like(x) for x in expected]
        for count in (1, 2):  # training has no gradient of the last state
            one, other = (
                torch.autograd.grad(x[:count], leaves, factors[:count], retain_graph=True) for x in (found, expected)
            )
            torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)


def test_compiled_code_does_not_grow_with_the_row() -> None:
    """Counts operations of compiled graphs: a loop that is written out takes a compiler minutes for long rows."""
    sizes = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    for chunks in (2, 9):
        torch._dynamo.reset()
        inputs = random_inputs(chunks * CHUNK)
        found = torch.compile(by_chunks, backend=compiler, dynamic=False)(inputs)
        torch.testing.assert_close(found, by_chunks(inputs))
    assert len(sizes) == 2 and sizes[0] == sizes[1]


def test_gradients_of_chunks_are_finite_where_everything_is_forgotten() -> None:
    inputs = random_inputs(CHUNK + 3)
    inputs = RuleInputs(inputs.q, inputs.k, inputs.v, (inputs.log_decay * 1e4).requires_grad_(), inputs.beta)
    by_chunks(inputs)[0].sum().backward()
    assert inputs.log_decay.grad is not None and inputs.log_decay.grad.isfinite().all()


def test_the_convolution_sees_its_own_document_alone() -> None:
    x, weight = torch.randn(9, 2, 1, 3), torch.randn(1, 3, 4)
    documents = torch.tensor([[0] * 9, [0, 0, 0, 1, 2, 2, 2, 2, 2]]).t()
    found = convolved(x, weight, documents)
    for row, (start, end) in ((0, (0, 9)), (1, (0, 3)), (1, (3, 4)), (1, (4, 9))):
        own = x[start:end, row, 0].t()[None]
        expected = torch.nn.functional.conv1d(own, weight[0, :, None], padding=3, groups=3)[0, :, : end - start].t()
        torch.testing.assert_close(found[start:end, row, 0], expected)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    config = validate(ModelConfig, DELTA)
    decoder = Decoder(config).eval()
    init_weights(decoder, 0)
    return decoder


TOKENS = torch.randint(0, 61, (2, 90), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_documents_of_a_row_are_computed_as_rows_of_their_own(decoder: Decoder) -> None:
    """fp32 rounds at 6e-8, and chunks begin elsewhere, so that sums are taken in another order."""
    segments, positions = torch.zeros(2, 90, dtype=torch.long), torch.arange(90).repeat(2, 1)
    spans = ((0, 0, 33), (0, 33, 70), (0, 70, 90), (1, 0, 85))
    for number, (row, start, end) in enumerate(spans):
        segments[row, start:end], positions[row, start:end] = number, torch.arange(end - start)
    segments[1, 85:] = -1
    packed = decoder(TOKENS, positions, segments)
    for row, start, end in spans:
        alone = decoder(TOKENS[row : row + 1, start:end], torch.arange(end - start)[None])
        torch.testing.assert_close(packed[row, start:end], alone[0], atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(temperature=1.0)], ids=["greedy", "sampled"])
def test_generation_has_the_log_probabilities_of_a_forward_pass(decoder: Decoder, sampling: SamplingConfig) -> None:
    """Prompts of unequal lengths, fewer rows than texts, so that rows of the cache are moved and filled again."""
    prompts = [[7, 3, 9, 11, 5], [2], list(range(20, 43)), [1, 2, 3] * 25, [4, 4]]
    limits = [30, 9, 3, 12, 30]
    texts = generate(decoder, prompts, limits, sampling, seed=5, max_rows=2)
    for prompt, text in zip(prompts, texts, strict=True):
        whole = torch.tensor([prompt + text.tokens])
        with torch.no_grad():
            logprobs = decoder(whole, torch.arange(whole.shape[1])[None])[0].log_softmax(-1)[len(prompt) - 1 : -1]
        if sampling == GREEDY:
            assert logprobs.argmax(-1).tolist() == text.tokens
        own = logprobs.gather(1, torch.tensor(text.tokens)[:, None])[:, 0]
        torch.testing.assert_close(own.double(), torch.tensor(text.logprobs, dtype=torch.float64), atol=1e-5, rtol=0)


def test_a_cache_has_keys_and_values_of_layers_with_attention_alone(decoder: Decoder) -> None:
    assert decoder.new_cache(3, 64).store.shape == (1, 2, 3, 2, 64, 6)


def test_first_rates_of_decay_are_drawn_evenly() -> None:
    delta = {"num_key_heads": 500, "num_value_heads": 4000, "key_head_dim": 1, "value_head_dim": 1}
    sizes = {"vocab_size": 8, "num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_heads": 1}
    decoder = Decoder(validate(ModelConfig, {**sizes, "num_kv_heads": 1, "attention": {"delta": delta}}))
    init_weights(decoder, 0)
    net = decoder.blocks[0].attention
    assert isinstance(net, GatedDeltaNet)
    rates = net.log_rates.detach().exp()
    assert 0.01 <= rates.min() < 0.05 and 15.9 < rates.max() <= 16.0001 and abs(rates.mean() - 8) < 0.3
    assert torch.equal(net.decay_bias.detach(), torch.ones(4000))


@torch.no_grad()
def test_bf16_keeps_decay_and_state_in_fp32() -> None:
    config = validate(ModelConfig, DELTA | {"moe": None})  # tokens would choose other experts
    decoder = Decoder(config, context=LayerContext(dtype=torch.bfloat16)).eval()
    init_weights(decoder, 0)
    states = decoder.new_cache(1, 16).delta_states(0)
    assert states.state.dtype == torch.float32 and states.inputs.dtype == torch.bfloat16
    exact = Decoder(config).eval()
    exact.load_state_dict(decoder.state_dict())
    one, other = (model(TOKENS, torch.arange(90).expand(2, -1)).float() for model in (decoder, exact))
    assert (one - other).norm() < 0.05 * other.norm()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_value_heads": 6}, "num_value_heads = 6 is not a multiple of num_key_heads = 4.*num_value_heads=8"),
        ({"kernel_size": 1}, "attention.delta.kernel_size = 1: input should be greater than or equal to 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], said: str) -> None:
    attention = DELTA["attention"]
    with pytest.raises(ConfigError, match=said):
        validate(ModelConfig, DELTA | {"attention": attention | {"delta": attention["delta"] | changes}})
