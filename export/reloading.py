"""An exported folder as transformers loads it, and the model that it must equal."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.model import ModelConfig
from export.conversion.table import Family
from pretrain.generation.text_codec import TextCodec
from pretrain.model import Decoder


@dataclass(frozen=True)
class Reference:
    """Model that the exported folder must equal, as the `family` that it is written as.

    `read` returns a tensor by Trivium's name in the dtype in which it is written. The decoder is made of these, and
    computes in fp32; it has the first layers of the model alone if no more are compared. `passages` are token ids on
    which logits are compared: held-out text, or the prompts if there is none. `context` is the context length, in
    tokens, that the folder must state; nothing longer is compared. A model that is written `as_it_came`, not trained
    since it was imported, may have a tokenizer that adds to a rendered dialogue the beginning that the template wrote.
    """

    config: ModelConfig
    family: Family
    read: Callable[[str], torch.Tensor]
    decoder: Decoder
    codec: TextCodec | None
    context: int
    passages: list[list[int]]
    held_out: bool
    prompts: list[list[int]]
    as_it_came: bool = False

    @property
    def compared(self) -> ModelConfig:
        """The model whose outputs are compared: all of it, or its first layers."""
        return self.decoder.model_config


@dataclass(frozen=True)
class Reloaded:
    """Model and tokenizer of the folder as transformers loads them; `loading` is its report on keys.

    The tokenizer is None if Trivium has none to compare it with.
    """

    model: Any
    tokenizer: Any
    loading: dict[str, Any]


def reload(folder: Path, reference: Reference, tokenizer: Path | None = None) -> Reloaded:
    """Loads model (fp32, on the CPU) and tokenizer from the folder with the Auto classes, without network.

    The tokenizer may be in a folder of its own.

    If only the first layers are compared, no others are loaded: from a folder of links with a config.json of fewer.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as shorter:
        path = folder
        if reference.compared.num_layers < reference.config.num_layers:
            path = Path(shorter)
            for file in folder.iterdir():
                (path / file.name).symlink_to(file.resolve())
            (path / "config.json").unlink()
            raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            raw |= reference.family.write(reference.compared, reference.context)
            (path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        auto: Any = AutoModelForCausalLM if reference.config.has_logits else AutoModelForSequenceClassification
        loaded: Any = auto.from_pretrained(path, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    model, loading = loaded
    if has_odd_experts(reference.config) and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    has_one = reference.codec is not None
    path = tokenizer or folder
    return Reloaded(
        model.eval(), AutoTokenizer.from_pretrained(path, local_files_only=True) if has_one else None, loading
    )


def has_odd_experts(config: ModelConfig) -> bool:
    """Tells whether experts have sizes that the kernel of transformers for them refuses, in fp32 or in bf16."""
    return config.moe is not None and any(size % 8 for size in (config.hidden_size, config.expert_size))
