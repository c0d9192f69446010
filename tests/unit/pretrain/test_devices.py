"""The GPU that a rank uses, on nodes where it sees all GPUs and on nodes where it sees only its own."""

import os

import pytest
import torch

from configs.loader import ConfigError
from pretrain.parallel.deepspeed_import import device_as_local_rank
from pretrain.parallel.groups import backend_of, device_of, refuse_shared_gpus


@pytest.mark.parametrize(
    ("local_rank", "visible", "device"),
    [(3, 8, "cuda:3"), (3, 1, "cuda:0"), (0, 1, "cuda:0"), (5, 4, "cuda:1"), (3, 0, "cpu")],
)
def test_a_rank_uses_a_gpu_that_it_sees(local_rank: int, visible: int, device: str) -> None:
    assert device_of(local_rank, visible) == torch.device(device)


@pytest.mark.parametrize(
    ("device", "backend", "name"),
    [
        ("cuda:1", "auto", "cpu:gloo,cuda:nccl"),
        ("cuda:0", "gloo", "staged_gloo"),
        ("cpu", "auto", "gloo"),
        ("cpu", "gloo", "gloo"),
    ],
)
def test_ranks_exchange_over_what_their_device_has(device: str, backend: str, name: str) -> None:
    assert backend_of(torch.device(device), backend) == name


def test_two_ranks_on_one_gpu_are_refused_with_what_to_do() -> None:
    refuse_shared_gpus([["a", "GPU-1"], ["a", "GPU-2"], ["b", "GPU-1"]])  # hosts may number theirs alike
    with pytest.raises(ConfigError, match=r"ranks 1 and 3 on b see one and the same; .* parallel\.backend=gloo"):
        refuse_shared_gpus([["a", "GPU-1"], ["b", "GPU-7"], ["b", "GPU-8"], ["b", "GPU-7"]])


@pytest.mark.parametrize("launcher", [{}, {"OMPI_COMM_WORLD_LOCAL_RANK": "3"}])
def test_deepspeed_is_given_the_number_of_the_gpu(monkeypatch: pytest.MonkeyPatch, launcher: dict[str, str]) -> None:
    monkeypatch.delenv("OMPI_COMM_WORLD_LOCAL_RANK", raising=False)
    for name, value in {"LOCAL_RANK": "3", **launcher}.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with device_as_local_rank(device_of(3, visible=1)):
        assert {os.environ[name] for name in ("LOCAL_RANK", *launcher)} == {"0"}
        assert os.environ.keys() == before.keys()
    with device_as_local_rank(torch.device("cpu")):
        assert os.environ["LOCAL_RANK"] == "3"
    assert dict(os.environ) == before
