"""vLLM as the sampler of whole runs: in every layout it is given the weights that the trainer has just updated.

`TRIVIUM_VLLM_PYTHON` names the Python that has vLLM; docs/reinforcement.md says how to make one.
"""

import os
from pathlib import Path
from typing import Any

import pytest

from configs.loader import toml
from tests.e2e.posttrain_configs import grpo_config, write_base
from tests.parallel.harness import RanksOf
from tests.parallel.runs import metrics

PYTHON = os.environ.get("TRIVIUM_VLLM_PYTHON", "")
VLLM = {"python": PYTHON, "cache_gb": 0.2}
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not PYTHON, reason="TRIVIUM_VLLM_PYTHON names no Python that has vLLM"),
]


@pytest.fixture(scope="module")
def base(ranks: RanksOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a model that sorts digits at times, with heads as wide as vLLM wants them on a processor."""
    base = write_base(ranks, tmp_path_factory.mktemp("vllm"), hidden_size=128, head_dim=32)
    argv = [str(base / "sft.toml"), "train.steps=50"]
    assert set(ranks(2).run("posttrain.sft:main", process_group=False, timeout=300, argv=argv)) == {0}
    return base


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(run) if "loss" in line]


@pytest.mark.parametrize(
    ("world", "layout"), [(1, "tp=1"), (2, "tp=1"), (2, "tp=2"), (2, "pp=2"), (2, "cp=2"), (2, "zero=3")]
)
def test_every_rollout_is_of_the_present_weights(
    ranks: RanksOf, base: Path, tmp_path: Path, world: int, layout: str
) -> None:
    sampler = ["rl.sampler=vllm", *(f"rl.vllm.{name}={value}" for name, value in VLLM.items())]
    own = [f"run.dir={tmp_path}", f"parallel.{layout}", "train.steps=3", "optimizer.lr=1e-3"]
    argv = [str(base / "grpo.toml"), *own, *sampler, "grpo.max_logprob_difference=1e-4"]
    assert set(ranks(world).run("posttrain.grpo:main", process_group=False, timeout=600, argv=argv)) == {0}
    steps = steps_of(tmp_path)
    # The weights before an update differ from it by 1e-4 and more; rounding in fp32 by 1e-6.
    assert len(steps) == 3 and all(line["logprob_difference"] < 1e-5 for line in steps)
    assert all(line["grad_norm"] > 0 for line in steps)


def test_in_bf16_it_differs_no_more_than_the_own_sampler_does(ranks: RanksOf, base: Path, tmp_path: Path) -> None:
    """Compares a run's differences with those of the same run with Trivium's own sampler, in bf16 as well."""
    sampler = ["rl.sampler=vllm", *(f"rl.vllm.{name}={value}" for name, value in VLLM.items())]
    found = {}
    for name, options in (("vllm", sampler), ("whole", [])):
        own = [f"run.dir={tmp_path}/{name}", "train.steps=3", "optimizer.lr=1e-3", "train.precision=bf16"]
        argv = [str(base / "grpo.toml"), *own, *options, "grpo.max_logprob_difference=0.05"]
        assert set(ranks(1).run("posttrain.grpo:main", process_group=False, timeout=600, argv=argv)) == {0}
        found[name] = [line["logprob_difference"] for line in steps_of(tmp_path / name)]
    assert len(found["vllm"]) == 3 and max(found["vllm"]) < 5 * max(found["whole"]), found  # measured: 1.6 times


def test_ppo_samples_with_the_present_weights(ranks: RanksOf, base: Path, tmp_path: Path) -> None:
    tree = {name: section for name, section in grpo_config(base).items() if name != "grpo"}
    (tmp_path / "ppo.toml").write_bytes(toml(tree | {"rl": {"epochs": 2, "sampler": "vllm", "vllm": VLLM}}))
    own = [f"run.dir={tmp_path}/run", "train.steps=5", "optimizer.lr=1e-3", "ppo.max_logprob_difference=1e-4"]
    argv = [str(tmp_path / "ppo.toml"), *own]
    assert set(ranks(1).run("posttrain.ppo:main", process_group=False, timeout=600, argv=argv)) == {0}
    steps = steps_of(tmp_path / "run")
    assert len(steps) == 5 and all(line["logprob_difference"] < 1e-5 for line in steps)
