"""Reads folders of torch.distributed.checkpoint (DCP), which torchtitan and megatron-core (`torch_dist`) write.

Their file `.metadata` is a pickle, which could run any code. It is read by an unpickler that knows only the classes
that such a file needs and refuses every other name; tensors are read with `weights_only`, which is as strict.
"""

import io
import pickle
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

METADATA = ".metadata"
_STORED, _PLANS = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"
# Everything that a metadata file may name, apart from torch's dtypes.
_ALLOWED = {
    *((_STORED, name) for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata")),
    *((_STORED, name) for name in ("ChunkStorageMetadata", "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *((_PLANS, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),  # megatron-core's
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
}


class RefusedPickle(ValueError):
    """A metadata file that names something other than the classes of such files."""


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickler that creates nothing but the classes of DCP's metadata."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "pathlib._local":  # Python 3.13's name for where the classes of pathlib are
            module = "pathlib"
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _ALLOWED or is_dtype:
            return super().find_class(module, name)
        raise RefusedPickle(f"it names {module}.{name}, which no checkpoint of DCP needs")

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedPickle("it refers to objects outside the file")


class DcpFolder:
    """The tensors of a DCP folder: `shapes` by name, and a function that reads one of them, or a part of one."""

    def __init__(self, folder: Path):
        """Opens a folder. Raises ValueError if it is none of DCP, or its metadata is damaged or refused."""
        file = folder / METADATA
        if not file.is_file():
            raise ValueError(f"{folder} has no {METADATA}; name a folder that torch.distributed.checkpoint wrote")
        try:
            found = _MetadataUnpickler(io.BytesIO(file.read_bytes())).load()
        except RefusedPickle as error:
            raise ValueError(f"{file} is not read: {error}; save the model again with torch's own writer") from None
        except Exception as error:  # a damaged pickle may raise nearly anything
            raise ValueError(f"{file} is not a whole file of torch.distributed.checkpoint ({error})") from None
        if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
            raise ValueError(f"{file} holds {type(found).__name__}, not the metadata of torch.distributed.checkpoint")
        self.folder = folder
        self._tensors = {
            name: entry for name, entry in found.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
        }
        self._locations = found.storage_data
        self.shapes = {name: tuple(entry.size) for name, entry in self._tensors.items()}

    def missing_files(self) -> list[str]:
        """Returns the names of files that the metadata names and the folder lacks."""
        named = {info.relative_path for info in self._locations.values()}
        return sorted(name for name in named if not self._file(name).is_file())

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """Reads a whole tensor; with `row`, that element of its first dimension, without reading the others' parts."""
        entry = self._tensors[name]
        first, shape = (0, tuple(entry.size)) if row is None else (row, (1, *entry.size[1:]))
        whole = torch.empty(shape, dtype=entry.properties.dtype)
        filled = 0
        for chunk in self._chunks(entry, row):
            part = self._load(name, chunk)
            begin = list(chunk.offsets)
            if row is not None:
                part = part[row - begin[0] : row - begin[0] + 1]
                begin[0] = row
            if begin:
                begin[0] -= first
            whole[tuple(slice(b, b + n) for b, n in zip(begin, part.shape, strict=True))] = part
            filled += part.numel()
        if filled != whole.numel():
            raise ValueError(f"{name} in {self.folder} has {filled} of {whole.numel()} elements; save the model again")
        return whole if row is None else whole[0]

    def _chunks(self, entry: TensorStorageMetadata, row: int | None) -> Iterator[ChunkStorageMetadata]:
        for chunk in entry.chunks:
            if row is None or chunk.offsets[0] <= row < chunk.offsets[0] + chunk.sizes[0]:
                yield chunk

    def _load(self, name: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        info = self._locations.get(MetadataIndex(name, chunk.offsets))
        if info is None:
            raise ValueError(f"{self.folder / METADATA} does not say where a part of {name} is; save the model again")
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{name} in {self.folder} is compressed or encrypted; save the model without that")
        with open(self._file(info.relative_path), "rb") as file:
            file.seek(info.offset)
            content = io.BytesIO(file.read(info.length))
        try:
            part = torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:  # zip files, pickles and torch have errors of their own
            raise ValueError(
                f"{info.relative_path} in {self.folder}: the part of {name} cannot be read ({error}); fetch it again"
            ) from None
        if not isinstance(part, torch.Tensor) or part.shape != chunk.sizes:
            raise ValueError(f"{info.relative_path} in {self.folder} has no part of {name} of shape {chunk.sizes}")
        return part

    def _file(self, relative: str) -> Path:
        """Returns the path of a file of the folder. Raises ValueError for one that lies outside."""
        path = PurePosixPath(relative)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{self.folder / METADATA} names the file {relative}, which is outside of the folder")
        return self.folder / path
