"""Reads the whole model of a checkpoint that holds a part of it: adapters, or the weights that were not frozen.

Such a checkpoint names its base, the checkpoint that its run began from, which holds the rest and may have a base of
its own, see `adapter_base`. Adapters are merged into the weights that are read; the base stays as it is.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from configs.adapters import AdapterConfig
from configs.loader import validate
from configs.model import ModelConfig
from pretrain.checkpoint import storage
from pretrain.checkpoint.adapter_base import base_of, content_of
from pretrain.checkpoint.lineage import Pin
from pretrain.checkpoint.storage import CheckpointError, Reader
from pretrain.model import value_head
from pretrain.model.adapters import is_adapter, merged, nf4


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
        """Reads the tensor of a global name as it is on one rank, whatever layout wrote it."""
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
        if value_head.NAME in self._held:  # it has taken the place of the base's output head
            self.shapes.pop("lm_head.weight", None)
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
