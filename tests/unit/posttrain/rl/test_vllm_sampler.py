"""vLLM as a sampler, as far as a Python without vLLM shows it: refusals, the weights' folder, and a process that fails.

What vLLM itself answers is in tests/e2e/test_vllm.py.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.adapters import AdapterConfig
from configs.loader import ConfigError, Failure
from configs.moe import MoEConfig
from configs.rl import RLSection, VLLMConfig
from export.hf_folder import open_hf_folder
from posttrain.rl.logprob_check import LogprobCheck
from posttrain.rl.vllm_sampler import CHILD, MEMORY, VLLMSampler, check_vllm, seed_of
from posttrain.rl.vllm_weights import FolderWriter
from pretrain.model import Decoder
from tests.tiny_models import wide_decoder

MAIN: Any = SimpleNamespace(rank=0, is_main=True)  # the facts of a mesh that the sampler asks for
MOE = MoEConfig(num_experts=8, top_k=2, ffn_hidden_size=24, bias_update_rate=0.01)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return wide_decoder(64)


def program(path: Path, text: str) -> str:
    """Writes a program that takes a Python's place: it says that it has vLLM, and then does what `text` says."""
    path.write_text(f'#!/bin/sh\n[ "$2" = -c ] && exit 0\n{text}\n')
    path.chmod(0o755)
    return str(path)


def test_a_python_that_cannot_sample_is_refused(decoder: Decoder, tmp_path: Path) -> None:
    model = decoder.model_config
    for python, words in (
        (sys.executable, f"rl.vllm.python = '{sys.executable}' does not have the package vllm; name"),
        (None, f"rl.vllm.python is left out, and {sys.executable} does not have the package vllm; name the Python"),
        ("/none", "rl.vllm.python = '/none' cannot be run as a Python (.*No such file.*); .* or set rl.sampler=whole"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_vllm(RLSection(sampler="vllm", vllm=VLLMConfig(python=python)), model, None)
    named = VLLMConfig(python=program(tmp_path / "python", ""))
    check_vllm(RLSection(sampler="vllm", vllm=named), model, None)


@pytest.mark.parametrize(
    ("model", "adapter", "words"),
    [
        ({"moe": MOE}, None, "is tested with dense models, and this one is a mixture of experts"),
        ({}, AdapterConfig(), "and the config has .adapter.; set rl.sampler=whole"),
    ],
)
def test_models_that_it_cannot_take_are_refused(
    decoder: Decoder, model: dict[str, Any], adapter: AdapterConfig | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_vllm(RLSection(sampler="vllm"), decoder.model_config.model_copy(update=model), adapter)


def test_a_model_without_a_class_of_transformers_is_refused(decoder: Decoder, tmp_path: Path) -> None:
    odd = decoder.model_config.head.model_copy(update={"normalized": True})
    with pytest.raises(
        ConfigError, match=r"rl.sampler = 'vllm' samples with an exported model, and .*rl.sampler=whole"
    ):
        VLLMSampler(VLLMConfig(), decoder.model_config.model_copy(update={"head": odd}), None, 32, tmp_path)


@pytest.mark.parametrize("is_tied", [False, True])
def test_its_folder_holds_the_weights(decoder: Decoder, is_tied: bool, tmp_path: Path) -> None:
    model = decoder.model_config.model_copy(update={"tie_embeddings": is_tied})
    weights = dict(decoder.named_global_parameters())
    head = weights.pop("lm_head.weight") if is_tied else weights["lm_head.weight"]
    FolderWriter(model, None, 32).write(lambda name: weights[name].detach(), tmp_path)
    found = dict(open_hf_folder(tmp_path).converted())
    expected = weights | {"lm_head.weight": weights["embedding.weight"] if is_tied else head}  # always one of its own
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture
def sampler(decoder: Decoder, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[VLLMSampler]:
    """Sampler whose Python is a shell script with the test's parameter as its text."""
    python = program(tmp_path / "python", request.param)
    sampler = VLLMSampler(VLLMConfig(python=python, seconds=20), decoder.model_config, None, 32, tmp_path)
    yield sampler
    sampler.close()


def left(sampler: VLLMSampler) -> list[Path]:
    """Returns the folders of weights of a sampler."""
    return [file for folder in (MEMORY, Path(tempfile.gettempdir())) for file in folder.glob(f"{sampler.prefix(0)}*")]


def log_of(error: Failure) -> str:
    """Returns the text of the log that a message names, and removes the file."""
    found = re.search(r"see the end of (\S+\.log),", str(error))
    assert found, error
    log = Path(found[1])
    text = log.read_text()
    log.unlink()
    return text


HANGS = "exec sleep 600"


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        ("echo said by it; exit 1", "vLLM was to start, and ended its process; see the end of .*log, or set"),
        (
            f'exec {sys.executable} "$@"',
            "vLLM was to start, and said: ModuleNotFoundError: No module named 'vllm'; see",
        ),
    ],
    indirect=["sampler"],
)
def test_a_process_that_fails_ends_the_run_in_a_sentence(sampler: VLLMSampler, words: str, decoder: Decoder) -> None:
    with pytest.raises(Failure, match=words) as failed:
        sampler.take(decoder, MAIN)
    assert log_of(failed.value) and not left(sampler)


@pytest.mark.parametrize("sampler", [HANGS], indirect=True)
def test_a_process_that_hangs_is_ended(sampler: VLLMSampler, decoder: Decoder) -> None:
    (Path(tempfile.gettempdir()) / f"{sampler.prefix(0)}of_a_killed_run").mkdir()
    sampler.settings = VLLMConfig(python=sampler.settings.python, seconds=0.5)
    with pytest.raises(
        Failure, match=r"vLLM was to start, and took more than 0.5 s; raise rl.vllm.seconds, or see"
    ) as failed:
        sampler.take(decoder, MAIN)
    assert not log_of(failed.value) and not left(sampler)


def test_the_process_ends_with_its_parent_though_its_pipes_are_open() -> None:
    (theirs, ours), (reads, writes) = os.pipe(), os.pipe()
    script = (
        f"import subprocess, sys, time; fds = ({theirs}, {writes}); p = subprocess.Popen([sys.executable, '-I', "
        f"{str(CHILD)!r}, *map(str, fds)], pass_fds=fds); print(p.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], pass_fds=(theirs, writes), stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.write(ours, b"{}\n")  # its reply, an error, shows that it runs
    assert b"error" in os.read(reads, 1000) and alive(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 60
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(child)
    for number in (theirs, ours, reads, writes):
        os.close(number)


def alive(pid: int) -> bool:
    """Returns whether a process has not ended; one that nobody has waited for yet has."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_weights_that_were_not_taken_are_noticed_at_any_rollout() -> None:
    same, other, mask = torch.zeros(4), torch.full((4,), 0.1), torch.ones(4, dtype=torch.bool)
    once, always = LogprobCheck(0.05), LogprobCheck(0.05, every_rollout=True)
    for check in (once, always):
        check(same, mask)
    once(other, mask)
    with pytest.raises(Failure, match=r"before a rollout's first update, .* differ by 0.1 nats"):
        always(other, mask)


def test_seeds_depend_on_seed_and_key() -> None:
    seeds = {seed_of(seed, key) for seed in (1, 2) for key in ("rollout/1", "rollout/12", "heldout/1")}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)
