"""Tokens a second of sampling: Trivium's beside transformers' `generate`, with the same weights, prompts and cores.

Both sample a rollout of `TEXTS` texts, `BATCH` at a time, at temperature 1 without other filters, in fp32, from groups
of equal prompts as GRPO has them, and end a text at the same tokens. Trivium has a process on each core, as ranks of
data parallel are, and begins a text when others end; transformers has one process with a thread on each core, and a
batch goes on until its longest text ends. They take turns, one rollout each, so that a slower moment of the machine
meets both alike.
The limit of the ratio is that of a sampler which does nothing but multiply a full batch by every weight of the model,
once a token: no sampler in this precision is faster, whatever it leaves out. It is measured in the same turns.

The quick way is for a machine that others use: one process with one thread on each side, and processor time. Its ratios
say whether a change helps.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from configs.loader import validate
from configs.model import ModelConfig
from configs.sampling import SamplingConfig
from launch.processes import cores
from pretrain.generation.sampling import generate
from pretrain.model import Decoder, init_weights
from tests.bench.training.models import SEED, SIZES, transformers_model

BATCH = 64  # texts at a time
TEXTS = 256  # of a rollout
WANTED = 5.0  # times the tokens a second
PRODUCTS = "products"  # what a sampler is told instead of a rollout's number
DEMO = {"num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 352, "num_heads": 4, "num_kv_heads": 2}
MODELS: dict[str, ModelConfig] = {
    "demo": validate(ModelConfig, {"vocab_size": 4096, **DEMO}),  # 1.8M parameters
    "5M": SIZES["5M"].config,
}


@dataclass(frozen=True)
class Load:
    """Texts to sample: groups of `group` equal prompts of `prompt` tokens, up to `longest` more tokens each.

    A text ends at each token with probability `ends`.
    """

    name: str
    group: int
    prompt: int
    longest: int
    ends: float

    def stops(self, config: ModelConfig) -> list[int]:
        """Returns the tokens that end a text: an untrained model draws every token about as often."""
        return list(range(4, 4 + round(config.vocab_size * self.ends)))

    def prompts(self, config: ModelConfig) -> torch.Tensor:
        """Returns the prompts [TEXTS, prompt], none of which has a token that ends a text."""
        generator = torch.Generator().manual_seed(SEED)
        different = torch.randint(
            config.vocab_size // 2, config.vocab_size, (TEXTS // self.group, self.prompt), generator=generator
        )
        return different.repeat_interleave(self.group, 0)


LOADS = (
    Load("short answers", group=16, prompt=11, longest=6, ends=0.0),  # the demo's task, sorting
    Load("answers of 1 to 128 tokens", group=16, prompt=64, longest=128, ends=0.02),
    Load("answers of 128 tokens", group=16, prompt=64, longest=128, ends=0.0),
)


def measured(rounds: int, quick: bool) -> Iterator[dict[str, Any]]:
    """Yields a record for each model and load: both sides' median tokens a second over `rounds` rollouts."""
    for model in MODELS:
        for load in LOADS:
            yield _contest(model, load, rounds, quick)


def _contest(model: str, load: Load, rounds: int, quick: bool) -> dict[str, Any]:
    config, count = MODELS[model], 1 if quick else cores()
    torch.set_num_threads(count)
    peer = transformers_model(config, load.prompt + load.longest).eval()
    prompts, stops = load.prompts(config), load.stops(config)

    @torch.inference_mode()
    def theirs(number: int) -> tuple[int, float]:
        torch.manual_seed(number)
        started, tokens = time.process_time(), 0
        for batch in prompts.split(BATCH):
            out = peer.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                use_cache=True,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                max_new_tokens=load.longest,
                eos_token_id=stops or None,
                pad_token_id=0,
            )
            answers = out[:, load.prompt :]
            tokens += int((answers != 0).sum()) if stops else answers.numel()
        return tokens, time.process_time() - started

    rates: dict[str, list[float]] = {"trivium": [], "transformers": [], "products": []}
    with _Samplers(model, load, count) as samplers:
        sides = {"trivium": samplers.sample, "transformers": theirs, "products": samplers.multiply}
        for number in range(rounds + 1):
            for who, side in sides.items():
                started = time.perf_counter()
                tokens, used = side(number)
                if number:  # the first round warms up
                    rates[who].append(tokens / (used if quick else time.perf_counter() - started))
    ours, other, products = (statistics.median(rates[who]) for who in rates)
    return {
        "what": f"{model}, {load.name}",
        "load": asdict(load),
        "cores": count,
        "trivium": round(ours),
        "transformers": round(other),
        "ratio": round(ours / other, 2),
        "limit of the ratio": round(products / other, 2),
        "wanted": f"{WANTED:.0f} times",
        "met": ours >= WANTED * other,
    }


class _Samplers:
    """Context manager of processes, a thread each, that sample their shares of a rollout each time they are told to."""

    def __init__(self, model: str, load: Load, count: int) -> None:
        self._argv = [sys.executable, "-m", "tests.bench.rl.rollouts", model, load.name, str(count)]
        self._count = count

    def __enter__(self) -> "_Samplers":
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._processes = [
            subprocess.Popen([*self._argv, str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
            for i in range(self._count)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()  # which ends it
            process.wait()

    def sample(self, number: int) -> tuple[int, float]:
        """Samples rollout `number`; returns its tokens and the processor time that the processes took."""
        return self._ask(str(number))

    def multiply(self, number: int) -> tuple[int, float]:
        """Multiplies as often as a full batch of the longest texts needs; returns what `sample` does."""
        return self._ask(PRODUCTS)

    def _ask(self, what: str) -> tuple[int, float]:
        for process in self._processes:
            assert process.stdin is not None
            print(what, file=process.stdin, flush=True)
        answers = []
        for process in self._processes:
            assert process.stdout is not None
            answers.append(json.loads(process.stdout.readline()))
        return sum(tokens for tokens, _ in answers), sum(used for _, used in answers)


def _worker(model: str, load: Load, count: int, index: int) -> None:
    torch.set_num_threads(1)
    config = MODELS[model]
    decoder = Decoder(config)
    init_weights(decoder, SEED)
    decoder.eval()
    own, rows = slice(TEXTS * index // count, TEXTS * (index + 1) // count), BATCH // count
    prompts, stops = load.prompts(config)[own].tolist(), load.stops(config)
    products = [
        (torch.randn(rows, weight.shape[1]), weight)
        for name, weight in decoder.named_parameters()
        if weight.ndim == 2 and not name.startswith("embedding")
    ]
    for line in sys.stdin:
        started = time.process_time()
        if line.strip() == PRODUCTS:
            with torch.inference_mode():
                for _ in range(load.longest):
                    for x, weight in products:
                        torch.nn.functional.linear(x, weight)
            tokens = rows * load.longest
        else:
            keys = [f"{int(line)}/{i}" for i in range(own.start, own.stop)]
            sampling = SamplingConfig(temperature=1.0)
            found = generate(decoder, prompts, load.longest, sampling, SEED, stops, keys, max_rows=rows)
            tokens = sum(len(completion.tokens) for completion in found)
        print(json.dumps([tokens, time.process_time() - started]), flush=True)


if __name__ == "__main__":
    _worker(sys.argv[1], next(load for load in LOADS if load.name == sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
