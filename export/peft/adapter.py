"""An adapter as Trivium has it and as PEFT has it, and the model that it belongs to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from configs.adapters import AdapterConfig
from configs.model import ModelConfig
from export.conversion.table import Family

PREFIX = "base_model.model."  # begins the names of all tensors in adapter_model.safetensors


class PeftError(ValueError):
    """Error for an adapter that one of the two formats cannot express, or that belongs to another model."""


@dataclass(frozen=True)
class Base:
    """The model that an adapter belongs to: `read` returns one of its weights by Trivium's name."""

    family: Family
    model: ModelConfig
    read: Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class OwnAdapter:
    """An adapter of Trivium: its config, and its tensors by global name."""

    config: AdapterConfig
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter of PEFT: the content of adapter_config.json, and of adapter_model.safetensors."""

    config: dict[str, Any]
    tensors: Mapping[str, torch.Tensor]


class Form(Protocol):
    """A method of tuning that both PEFT and Trivium have: `peft_type` there, one of `kinds` in `[adapter]` here."""

    @property
    def kinds(self) -> tuple[str, ...]: ...

    @property
    def peft_type(self) -> str: ...

    def check(self, adapter: AdapterConfig, model: ModelConfig) -> None:
        """Raises PeftError if the format has no adapter like this one of the model."""
        ...

    def write(self, adapter: OwnAdapter, base: Base) -> PeftAdapter:
        """Returns the adapter in PEFT's format. Raises PeftError for what that cannot say."""
        ...

    def read(self, adapter: PeftAdapter, base: Base) -> OwnAdapter:
        """Returns the adapter in Trivium's form. Raises PeftError for what that cannot say, or for another base."""
        ...
