"""The files of an adapter in PEFT's format, and beside them what names its base."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from configs.files import write_atomic
from export.model_source import ModelSource
from export.peft.adapter import PeftAdapter, PeftError
from export.publishing import exported_weights
from export.tensors import save_tensors
from pretrain.checkpoint import storage

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
RECORD = "trivium_adapter.json"  # Trivium's own: the hashes by which it knows the base
NAME = "base_model_name_or_path"


@dataclass(frozen=True)
class BaseRecord:
    """The base of an adapter: the name in adapter_config.json, and its hashes in each form, if Trivium wrote them."""

    name: str | None
    sha256: tuple[str, ...] = ()


def hashes_of(base: ModelSource) -> set[str]:
    """Returns SHA-256 hashes that identify a model: its own, its weights', and those of what it was exported from."""
    found = {base.identify()}
    if (base.path / storage.MANIFEST).is_file():  # two imports of one folder have the same files of weights
        files = storage.read_manifest(base.path)["files"].values()
        found.add(hashlib.sha256(" ".join(sorted(file["sha256"] for file in files)).encode()).hexdigest())
    exported = exported_weights(base.path)
    return found | ({exported} if exported else set())


def write(folder: Path, adapter: PeftAdapter, base: BaseRecord) -> None:
    """Writes an adapter's files into a folder."""
    config: Mapping[str, Any] = {**adapter.config, NAME: base.name}
    write_atomic(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    tensors: dict[str, torch.Tensor] = {name: tensor.contiguous() for name, tensor in adapter.tensors.items()}
    save_tensors(tensors, folder / TENSORS)
    record = {"base": base.name, "base_sha256": list(base.sha256)}
    write_atomic(folder / RECORD, (json.dumps(record, indent=2) + "\n").encode())


def read(folder: Path) -> tuple[PeftAdapter, BaseRecord]:
    """Reads an adapter's files. Raises PeftError for what is missing, damaged, pickled or not finite."""
    config = _object(folder / CONFIG)
    if not (folder / TENSORS).is_file():
        if (folder / PICKLED).is_file():
            raise PeftError(
                f"{folder} holds pickled weights ({PICKLED}), which are never loaded; save the adapter as safetensors"
            )
        raise PeftError(f"{folder} has no {TENSORS}; name the folder of an adapter that peft saved")
    try:
        tensors = load_file(folder / TENSORS)
    except SafetensorError as error:
        raise PeftError(f"{folder / TENSORS} is not a complete safetensors file ({error}); fetch it again") from None
    if broken := next((name for name, one in tensors.items() if not bool(one.isfinite().all())), None):
        raise PeftError(
            f"{folder / TENSORS} has NaN or infinite numbers in {broken}; its training failed, or fetch it again"
        )
    record = _object(folder / RECORD) if (folder / RECORD).is_file() else {}
    name = config.get(NAME)
    return PeftAdapter(config, tensors), BaseRecord(name if isinstance(name, str) else None, _hashes(record))


def _object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PeftError(f"{file.parent} has no {file.name}; name the folder of an adapter that peft saved") from None
    except ValueError as error:
        raise PeftError(f"{file} is not valid JSON ({error}); fetch it again") from None
    if not isinstance(found, dict):
        raise PeftError(f"{file} holds no JSON object; fetch it again")
    return found


def _hashes(record: dict[str, Any]) -> tuple[str, ...]:
    found = record.get("base_sha256")
    return tuple(one for one in found if isinstance(one, str)) if isinstance(found, list) else ()
