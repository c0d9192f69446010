"""Files of checkpoints: a directory `checkpoints/step_N/` of safetensors files and one `manifest.json`.

An imported model is a run directory with the single checkpoint `step_0`. It has weights in the dtype that they came in
and no moments, and may hold tensors that Trivium computes nothing with (`kept`), so that an export gives them back.

A parameter is known by its global name. Each rank writes the pieces it owns: a piece is the flat range [start,
start + length) of a box (offset, shape) of the global tensor, so tensor parallel cuts boxes and ZeRO cuts ranges, and
any reader can assemble the whole tensor. The manifest names every piece, every file's size and SHA-256, and the run's
state; it has a checksum of its own values. A second model that is trained beside the first, such as a critic, is a
checkpoint in a folder of its own in there (`companions` in the manifest). All files are written in a directory with a
temporary name, synced, and the directory is renamed: one called `step_N` is whole.

When to save is decided in `saving`. Readers assemble whole parameters, not only the pieces that a rank needs.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from configs.checkpoint_folders import MANIFEST as MANIFEST
from configs.checkpoint_folders import directory as directory
from configs.checkpoint_folders import steps as steps
from configs.files import file_sha256, sync
from configs.loader import ConfigError, Failure
from configs.sealed import CHECKPOINT, VersionError

# An empty file, made when training data that was still unchecked at the save (`unchecked_from` in the manifest) has
# been checked and found whole. The manifest itself is never changed, since other files hold its checksum.
CHECKED = "data_checked"
KINDS = ("weight", "exp_avg", "exp_avg_sq")  # fp32 master weights and Adam's two moments
KEPT = "kept"  # the kind of a tensor that Trivium computes nothing with
# The dtypes of safetensors files by torch's; the names are the format's own.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CheckpointError(Failure):
    """Error for a checkpoint that is missing, incomplete, damaged or of another model; names file and remedy."""


class OtherVersionError(ConfigError):
    """Error for a whole checkpoint that another version of Trivium wrote, in a format that this one cannot read."""


@dataclass(frozen=True)
class Piece:
    """Part of a global tensor that one rank stores.

    A rank holds the box that begins at `offset` and has `shape`; of its elements, flattened, the piece is the range
    [start, start + length)."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    length: int


def run_of(checkpoint: Path) -> Path:
    """Run directory of a checkpoint; a checkpoint outside a `checkpoints` folder is its own."""
    checkpoint = checkpoint.resolve()
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint


def temporary_name(final: Path) -> Path:
    """Path of a checkpoint while it is written."""
    return final.with_name(f".{final.name}")


def rank_file(rank: int) -> str:
    """Name of the file that one rank writes."""
    return f"rank_{rank:05d}.safetensors"


def write_rank(
    temporary: Path, rank: int, pieces: Mapping[str, tuple[Piece, dict[str, torch.Tensor]]]
) -> dict[str, Any]:
    """Writes one rank's pieces into its file, see `write_pieces`."""
    return write_pieces(temporary, rank_file(rank), pieces)


def write_pieces(
    temporary: Path, file: str, pieces: Mapping[str, tuple[Piece, dict[str, torch.Tensor]]]
) -> dict[str, Any]:
    """Writes pieces, {name: (piece, {kind: flat tensor in host memory})}, to a file.

    Returns the file's part of the manifest. Raises OSError, and may then leave an incomplete file.
    """
    tensors = {f"{kind}/{one.name}": tensor for one, kinds in pieces.values() for kind, tensor in kinds.items()}
    size, digest = _write_tensors(temporary / file, tensors)
    return {
        "file": file,
        "bytes": size,
        "sha256": digest,
        "pieces": [asdict(piece) for piece, kinds in pieces.values() if KEPT not in kinds],
        "kept": [asdict(piece) for piece, kinds in pieces.values() if KEPT in kinds],
        "frozen": [piece.name for piece, kinds in pieces.values() if list(kinds) == ["weight"]],
    }


def publish(
    temporary: Path,
    final: Path,
    parts: list[dict[str, Any]],
    state: dict[str, Any],
    kinds: tuple[str, ...] = KINDS,
) -> None:
    """Writes the manifest from the parts of all files and renames the directory to its final name. One rank calls it.

    Raises OSError, and CheckpointError if the parts do not cover every parameter.
    """
    complete(temporary, parts, state, kinds)
    rename_to_final(temporary, final)


def rename_to_final(temporary: Path, final: Path) -> None:
    """Renames the directory of a checkpoint whose files are all written to its final name. Raises OSError."""
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():  # a damaged checkpoint of this very step
        os.rename(final, replaced)
    os.rename(temporary, final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def complete(folder: Path, parts: list[dict[str, Any]], state: dict[str, Any], kinds: tuple[str, ...] = KINDS) -> str:
    """Writes the manifest of a checkpoint whose files are in `folder`, and returns the manifest's SHA-256.

    Raises as `publish` does.
    """
    for part in parts:
        file = folder / part["file"]
        if not file.is_file() or file.stat().st_size != part["bytes"]:
            why = "missing or incomplete after its rank wrote it; put run.dir on a file system that all machines share"
            raise FileNotFoundError(errno.ENOENT, why, str(file))
    content = manifest_content(parts, state, kinds)
    _write_synced(folder / MANIFEST, content)
    sync(folder)
    return hashlib.sha256(content).hexdigest()


def manifest_content(parts: list[dict[str, Any]], state: dict[str, Any], kinds: tuple[str, ...] = KINDS) -> bytes:
    """Returns the content of a manifest. Raises CheckpointError if the parts do not cover every parameter."""
    parameters, kept = _with_pieces(parts, "pieces"), _with_pieces(parts, "kept")
    frozen = sorted({name for part in parts for name in part["frozen"]})
    for name, entry in (parameters | kept).items():
        covered = sum(piece["length"] for piece in entry["pieces"])
        if covered != math.prod(entry["shape"]):
            raise CheckpointError(
                f"{name}: the ranks hold {covered} of {math.prod(entry['shape'])} elements; not saved"
            )
    values = {
        **state,
        "kinds": list(kinds),
        "files": {part["file"]: {"bytes": part["bytes"], "sha256": part["sha256"]} for part in parts},
        "parameters": parameters,
        **({"kept": kept} if kept else {}),
        **({"frozen": frozen} if frozen and len(kinds) > 1 else {}),  # names of weights without moments
    }
    return CHECKPOINT.write(values)


def _with_pieces(parts: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """Returns the shape of each tensor that the parts list under `key`, with file and position of its pieces."""
    found: dict[str, Any] = {}
    for part in parts:
        for piece in part[key]:
            entry = found.setdefault(piece["name"], {"shape": piece["global_shape"], "pieces": []})
            entry["pieces"].append(
                {"file": part["file"], **{k: piece[k] for k in ("offset", "shape", "start", "length")}}
            )
    return found


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Reads the manifest of a checkpoint directory. Raises CheckpointError or OtherVersionError."""
    file = Path(path) / MANIFEST
    try:
        manifest = CHECKPOINT.read(file.read_bytes(), file)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        said = f"{file} does not exist, so {path} is not a whole checkpoint; use an earlier checkpoint"
        raise CheckpointError(said) from None
    except VersionError as error:
        raise OtherVersionError(
            f"{error}; another version of Trivium wrote it: use that version, or train again in another run.dir"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{error}; use an earlier checkpoint") from None
    named = re.fullmatch(r"step_(\d+)", Path(path).name)
    if named and manifest.get("step", int(named[1])) != int(named[1]):
        raise CheckpointError(
            f"{path} holds the checkpoint of step {manifest['step']}: its folder or its files were moved; rename it to "
            f"step_{manifest['step']}, or use an earlier checkpoint"
        )
    if "stretches" in manifest:  # the key in version 2
        manifest["data_spans"] = manifest.pop("stretches")
    return manifest


def verify(path: str | Path, share: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """Reads the manifest and checks every file's size and SHA-256. Raises CheckpointError, which names the file.

    With a `share` of (index, count) it checks about one `count`th of the files; all shares together check every file.
    """
    path, (index, count) = Path(path), share
    manifest = read_manifest(path)
    for name, sha256 in manifest.get("companions", {}).items():
        verify(path / name, share)
        if file_sha256(path / name / MANIFEST) != sha256:
            raise CheckpointError(f"{path / name} is not the {name} of {path}; use an earlier checkpoint")
    by_size = sorted(manifest["files"].items(), key=lambda item: (-item[1]["bytes"], item[0]))
    for name, facts in by_size[index::count]:
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; use an earlier checkpoint")
        if file.stat().st_size != facts["bytes"]:
            raise CheckpointError(
                f"{file} has {file.stat().st_size} bytes, its manifest says {facts['bytes']}; use an earlier checkpoint"
            )
        with open(file, "rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != facts["sha256"]:
                raise CheckpointError(f"{file} does not match its SHA-256; it is damaged, use an earlier checkpoint")
    return manifest


def find_newest(
    run_dir: str | Path, check: Callable[[Path], object] = verify, before: int | None = None
) -> tuple[Path | None, list[str]]:
    """Returns the newest checkpoint whose files match their checksums (or None), and the faults of newer ones.

    With `before` only steps before that one count. `check` raises CheckpointError for a damaged checkpoint.
    """
    problems: list[str] = []
    for step in reversed([one for one in steps(run_dir) if before is None or one < before]):
        try:
            check(directory(run_dir, step))
            return directory(run_dir, step), problems
        except CheckpointError as error:
            problems.append(re.sub(r"[;,] use an earlier checkpoint$", "", str(error)))
    return None, problems


def latest(
    run_dir: str | Path, check: Callable[[Path], object] = verify, warn: Callable[[str], object] = lambda _: None
) -> Path:
    """Returns the newest whole checkpoint of a run; `warn` is called with a sentence if newer ones are damaged.

    `check` is as in `find_newest`. Raises CheckpointError if no checkpoint is whole.
    """
    path, problems = find_newest(run_dir, check)
    if path is None:
        if problems:
            said = f"no checkpoint of {run_dir} is whole: {'; '.join(problems)}; restore one, or name another run"
            raise CheckpointError(said)
        raise CheckpointError(f"{run_dir} has no checkpoint; train first, or name another run")
    if problems:
        warn(f"{'; '.join(problems)}: {path} is taken")
    return path


class Reader:
    """Reader that assembles whole tensors from a checkpoint's pieces, one at a time.

    `shapes` has the shape of each parameter by its global name, and `balance` the load and router bias of MoE layers.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.manifest = read_manifest(path)
        self.shapes = {name: tuple(entry["shape"]) for name, entry in self.manifest["parameters"].items()}
        dtypes = self.manifest.get("balance_dtypes", {})
        self.balance = {
            name: torch.tensor(values, dtype=getattr(torch, dtypes.get(name, "float32")))
            for name, values in self.manifest.get("balance", {}).items()
        }
        self._files: dict[str, Any] = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.__exit__(None, None, None)
        self._files.clear()

    @property
    def kept(self) -> list[str]:
        """Names of the tensors that Trivium computes nothing with, and keeps so that an export gives them back."""
        return list(self.manifest.get("kept", {}))

    def kinds_of(self, name: str) -> list[str]:
        """Returns the kinds of tensors that the checkpoint holds of a parameter; of a frozen one its weight alone."""
        return ["weight"] if name in self.manifest.get("frozen", ()) else list(self.manifest["kinds"])

    def read(self, name: str, kind: str = "weight") -> torch.Tensor:
        """Reads a whole tensor, in fp32, or of an imported model in the dtype that it came in.

        Raises CheckpointError for a name or kind that the checkpoint lacks.
        """
        if name not in self.shapes or kind not in self.kinds_of(name):
            raise CheckpointError(f"{self.path} holds no {kind} of {name}, so it is a checkpoint of another model")
        return self._assembled(self.manifest["parameters"][name], f"{kind}/{name}")

    def read_kept(self, name: str) -> torch.Tensor:
        """Reads a tensor that Trivium computes nothing with, by its name in the file that it came from."""
        return self._assembled(self.manifest["kept"][name], f"{KEPT}/{name}")

    def _assembled(self, entry: dict[str, Any], key: str) -> torch.Tensor:
        boxes: dict[tuple[tuple[int, ...], tuple[int, ...]], list[dict[str, Any]]] = {}
        for piece in entry["pieces"]:
            boxes.setdefault((tuple(piece["offset"]), tuple(piece["shape"])), []).append(piece)
        whole = None
        for (offset, shape), pieces in boxes.items():
            flat = [(piece["start"], self._open(piece["file"]).get_tensor(key)) for piece in pieces]
            box = flat[0][1] if len(flat) == 1 else torch.cat([part for _, part in sorted(flat, key=lambda p: p[0])])
            if len(boxes) == 1:
                return box.view(entry["shape"])
            whole = torch.empty(entry["shape"], dtype=box.dtype) if whole is None else whole
            whole[tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))] = box.view(shape)
        assert whole is not None
        return whole

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = safe_open(self.path / file, framework="pt").__enter__()
        return self._files[file]


def read_full(path: str | Path, kind: str = "weight") -> dict[str, torch.Tensor]:
    """Reads one kind of tensor of all parameters, whole and in fp32, after checking every file's checksum.

    Weights come with the load and router bias of MoE layers; frozen ones have no moments. What the checkpoint's base
    holds is not read (see `whole_model`). Raises CheckpointError.
    """
    verify(path)
    with Reader(path) as reader:
        whole = {name: reader.read(name, kind).float() for name in reader.shapes if kind in reader.kinds_of(name)}
        return whole | (reader.balance if kind == "weight" else {})


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> tuple[int, str]:
    """Writes tensors as a safetensors file. Returns its size and SHA-256.

    The library's `save_file` is not used: the file would have to be read again for its checksum, and a full disk would
    raise an error without errno. Here one pass hashes and writes, and a full disk raises OSError.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        assert tensor.is_contiguous() and tensor.device.type == "cpu", name
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # the format's alignment
    digest = hashlib.sha256()
    begin: Any = struct.pack("<Q", len(head)) + head
    with open(path, "wb") as file:
        for part in (begin, *(tensor.flatten().view(torch.uint8).numpy() for tensor in tensors.values())):
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
        return file.tell(), digest.hexdigest()


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
