"""Autoregressive sampling with a key-value cache, on one rank that holds the whole model.

Each prompt has its own random generator, seeded by (seed, its index or the given key), so that samples do not depend on
how prompts are batched. Beam search and serving are left out.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pretrain.model.decoder import Decoder


@dataclass
class Completion:
    """Sampled continuation of a prompt: its tokens and the log-probability of each.

    `stopped` is whether a stop token came, which is then the last of `tokens`.
    """

    tokens: list[int]
    logprobs: list[float]
    stopped: bool


@torch.inference_mode()
def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    top_p: float = 1.0,
    keys: Sequence[str] | None = None,
    pad_id: int = 0,
) -> list[Completion]:
    """Samples a continuation of every prompt; temperature 0 takes the most probable token.

    Log-probabilities are those after the temperature and before `top_p` is applied. Raises ValueError if a prompt is
    empty.
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt has no tokens; give at least the beginning-of-text token")
    device = next(decoder.parameters()).device
    batch, longest = len(prompts), max(map(len, prompts))
    tokens = torch.full((batch, longest), pad_id)
    segments = torch.full((batch, longest), -1)
    for row, prompt in enumerate(prompts):  # left padding: all rows get their next token at the same index
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        segments[row, longest - len(prompt) :] = 0
    positions = (torch.arange(longest) - (segments < 0).sum(1, keepdim=True)).clamp(min=0)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    uniforms = torch.stack(
        [_uniforms(seed, keys[row] if keys else str(row), max_new_tokens) for row in range(batch)]
    ).to(device)
    stops = torch.tensor(list(stop_ids), device=device)

    cache = decoder.new_cache(batch, longest + max_new_tokens)
    last = torch.arange(1, batch + 1, device=device) * longest - 1
    logits = decoder(tokens.to(device), positions.to(device), segments.to(device), cache, last)
    drawn, logprobs = [], []
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        token, logprob = _draw(logits.float(), temperature, top_p, uniforms[:, step])
        drawn.append(token)
        logprobs.append(logprob)
        done |= torch.isin(token, stops)
        if done.all() or step + 1 == max_new_tokens:
            break
        logits = decoder(token[:, None], (lengths + step)[:, None], None, cache)[:, -1]
    return _cut(torch.stack(drawn, 1).tolist(), torch.stack(logprobs, 1).tolist(), set(stop_ids))


def _uniforms(seed: int, key: str, count: int) -> torch.Tensor:
    """Draws `count` numbers from [0, 1) in fp64, a function of seed and key."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def _draw(
    logits_BV: torch.Tensor, temperature: float, top_p: float, uniform_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one token per row by inverting its cumulative distribution at `uniform_B`.

    Returns the tokens [B] and their log-probabilities [B].
    """
    if temperature == 0:
        token = logits_BV.argmax(-1)
        return token, logits_BV.log_softmax(-1).gather(1, token[:, None])[:, 0]
    logprobs_BV = (logits_BV / temperature).log_softmax(-1)
    probs_BV = logprobs_BV.double().exp()
    if top_p < 1.0:
        ordered, index = probs_BV.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the first token past the threshold stays
        probs_BV = probs_BV.masked_fill(torch.zeros_like(beyond).scatter(1, index, beyond), 0.0)
    cumulative = probs_BV.cumsum(-1)
    point = uniform_B[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, point, right=True).clamp(max=logits_BV.shape[1] - 1)
    return token[:, 0], logprobs_BV.gather(1, token)[:, 0]


def _cut(tokens: list[list[int]], logprobs: list[list[float]], stops: set[int]) -> list[Completion]:
    """Ends each row after its first stop token."""
    completions = []
    for row_tokens, row_logprobs in zip(tokens, logprobs, strict=True):
        end = next((i + 1 for i, token in enumerate(row_tokens) if token in stops), None)
        completions.append(Completion(row_tokens[:end], row_logprobs[:end], end is not None))
    return completions
