"""Writes tensors as safetensors files, in shards with an index if needed, and reads them one at a time.

The files are named as in transformers: `model.safetensors`, or `model-00001-of-00003.safetensors` and so on with
`model.safetensors.index.json`. Pickled weights (`pytorch_model.bin`) are never read.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from configs.files import write_atomic

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def write_tensors(folder: str | Path, tensors: Iterable[tuple[str, torch.Tensor]], max_bytes: int) -> int:
    """Writes the tensors in order, into files of at most `max_bytes` or one tensor; returns the total size in bytes."""
    folder = Path(folder)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = total = 0
    for name, tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    if len(shards) == 1:
        _save(shards[0], folder / SINGLE)
        return total
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save(shard, folder / file)
        where |= dict.fromkeys(shard, file)
    write_atomic(
        folder / INDEX,
        json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2).encode(),
    )
    return total


def open_tensors(folder: str | Path) -> tuple[set[str], Callable[[str], torch.Tensor]]:
    """Returns (names, function that reads one tensor by name). Raises ValueError naming a missing or damaged file."""
    folder = Path(folder)
    if (folder / INDEX).is_file():
        where = json.loads((folder / INDEX).read_text())["weight_map"]
    elif (folder / SINGLE).is_file():
        where = dict.fromkeys(_names(folder / SINGLE), SINGLE)
    elif list(folder.glob("*.bin")):
        raise ValueError(f"{folder} holds pickled weights (.bin), which are never loaded; convert them to safetensors")
    else:
        raise ValueError(f"{folder} has no {SINGLE} and no {INDEX}; name a folder with safetensors files")
    for file in sorted(set(where.values())):
        inside = set(_names(folder / file))
        lost = sorted(name for name, named in where.items() if named == file and name not in inside)
        if lost:
            raise ValueError(f"{folder / file} lacks tensor {lost[0]}, which is there by {INDEX}; fetch the file again")

    def read(name: str) -> torch.Tensor:
        with safe_open(folder / where[name], framework="pt") as file:
            return file.get_tensor(name)

    return set(where), read


def tensor_files(folder: Path) -> list[Path]:
    """Returns the paths of the files that `open_tensors` reads, sorted by name."""
    if (folder / INDEX).is_file():
        files = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        return [folder / INDEX, *(folder / name for name in sorted(files))]
    return [folder / SINGLE]


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing, but {INDEX} names it; fetch it again") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}); fetch it again") from None


def _save(shard: dict[str, torch.Tensor], path: Path) -> None:
    # Experts are slices of one stacked tensor; safetensors requires separate memory for each.
    own = {
        name: tensor.clone() if tensor.storage_offset() or tensor._is_view() else tensor.contiguous()
        for name, tensor in shard.items()
    }
    save_file(own, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors creates files that only their owner may read
    with open(path, "rb") as file:
        os.fsync(file.fileno())
