"""Reads the whole model of a checkpoint that holds a part of it: adapters, or the weights that were not frozen.

Such a checkpoint names its base, the checkpoint that its run began from, which holds the rest and may have a base of
its own. A base is known by its manifest's SHA-256, and is found where it was, or where it lies beside a run that was
moved together with it. Adapters are merged into the weights that are read; the base stays as it is.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from configs.adapters import AdapterConfig
from configs.files import file_sha256
from configs.loader import validate
from configs.model import ModelConfig
from configs.train import TrainerConfig
from pretrain.checkpoint import storage
from pretrain.checkpoint.lineage import Pin
from pretrain.checkpoint.storage import CheckpointError, Reader
from pretrain.model.adapters import is_adapter, merged, nf4


def base_facts(config: TrainerConfig, init: Pin | None) -> dict[str, Any]:
    """Returns the entry of a manifest that names the base, where frozen weights are left out of a run's checkpoints."""
    if init is None or not (config.adapter or config.train.freeze):
        return {}
    relative = os.path.relpath(Path(init.checkpoint).resolve(), Path(config.run.dir).resolve())
    return {"base": {**asdict(init), "relative": relative}}


def base_of(path: Path, manifest: dict[str, Any]) -> Path | None:
    """Returns the base of the checkpoint at `path`, or None if it holds the whole model by itself.

    Raises CheckpointError if the base is gone or has changed.
    """
    base = manifest.get("base")
    if not base:
        return None
    places = Path(base["checkpoint"]), Path(os.path.normpath(storage.run_of(path) / base["relative"]))
    for place in places:
        if content_of(place) == base["sha256"]:
            return place
    said = "is another model now" if content_of(places[0]) else "is gone"
    raise CheckpointError(
        f"{path} holds only what was trained on top of {places[0]}, which {said}; put the model back there, whose "
        f"SHA-256 begins with {base['sha256'][:12]}"
    )


def content_of(model: Path) -> str | None:
    """Returns what identifies a checkpoint, its manifest's SHA-256, or a Hugging Face folder; None if none is there."""
    if (model / storage.MANIFEST).is_file():
        return file_sha256(model / storage.MANIFEST)
    if not (model / "config.json").is_file():
        return None
    from export.hf_folder import content_sha256

    return content_sha256(model)


def verify(path: str | Path, share: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """Checks the files of a checkpoint, and of its base, against their checksums; returns the checkpoint's manifest.

    `share` is that of `storage.verify`. Raises CheckpointError, also if the base is gone.
    """
    manifest = storage.verify(path, share)
    base = base_of(Path(path), manifest)
    if base is not None and (base / storage.MANIFEST).is_file():
        verify(base, share)
    return manifest


def adapter_of(manifest: dict[str, Any], path: str | Path) -> AdapterConfig | None:
    """Returns the config of the adapters in the checkpoint at `path`, None if it has none."""
    adapter = manifest.get("config", {}).get("adapter")
    return None if adapter is None else validate(AdapterConfig, adapter, origin=f"{path}, [adapter]")


def separate_adapter(manifest: dict[str, Any], path: str | Path) -> AdapterConfig | None:
    """Returns the config of the adapters in the checkpoint at `path` if they cannot be merged into its weights."""
    adapter = adapter_of(manifest, path)
    return None if adapter is None or adapter.merges else adapter


def check_unchanged(pin: Pin) -> None:
    """Raises CheckpointError if the model that `pin` identifies is gone, was replaced, or is damaged."""
    path = Path(pin.checkpoint)
    if (found := content_of(path)) != pin.sha256:
        raise CheckpointError(f"{path} {'is another model now' if found else 'is gone'}")
    if (path / storage.MANIFEST).is_file():
        verify(path)


class WholeTensors(Protocol):
    """Weights by global name, whole, from a checkpoint or from another folder; `balance` belongs to MoE layers.

    `adapter` describes the adapters that are among the weights because they cannot be merged; None if there are none.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    balance: dict[str, torch.Tensor]
    adapter: AdapterConfig | None

    def read(self, name: str) -> torch.Tensor:
        """Reads a whole tensor."""
        ...


@contextmanager
def open_model(path: Path) -> Iterator[WholeTensors]:
    """Context manager that opens the weights of a checkpoint, or of a Hugging Face folder, by their global names."""
    if (path / storage.MANIFEST).is_file():
        with ModelReader(path) as reader:
            yield reader
    else:
        from export.hf_folder import FolderTensors, open_hf_folder

        yield FolderTensors(open_hf_folder(path))


def _without_modules(shapes: dict[str, tuple[int, ...]], manifest: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the base's weights without modules of multi-token prediction that the run has left out."""
    config = manifest.get("config", {})
    if "model" not in config:
        return dict(shapes)
    model = validate(ModelConfig, config["model"])
    layers = model.num_layers + model.head.mtp_depth

    def is_left_out(name: str) -> bool:
        first, _, rest = name.partition(".")
        return first == "layers" and int(rest.partition(".")[0]) >= layers

    return {name: shape for name, shape in shapes.items() if not is_left_out(name)}


class ModelReader:
    """Reader of whole weights, one at a time, with adapters merged into them; otherwise like a `storage.Reader`.

    Adapters that cannot be merged are among the weights, and `adapter` describes them.
    """

    def __init__(self, path: str | Path):
        self.path, self._own = Path(path), Reader(path)
        manifest = self._own.manifest
        base = base_of(Path(path), manifest)
        self._stack = ExitStack()
        self._base = None if base is None else self._stack.enter_context(open_model(base))
        held = self._own.shapes
        self.adapter = separate_adapter(manifest, path)
        self._held = {name for name in held if self.adapter is not None or not is_adapter(name)}
        self.shapes = _without_modules(self._base.shapes, manifest) if self._base else {}
        self.shapes |= {name: held[name] for name in held if name in self._held}
        self.balance, self.kept, self.read_kept = self._own.balance, self._own.kept, self._own.read_kept
        config = adapter_of(manifest, path)
        read = self._read_part if config is None or config.base == "full" else self._read_rounded
        self._merged = {} if config is None else merged(list(held), read, config)

    def __enter__(self) -> "ModelReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._own.__exit__()
        self._stack.close()

    def read(self, name: str) -> torch.Tensor:
        """Reads a whole weight. Raises CheckpointError for a name that the model does not have."""
        return self._merged[name]() if name in self._merged else self._read_part(name)

    def _read_rounded(self, name: str) -> torch.Tensor:
        """Reads a weight with the values that the adapters were trained on, or a parameter of an adapter."""
        tensor = self._read_part(name)
        return tensor if is_adapter(name) else nf4.quantized(tensor).tensor()

    def _read_part(self, name: str) -> torch.Tensor:
        """Reads a weight without what adapters add to it, or a parameter of an adapter."""
        if self._base is None or name in self._held or is_adapter(name):
            return self._own.read(name)
        return self._base.read(name)
