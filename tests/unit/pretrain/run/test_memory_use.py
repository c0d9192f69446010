"""Memory that is used up ends a command by one sentence, with the settings of a training run that need less."""

import errno
import os
import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from configs.cli import entrypoint
from configs.layout import Layout
from configs.loader import Failure, validate
from configs.memory_errors import lack_of_memory
from configs.train import PretrainConfig
from pretrain.run.memory_use import lack_is_told
from tests.training_configs import BASES

TOO_MANY = 1 << 57


def checked(world_size: int, **keys: Any) -> tuple[PretrainConfig, Layout]:
    tree: dict[str, Any] = {name: dict(section) for name, section in BASES["pretrain"].items()}
    for key, value in keys.items():
        section, name = key.split("__")
        tree.setdefault(section, {})[name] = value
    config = validate(PretrainConfig, tree)
    return config, Layout.of(world_size, config.parallel, config.model, config.train)


def told(world_size: int, **keys: Any) -> str:
    config, layout = checked(world_size, **keys)
    mesh: Any = SimpleNamespace(rank=1, layout=layout)
    with pytest.raises(Failure) as raised, lack_is_told(config, config.model, mesh):
        torch.empty(TOO_MANY)
    return str(raised.value)


def test_a_training_run_names_the_settings_that_need_less_and_go_with_the_others() -> None:
    said = told(2)
    start = rf"rank 1: no memory is left \(tried to allocate {4 * TOO_MANY} bytes\); less of it is needed with "
    assert re.match(start, said) and said.endswith(" or rows shorter than train.seq_length = 16")
    named = re.findall(r"(\w+)\.(\w+)=(\w+) \(now (\w+)\)", said)
    assert [(section, key, now) for section, key, _, now in named] == [
        ("train", "micro_batch_size", "2"),
        ("train", "recompute", "none"),
        ("parallel", "zero", "1"),
    ]
    for section, key, value, _ in named:
        checked(2, **{f"{section}__{key}": int(value) if value.isdigit() else value})
    assert "zero=" not in told(1) and "rank" not in told(1), "one rank divides nothing"
    assert "parallel.zero=" not in told(2, parallel__pp=2), "pipelines go with stage 1 alone"
    assert "parallel.zero=" not in told(2, spikes__action="skip")
    least = told(2, train__micro_batch_size=1, train__recompute="full", parallel__zero=3)
    assert least.endswith("less of it is needed with rows shorter than train.seq_length = 16")


def raises(error: BaseException) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: torch.empty(TOO_MANY), rf" \(tried to allocate {4 * TOO_MANY} bytes\)"),
        (lambda: np.empty(TOO_MANY), r" \(unable to allocate [\d.]+ EiB\)"),
        (
            raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.5 GiB. GPU 0 has")),
            r" \(tried .*GiB\)",
        ),
        (raises(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")), ""),
        (raises(RuntimeError("std::bad_alloc")), ""),
        (raises(MemoryError()), ""),
        (raises(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))), ""),
    ],
)
def test_any_other_command_ends_by_one_sentence(
    call: Callable[[], Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(_: Sequence[str] | None) -> int:
        call()
        return 0

    with pytest.raises(SystemExit) as ended:
        entrypoint(main, [])
    said = capsys.readouterr().err
    assert ended.value.code == 1 and re.match(
        rf"error: no memory is left{words}; end other programs on this machine, or take one with more memory, then run",
        said,
    ), said


def test_other_errors_stay_as_they_are() -> None:
    config, layout = checked(1)
    mesh: Any = SimpleNamespace(rank=0, layout=layout)
    with pytest.raises(RuntimeError, match="shape"), lack_is_told(config, config.model, mesh):
        torch.ones(2).reshape(3)
    assert lack_of_memory(ValueError("not enough memory of it")) is None
