"""Writes tensors as safetensors files, in shards with an index if needed, and reads them one at a time.

The files are named as in transformers: `model.safetensors`, or `model-00001-of-00003.safetensors` and so on with
`model.safetensors.index.json`. Pickled weights (`pytorch_model.bin`) are never read.
"""

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from configs.files import write_atomic

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def write_tensors(folder: str | Path, tensors: Iterable[tuple[str, torch.Tensor]], max_bytes: int) -> int:
    """Writes the tensors in order, into files of at most `max_bytes` or one tensor; returns the total size in bytes.

    A file is written as soon as it is full, so that no more than its tensors are in memory.
    """
    folder = Path(folder)
    shard: dict[str, torch.Tensor] = {}
    shards: list[list[str]] = []
    size = total = 0

    def write() -> None:
        shards.append(list(shard))
        save_tensors(shard, folder / _unnamed(len(shards)))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_bytes:
            write()
            size = 0
        # A view of a larger tensor would keep the whole of it.
        shard[name] = tensor.clone(memory_format=torch.contiguous_format) if tensor._is_view() else tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    write()
    if len(shards) == 1:
        (folder / _unnamed(1)).rename(folder / SINGLE)
        return total
    where: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / _unnamed(number)).rename(folder / file)
        where |= dict.fromkeys(names, file)
    write_atomic(
        folder / INDEX,
        json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2).encode(),
    )
    return total


@dataclass
class TensorFolder:
    """The tensors of a folder: `shapes` by name, None in a file that cannot be read, and `problems`, as sentences.

    `dtypes` has the names that the format gives them, such as BF16.
    """

    folder: Path
    shapes: dict[str, tuple[int, ...] | None] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor by its name."""
        with safe_open(self.folder / self.files[name], framework="pt") as file:
            return file.get_tensor(name)


def scan_tensors(folder: str | Path) -> TensorFolder:
    """Looks at all files of a folder and returns what is in them, with everything that is wrong; reads no tensor."""
    folder = Path(folder)
    found = TensorFolder(folder)
    if (folder / SINGLE).is_file():  # where there is an index too, transformers does not read it
        found.shapes |= _shapes(folder / SINGLE, found) or {}
        found.files = dict.fromkeys(found.shapes, SINGLE)
        if not found.files and not found.problems:
            found.problems.append(f"{folder / SINGLE} holds no tensor; fetch it again")
        return found
    if (folder / INDEX).is_file():
        try:
            found.files = _indexed(json.loads((folder / INDEX).read_text(encoding="utf-8")))
        except ValueError as error:
            found.problems.append(f"{folder / INDEX} is not a complete index ({error}); fetch it again")
            return found
    elif list(folder.glob("*.bin")):
        found.problems.append(
            f"{folder} holds pickled weights (.bin), which are never loaded; convert them to safetensors"
        )
    else:
        found.problems.append(f"{folder} has no {SINGLE} and no {INDEX}; name a folder with safetensors files")
    for file in sorted(set(found.files.values())):
        named = [name for name, held_in in found.files.items() if held_in == file]
        inside = _shapes(folder / file, found)
        found.shapes |= {name: inside.get(name) if inside is not None else None for name in named}
        lost = sorted(name for name in named if inside is not None and name not in inside)
        if lost:
            found.problems.append(
                f"{folder / file} lacks {', '.join(lost[:20])}{' and more' * (len(lost) > 20)}, there by {INDEX}; "
                "fetch the file again"
            )
    return found


def open_tensors(folder: str | Path) -> tuple[set[str], Callable[[str], torch.Tensor]]:
    """Returns (names, function that reads one tensor by name). Raises ValueError naming missing or damaged files."""
    found = scan_tensors(folder)
    if found.problems:
        raise ValueError("; ".join(found.problems))
    return set(found.files), found.read


def tensor_files(folder: Path) -> list[Path]:
    """Returns the paths of the files that `open_tensors` reads, sorted by name."""
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return [folder / SINGLE]
    files = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    return [folder / INDEX, *(folder / name for name in sorted(files))]


def _indexed(index: Any) -> dict[str, str]:
    """Returns the file of each tensor that an index names. Raises ValueError for one that names no file."""
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not where:
        raise ValueError("it has no weight_map")
    for name, file in where.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"the file of {name} is {file!r}, and not the name of a file beside the index")
    return where


def _unnamed(number: int) -> str:
    """Returns the name of a file of weights while the number of all files is not known."""
    return f"model-{number:05d}.safetensors"


def _shapes(path: Path, found: TensorFolder) -> dict[str, tuple[int, ...]] | None:
    """Returns the shapes of a file's tensors by name and adds their dtypes, or None and a problem if it is damaged."""
    problems = found.problems
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found.dtypes |= {name: part.get_dtype() for name, part in parts.items()}
            return {name: tuple(part.get_shape()) for name, part in parts.items()}
    except FileNotFoundError:
        problems.append(f"{path} is missing, but {INDEX} names it; fetch it again")
    except (SafetensorError, OSError) as error:
        problems.append(f"{path} is not a complete safetensors file ({error}); fetch it again")
    return None


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes tensors to one safetensors file. Raises OSError, not the library's error, where the system fails."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if refused := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(refused[1]), os.strerror(int(refused[1])), str(path)) from None
        raise
    path.chmod(0o644)  # safetensors creates files that only their owner may read
    with open(path, "rb") as file:
        os.fsync(file.fileno())
