"""Converts a ModelConfig to the config.json of its family in transformers, and back.

What a key means, and what transformers takes where it is absent, is in the families' tables (export/conversion).
"""

from typing import Any

from configs.model import ModelConfig
from export.conversion.family_registry import family_of, family_of_config
from export.conversion.walk import ConversionError


def to_hf_config(
    config: ModelConfig,
    context: int,
    dtype: str,
    bos_id: int | None,
    eos_id: int | list[int] | None,
    pad_id: int | None,
    architecture: str | None = None,
) -> dict[str, Any]:
    """Returns the content of config.json, which versions 4 and 5 of transformers read.

    `context` is the longest row that the model was trained on, `dtype` torch's name for the dtype of the files, e.g.
    "float32". `architecture` is preferred if it can express the model. Raises ValueError if no family can.
    """
    return family_of(config, architecture).write(config, context) | {
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        # Version 5 of transformers writes dtype; version 4, vLLM and llama.cpp read torch_dtype.
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def from_hf_config(raw: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig of config.json's content. Raises one ValueError naming every key that is not right."""
    config, problems = family_of_config(raw).read(raw)
    if problems or config is None:
        raise ConversionError(problems)
    return config
