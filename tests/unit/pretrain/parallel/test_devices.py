"""The GPU that a rank uses, on nodes where it sees all GPUs and on nodes where it sees only its own."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

from configs.files import file_sha256
from configs.loader import ConfigError
from pretrain.parallel.deepspeed_import import device_as_local_rank
from pretrain.parallel.groups import backend_of, device_of, refuse_shared_gpus
from pretrain.proof import devices


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


def test_a_record_is_made_anew_or_elsewhere_as_the_message_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Follows each remedy; no rank is started, as there are no models to record."""
    monkeypatch.setattr(devices, "CASES", {})
    folder = tmp_path / "record"
    devices.record(folder, ["fp32"])
    with pytest.raises(ConfigError, match=r"--record .*/record: it exists; name a new folder, or remove this one"):
        devices.record(folder, ["fp32"])
    devices.record(tmp_path / "new", ["fp32"])
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    devices.record(folder, ["fp32", "bf16"])
    assert devices.read_reference(folder, ["fp32", "bf16"])["precisions"] == ["fp32", "bf16"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"format": 99}, "another version of Trivium recorded it; record it again"),
        ({"files": None}, "another version of Trivium recorded it; record it again"),
        ("[1]", r"it has no reference\.json that can be read; record it again"),
        ('{"format": ', r"it has no reference\.json that can be read; record it again"),
        (None, r"it has no reference\.json that can be read; record it again"),
        (b"other", "a/start.safetensors is missing or damaged; copy the folder again, or record it again"),
    ],
)
def test_a_damaged_record_is_copied_or_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: object, words: str
) -> None:
    monkeypatch.setattr(devices, "CASES", {})
    folder = tmp_path / "record"
    devices.record(folder, ["fp32"])
    file, reference = folder / "a/start.safetensors", folder / devices.REFERENCE
    file.parent.mkdir()
    file.write_bytes(b"weights")
    facts = json.loads(reference.read_text()) | {"files": {"a/start.safetensors": file_sha256(file)}}
    whole = json.dumps(facts)
    reference.write_text(whole)
    devices.read_reference(folder, ["fp32"])
    if damage is None:
        reference.unlink()
    elif isinstance(damage, bytes):
        file.write_bytes(damage)
    elif isinstance(damage, str):
        reference.write_text(damage)
    else:
        assert isinstance(damage, dict)
        kept = {key: value for key, value in (facts | damage).items() if value is not None}
        reference.write_text(json.dumps(kept))
    with pytest.raises(ConfigError, match=f"--against {folder}: {words}") as raised:
        devices.read_reference(folder, ["fp32"])
    assert "trivium prove --record FOLDER" in str(raised.value)
    file.write_bytes(b"weights")
    reference.write_text(whole)  # the copy
    devices.read_reference(folder, ["fp32"])
    devices.record(tmp_path / "again", ["fp32"])
    devices.read_reference(tmp_path / "again", ["fp32"])


def test_a_precision_that_was_not_recorded_is_named_with_those_that_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "CASES", {})
    devices.record(tmp_path / "record", ["fp32"])
    with pytest.raises(ConfigError, match=r"--precision bf16: .*; set --precision (\S+), or record it again") as raised:
        devices.read_reference(tmp_path / "record", ["fp32", "bf16"])
    found = re.search(r"set --precision (\S+), or record it again with --precision (\S+)$", str(raised.value))
    assert found
    devices.read_reference(tmp_path / "record", found[1].split(","))
    devices.record(tmp_path / "again", found[2].split(","))
    devices.read_reference(tmp_path / "again", ["fp32", "bf16"])


def test_a_machine_without_gpu_is_told_to_take_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"finds no GPU; install a CUDA build of torch on .*, or set --device (cpu)$"):
        devices.check_device("cuda")
    devices.check_device("cpu")
