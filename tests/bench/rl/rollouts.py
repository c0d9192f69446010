"""Tokens a second of sampling: Trivium's beside transformers' `generate`, with the same weights and prompts.

Both sample at temperature 1 without other filters, in fp32, from groups of equal prompts as GRPO has them, and end a
text at the same tokens. They take turns, one batch each, so that a slower moment of the machine meets both alike.
"""

import statistics
import time
from typing import Any

import torch

from configs.sampling import SamplingConfig
from pretrain.model import Decoder, init_weights
from pretrain.sampling import generate
from tests.bench.training.models import SEED, SIZES, transformers_model

BATCH, GROUP, PROMPT, LONGEST = 64, 8, 32, 128


def measured(size: str, rounds: int) -> list[dict[str, Any]]:
    """Returns a record for each side: the median tokens a second over `rounds` batches."""
    shape = SIZES[size]
    decoder = Decoder(shape.config)
    init_weights(decoder, SEED)
    decoder.eval()
    peer = transformers_model(shape.config, shape.length).eval()
    generator = torch.Generator().manual_seed(SEED)
    different = torch.randint(4, shape.config.vocab_size, (BATCH // GROUP, PROMPT), generator=generator)
    prompts = different.repeat_interleave(GROUP, 0)
    # An untrained model draws each token about as often, so these end texts after a hundred tokens on average.
    stops = list(range(4, 4 + shape.config.vocab_size // 100))

    def ours(number: int) -> int:
        keys = [f"{number}/{i}" for i in range(BATCH)]
        found = generate(decoder, prompts.tolist(), LONGEST, SamplingConfig(temperature=1.0), SEED, stops, keys)
        return sum(len(completion.tokens) for completion in found)

    @torch.inference_mode()
    def theirs(number: int) -> int:
        torch.manual_seed(number)
        out = peer.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            use_cache=True,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=LONGEST,
            eos_token_id=stops,
            pad_token_id=0,
        )
        return int((out[:, PROMPT:] != 0).sum())

    rates: dict[str, list[float]] = {"trivium": [], "transformers": []}
    for number in range(rounds + 1):
        for who, side in (("trivium", ours), ("transformers", theirs)):
            started = time.perf_counter()
            tokens = side(number)
            if number:  # the first round warms up
                rates[who].append(tokens / (time.perf_counter() - started))
    medians = {who: statistics.median(found) for who, found in rates.items()}
    ratio = medians["trivium"] / medians["transformers"]
    return [
        {"size": size, "who": who, "batch": BATCH, "group": GROUP, "tokens_per_second": rate, "ratio": ratio}
        for who, rate in medians.items()
    ]
