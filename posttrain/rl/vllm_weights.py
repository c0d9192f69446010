"""Weights of the model in training as a Hugging Face folder, as vLLM reads it: config.json and safetensors alone."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from configs.files import write_atomic
from configs.model import ModelConfig
from export.conversion.family_registry import family_of
from export.conversion.walk import convert, entries
from export.hf_config import to_hf_config
from export.tensors import write_tensors

SHARD_BYTES = 5 * 10**9
HEAD, EMBEDDING = "lm_head.weight", "embedding.weight"


class FolderWriter:
    """Writer of folders of one model, as the class of transformers that `architecture` names, or that can express it.

    `context` is the longest text, in tokens. A head that is the embedding is written as one of its own: on a processor
    vLLM 0.32 packs weights for its kernels, and packs a tied head only once, whatever weights come later. Raises
    ValueError if no class can express the model.
    """

    def __init__(self, model: ModelConfig, architecture: str | None, context: int) -> None:
        self._is_tied, self._context = model.tie_embeddings, context
        self._model = model.model_copy(update={"tie_embeddings": False})
        self._family = family_of(self._model, architecture)

    @property
    def architecture(self) -> str:
        """The name of the class."""
        return self._family.architecture

    def write(self, read: Callable[[str], torch.Tensor], folder: Path) -> None:
        """Writes config.json and all weights, which `read` returns by Trivium's names."""
        dtype = str(read(EMBEDDING).dtype).removeprefix("torch.")
        config = to_hf_config(self._model, self._context, dtype, None, None, None, self.architecture)
        write_atomic(folder / "config.json", json.dumps(config).encode())
        walked = entries(self._family, self._model)

        def untied(name: str) -> torch.Tensor:
            return read(EMBEDDING).clone() if name == HEAD and self._is_tied else read(name)

        write_tensors(folder, convert(walked, untied, self._model, "theirs"), SHARD_BYTES)
