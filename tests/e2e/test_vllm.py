"""vLLM as a sampler: its log-probabilities, its draws, and the weights that it takes.

`TRIVIUM_VLLM_PYTHON` names the Python that has vLLM; docs/reinforcement.md says how to make one. vLLM's attention on a
processor takes heads of 32 elements or more.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.model import ModelConfig
from configs.model_parts import AttentionConfig
from configs.rl import VLLMConfig
from configs.sampling import SamplingConfig
from posttrain.rl.text_sampler import DecoderSampler
from posttrain.rl.vllm_sampler import VLLMSampler
from pretrain.generation.sampling import Completion
from pretrain.model import Decoder
from pretrain.model.initial_weights import init_weights

PYTHON = os.environ.get("TRIVIUM_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not PYTHON, reason="TRIVIUM_VLLM_PYTHON names no Python that has vLLM"),
]
MAIN: Any = SimpleNamespace(rank=0, is_main=True)  # the facts of a mesh that the sampler asks for
WIDTH = {"hidden_size": 128, "head_dim": 32}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_embeddings": False},
    "qwen3": {"tie_embeddings": True, "attention": AttentionConfig(qk_norm="head")},
}
ROUNDING = {  # in the worst of 480 tokens, whose logits are up to 30; other weights give 10 and more
    torch.float32: 1e-4,
    torch.bfloat16: 1.0,  # measured are 0.1 to 0.4, and 0.2 between Trivium's own sampler and trainer
}
PROMPTS = [[1 + i % 7] * (3 + i % 5) + [9, 11] for i in range(24)]
KEYS = [f"rollout/{i}" for i in range(len(PROMPTS))]


def written(sampler: Any, temperature: float, seed: int = 0, stop: Sequence[int] = ()) -> list[Completion]:
    found: list[Completion] = sampler.continued(PROMPTS, 20, SamplingConfig(temperature=temperature), seed, stop, KEYS)
    return found


def difference(decoder: Decoder, completions: Sequence[Completion], temperature: float) -> float:
    """Returns the largest difference between log-probabilities of completions and the decoder's own."""
    most = 0.0
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        tokens = torch.tensor([prompt + completion.tokens])
        with torch.no_grad():
            logits = decoder(tokens, torch.arange(tokens.shape[1])[None])[0, len(prompt) - 1 : -1].float() / temperature
        own = logits.log_softmax(-1).gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        most = max(most, float((own - torch.tensor(completion.logprobs)).abs().max()))
    return most


@pytest.mark.parametrize("precision", list(ROUNDING), ids=str)
@pytest.mark.parametrize("kind", list(MODELS))
def test_it_samples_with_the_weights_that_it_was_given(kind: str, precision: torch.dtype, tmp_path: Path) -> None:
    options: dict[str, Any] = WIDTH | MODELS[kind]
    decoder = Decoder(
        ModelConfig(
            vocab_size=300, num_layers=2, ffn_hidden_size=128, num_heads=4, num_kv_heads=2, init_std=0.2, **options
        )
    ).eval()
    init_weights(decoder, seed=1)
    decoder.to(precision)
    sampler = VLLMSampler(VLLMConfig(python=PYTHON, cache_gb=0.2), decoder.model_config, None, 64, tmp_path)
    try:
        sampler.take(decoder, MAIN)
        first = written(sampler, 0.7)
        assert difference(decoder, first, 0.7) < ROUNDING[precision]
        assert difference(decoder, first, 1.0) > ROUNDING[precision]
        assert written(sampler, 0.7) == first != written(sampler, 0.7, seed=1)
        assert all(len(text.tokens) == 20 and not text.stopped for text in first)
        end = first[0].tokens[10]
        cut, length = written(sampler, 0.7, stop=[end])[0], first[0].tokens.index(end) + 1
        assert cut.stopped and cut.tokens == first[0].tokens[:length]
        greedy = [text.tokens for text in written(sampler, 0.0)]
        own = [text.tokens for text in written(DecoderSampler(decoder), 0.0)]
        assert greedy == own or precision != torch.float32  # rounding in bf16 is larger than some tokens are apart
        for _ in range(2):
            with torch.no_grad():
                for parameter in decoder.parameters():
                    noise = 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
                    parameter.add_(noise.to(precision))
            assert difference(decoder, written(sampler, 0.7), 0.7) > ROUNDING[precision]  # the weights before
            sampler.take(decoder, MAIN)
            assert difference(decoder, written(sampler, 0.7), 0.7) < ROUNDING[precision]
    finally:
        sampler.close()
