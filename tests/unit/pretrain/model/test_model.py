"""The decoder on one rank: document masks, parameter counts, initial weights, sampling."""

import random

import pytest
import torch

from configs.model import ModelConfig
from configs.moe import MoEConfig
from configs.sampling import GREEDY, SamplingConfig
from pretrain.generation.sampling import Completion, generate
from pretrain.model import Decoder, build_single, init_weights

DENSE = ModelConfig(
    vocab_size=96, num_layers=3, hidden_size=48, ffn_hidden_size=64, num_heads=6, num_kv_heads=2, init_std=0.2
)
MOE = DENSE.model_copy(update={"moe": MoEConfig(num_experts=4, top_k=2), "tie_embeddings": True})


def model(config: ModelConfig, seed: int = 1) -> Decoder:
    decoder = Decoder(config)
    init_weights(decoder, seed)
    return decoder.eval()


@pytest.mark.parametrize("config", [DENSE, MOE])
@torch.inference_mode()
def test_documents_in_a_packed_row_do_not_see_one_another(config: ModelConfig) -> None:
    decoder = model(config)
    documents = [torch.randint(0, 96, (1, n)) for n in (5, 9, 2)]
    packed = torch.cat([*documents, torch.zeros(1, 4, dtype=torch.int64)], 1)
    segments = torch.tensor([[0] * 5 + [1] * 9 + [2] * 2 + [-1] * 4])
    positions = torch.tensor([[*range(5), *range(9), *range(2), *[0] * 4]])
    logits = decoder(packed, positions, segments)
    start = 0
    for document in documents:
        length = document.shape[1]
        alone = decoder(document, torch.arange(length)[None])
        # Another batch shape uses other kernels, so values around 1 differ by a few roundings.
        torch.testing.assert_close(logits[:, start : start + length], alone, rtol=1e-4, atol=1e-5)
        start += length
    # Without the mask, as one document, the second document's logits differ.
    merged = decoder(packed[:, :14], torch.arange(14)[None])
    assert (merged[:, 5:] - logits[:, 5:14]).abs().max() > 0.1


@pytest.mark.parametrize("config", [DENSE, MOE])
def test_recompute_keeps_less(config: ModelConfig) -> None:
    decoder = model(config).train()
    tokens, positions = torch.randint(0, 96, (2, 32)), torch.arange(32).expand(2, 32)
    kept = {}
    for recompute in ("none", "selective", "full"):
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        decoder.set_recompute(recompute)  # type: ignore[arg-type]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = decoder(tokens, positions, torch.zeros_like(tokens))
        kept[recompute] = sum(sizes.values())
        logits.sum().backward()
    assert kept["full"] < kept["selective"] < kept["none"]


@pytest.mark.parametrize("config", [DENSE, MOE])
def test_logits_at_some_positions_are_those_of_all(config: ModelConfig) -> None:
    decoder = model(config)
    tokens, positions = torch.randint(0, 96, (2, 7)), torch.arange(7).expand(2, 7)
    wanted = torch.tensor([9, 0, 13])  # row 1 position 2, row 0 position 0, row 1 position 6
    logits = decoder(tokens, positions)
    expected = torch.stack([logits[1, 2], logits[0, 0], logits[1, 6]])
    torch.testing.assert_close(decoder(tokens, positions, wanted=wanted), expected)
    nothing = decoder(tokens, positions, wanted=wanted[:0])
    assert nothing.shape == (0, 96)
    nothing.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in decoder.parameters())


@pytest.mark.parametrize("config", [DENSE, MOE, DENSE.model_copy(update={"head_dim": 10})])
def test_parameter_count_is_what_the_config_says(config: ModelConfig) -> None:
    assert sum(p.numel() for p in Decoder(config).parameters()) == config.num_parameters()


def test_llama_7b_has_its_published_count() -> None:
    config = ModelConfig(
        vocab_size=32000, num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_heads=32, num_kv_heads=32
    )
    assert config.num_parameters() == config.num_parameters(active=True) == 6_738_415_616


def test_each_parameter_and_expert_is_drawn_from_its_own_name() -> None:
    weights = dict(model(MOE).named_parameters())
    again, other = dict(model(MOE).named_parameters()), dict(model(MOE, seed=2).named_parameters())
    matrices = [name for name in weights if not name.endswith("norm.weight")]
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not any(torch.equal(weights[name], other[name]) for name in matrices)
    first, second = weights["layers.0.moe.experts.up_proj"], weights["layers.1.moe.experts.up_proj"]
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    std = MOE.init_std / (2 * MOE.num_layers) ** 0.5
    assert weights["layers.0.moe.experts.down_proj"].std().item() == pytest.approx(std, rel=0.05)


@torch.inference_mode()
def test_moe_is_the_weighted_sum_of_its_chosen_experts() -> None:
    moe = model(MOE).layers["0"].moe
    x = torch.randn(5, 2, MOE.hidden_size)
    y = moe(x)
    for s in range(5):
        for b in range(2):
            token = x[s, b]
            probs = (moe.router.weight @ token).softmax(-1)
            weights, chosen = probs.topk(2)
            expected = torch.zeros_like(token)
            for weight, e in zip(weights / weights.sum(), chosen, strict=True):
                hidden = torch.nn.functional.silu(moe.experts.gate_proj[e] @ token) * (moe.experts.up_proj[e] @ token)
                expected += weight * (moe.experts.down_proj[e] @ hidden)
            torch.testing.assert_close(y[s, b], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [DENSE, MOE])
def test_sampling_with_a_cache_is_sampling_without(config: ModelConfig) -> None:
    decoder = model(config)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]
    for sampling in (GREEDY, SamplingConfig()):
        completions = generate(decoder, prompts, 12, sampling, seed=5, keys=["a", "b", "c"])
        for prompt, key, completion in zip(prompts, "abc", completions, strict=True):
            alone = generate(decoder, [prompt], 12, sampling, seed=5, keys=[key])[0]
            assert alone.tokens == completion.tokens and not completion.stopped
            tokens = torch.tensor([prompt + completion.tokens])
            with torch.inference_mode():
                logprobs = decoder(tokens, torch.arange(tokens.shape[1])[None]).log_softmax(-1)[0]
            for i, (token, logprob) in enumerate(zip(completion.tokens, completion.logprobs, strict=True)):
                row = logprobs[len(prompt) - 1 + i]
                assert row[token].item() == pytest.approx(logprob, abs=1e-4)
                assert sampling != GREEDY or token == int(row.argmax())


def test_a_text_does_not_depend_on_the_texts_beside_it() -> None:
    decoder = model(DENSE)
    draw = random.Random(0)
    prompts: list[list[int]] = []
    for length in (1, 2, 9, 16, 17, 30):
        prompts += [[draw.randrange(90) for _ in range(length)]] * draw.choice((1, 4, 7))
    keys = [f"text {i}" for i in range(len(prompts))]

    def sample(numbers: list[int], max_rows: int = 256) -> list[Completion]:
        of = [prompts[i] for i in numbers], [keys[i] for i in numbers]
        return generate(decoder, of[0], 20, seed=3, stop_ids=range(6), keys=of[1], max_rows=max_rows)

    numbers = list(range(len(prompts)))
    whole = sample(numbers)
    assert any(c.stopped for c in whole) and len({len(c.tokens) for c in whole}) > 3  # rows are dropped on the way
    shuffled = draw.sample(numbers, len(numbers))
    for own, max_rows in ((numbers, 3), (numbers[5:9], 256), (shuffled, 8), ([numbers[-1]], 256)):
        for i, completion in zip(own, sample(own, max_rows), strict=True):
            assert completion.tokens == whole[i].tokens and completion.stopped == whole[i].stopped
            assert completion.logprobs == pytest.approx(whole[i].logprobs, abs=1e-5)


def test_sampling_follows_the_distribution_and_stops() -> None:
    decoder = model(DENSE)
    completions = generate(decoder, [[1, 2]] * 4000, 1, seed=0)
    with torch.inference_mode():
        probs = decoder(torch.tensor([[1, 2]]), torch.arange(2)[None])[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([c.tokens[0] for c in completions]), minlength=96) / 4000
    # Total variation of 4,000 draws over 96 outcomes is about sqrt(96 / (2 pi 4000)) = 0.06.
    assert 0.5 * (counts - probs).abs().sum() < 0.12
    ordered = probs.sort(descending=True)
    nucleus = set(ordered.indices[: int((ordered.values.cumsum(0) < 0.3).sum()) + 1].tolist())
    assert {c.tokens[0] for c in generate(decoder, [[1, 2]] * 500, 1, SamplingConfig(top_p=0.3), seed=1)} <= nucleus
    stop = completions[0].tokens[0]
    (stopped,) = generate(decoder, [[1, 2]], 8, seed=0, stop_ids=[stop])
    assert stopped.stopped and stopped.tokens == [stop]
    with pytest.raises(ValueError, match="no tokens"):
        generate(decoder, [[]], 3)


def test_weights_of_another_model_are_refused() -> None:
    weights = dict(model(DENSE).named_parameters())
    with pytest.raises(ValueError, match=r"missing .*embedding.weight"):
        build_single(DENSE, {k: v for k, v in weights.items() if k != "embedding.weight"})
    with pytest.raises(ValueError, match=r"final_norm.weight is \(3,\) in the weights, \(48,\) in the model"):
        build_single(DENSE, {**weights, "final_norm.weight": torch.ones(3)})
