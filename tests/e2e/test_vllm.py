"""vLLM as the sampler of GRPO: its log-probabilities, the weights that it takes, and runs that are killed.

`TRIVIUM_VLLM_PYTHON` names the Python that has vLLM; docs/reinforcement.md says how to make one. vLLM's attention on a
processor takes heads of 32 elements or more.
"""

import os
import signal
from collections.abc import Iterator, Sequence
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
from tests.e2e.posttrain_configs import write_base
from tests.e2e.started_commands import CLI, Command, wait_for_step
from tests.parallel.harness import RankError, RanksOf
from tests.parallel.runs import metrics

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
PROMPTS = [[1 + i % 7] * (3 + i % 5) + [9, 11] for i in range(24)]
KEYS = [f"rollout/{i}" for i in range(len(PROMPTS))]
STOP = [5, 6, 7]


def written(sampler: Any, temperature: float, seed: int = 0) -> list[Completion]:
    found: list[Completion] = sampler.continued(PROMPTS, 20, SamplingConfig(temperature=temperature), seed, STOP, KEYS)
    return found


def difference(decoder: Decoder, completions: Sequence[Completion], temperature: float) -> float:
    """Returns the largest difference between log-probabilities of completions and the decoder's own."""
    most = 0.0
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        tokens = torch.tensor([prompt + completion.tokens])
        with torch.no_grad():
            logits = decoder(tokens, torch.arange(tokens.shape[1])[None])[0, len(prompt) - 1 : -1] / temperature
        own = logits.log_softmax(-1).gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        most = max(most, float((own - torch.tensor(completion.logprobs)).abs().max()))
    return most


@pytest.mark.parametrize("kind", list(MODELS))
def test_it_samples_with_the_weights_that_it_was_given(kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = WIDTH | MODELS[kind]
    decoder = Decoder(
        ModelConfig(
            vocab_size=300, num_layers=2, ffn_hidden_size=128, num_heads=4, num_kv_heads=2, init_std=0.2, **options
        )
    ).eval()
    init_weights(decoder, seed=1)
    sampler = VLLMSampler(VLLMConfig(python=PYTHON, cache_gb=0.2), decoder.model_config, None, 64, tmp_path)
    try:
        sampler.take(decoder, MAIN)
        first = written(sampler, 0.7)
        assert difference(decoder, first, 0.7) < 3e-5  # logits of about 10 in fp32
        assert difference(decoder, first, 1.0) > 0.1
        assert written(sampler, 0.7) == first != written(sampler, 0.7, seed=1)
        assert 0 < sum(text.stopped for text in first) < len(first)
        assert all(
            text.stopped == (text.tokens[-1] in STOP) and (text.stopped or len(text.tokens) == 20) for text in first
        )
        greedy = [text.tokens for text in written(sampler, 0.0)]
        assert greedy == [text.tokens for text in written(DecoderSampler(decoder), 0.0)]
        for _ in range(2):
            with torch.no_grad():
                for parameter in decoder.parameters():
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
            assert difference(decoder, written(sampler, 0.7), 0.7) > 0.1  # the weights before
            sampler.take(decoder, MAIN)
            assert difference(decoder, written(sampler, 0.7), 0.7) < 3e-5
    finally:
        sampler.close()


@pytest.fixture(scope="module")
def base(ranks: RanksOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a model that can sort a little, and configs that sample by vLLM."""
    base = write_base(ranks, tmp_path_factory.mktemp("vllm"), **WIDTH)
    ranks(2).run(
        "posttrain.sft:main", process_group=False, timeout=300, argv=[str(base / "sft.toml"), "train.steps=50"]
    )
    return base


def arguments(base: Path, run: Path, *more: str) -> list[str]:
    options = [f"run.dir={run}", "rl.sampler=vllm", f"rl.vllm.python={PYTHON}", "rl.vllm.cache_gb=0.2"]
    return [str(base / "grpo.toml"), *options, "grpo.max_logprob_difference=1e-4", "optimizer.lr=1e-3", *more]


def grpo(ranks: RanksOf, world: int, base: Path, run: Path, *more: str) -> list[dict[str, Any]]:
    argv = arguments(base, run, *more)
    assert set(ranks(world).run("posttrain.grpo:main", process_group=False, timeout=600, argv=argv)) == {0}
    return [line for line in metrics(run) if "loss" in line]


@pytest.fixture(scope="module")
def straight(ranks: RanksOf, base: Path) -> list[dict[str, Any]]:
    """Steps of a run of one rank."""
    return grpo(ranks, 1, base, base / "straight", "train.steps=4")


def test_every_rollout_is_of_the_present_weights(straight: list[dict[str, Any]]) -> None:
    assert len(straight) == 4 and all(line["logprob_difference"] < 1e-5 for line in straight)
    assert all(line["grad_norm"] > 0 for line in straight) and len({line["reward"] for line in straight}) > 1


def test_ranks_of_other_layouts_sample_the_same_texts(
    ranks: RanksOf, base: Path, straight: list[dict[str, Any]], tmp_path: Path
) -> None:
    (first,) = grpo(ranks, 2, base, tmp_path, "train.steps=1", "parallel.tp=2")
    assert first["reward"] == straight[0]["reward"] and first["completion_tokens"] == straight[0]["completion_tokens"]
    assert first["logprob_difference"] < 1e-5


def test_weights_that_it_does_not_take_end_the_run(ranks: RanksOf, base: Path, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"before a rollout's first update, log-probabilities .* differ by"):
        ranks(1).run(
            "tests.parallel.workers.posttraining:grpo_with_old_weights",
            process_group=False,
            timeout=600,
            argv=arguments(base, tmp_path / "run", "train.steps=4"),
        )


@pytest.fixture
def command(base: Path, tmp_path: Path) -> Iterator[Any]:
    """Starter of GRPO with vLLM as a command, all of whose processes are ended afterwards."""
    started: list[Command] = []

    def start(*more: str) -> Command:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        argv = arguments(base, tmp_path / "run", "train.steps=4", "checkpoint.every=1", *more)
        started.append(Command(folder, [*CLI, "grpo", *argv]))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        assert not one.survivors()


def test_runs_go_on_after_either_process_was_killed(
    command: Any, straight: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = command()
    wait_for_step(first, run, 1)
    first.process.send_signal(signal.SIGKILL)
    assert not first.survivors()

    second = command()
    wait_for_step(second, run, 2)
    (child,) = [pid for pid, line in second._processes() if "vllm_child.py" in line]
    os.kill(child, signal.SIGKILL)
    assert second.process.wait(300) != 0 and "and ended its process; see the end of" in second.said()
    assert not second.survivors()

    assert command().process.wait(600) == 0
    steps = {line["step"]: line for line in metrics(run) if "loss" in line}
    assert [steps[step]["reward"] for step in (1, 2, 3, 4)] == [line["reward"] for line in straight]
