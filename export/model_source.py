"""Opens a trained model from a run directory, one of its checkpoints, an imported folder or a Hugging Face folder.

The model's config, weights, tokenizer, chat template and data plan are found through the run itself, also after it was
moved (pretrain/checkpoint/lineage.py).
"""

import hashlib
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from configs.files import file_sha256
from configs.loader import ConfigError, validate
from configs.model import ModelConfig
from data_pipeline.tokens.tokenizer import SENTENCEPIECE_FILE, tokenizer_file
from export.tensors import open_tensors, tensor_files

if TYPE_CHECKING:
    from export.chat_codec import TextCodec

CHAT_TEMPLATE = "chat_template.jinja"
IMPORTED, HF_CONFIG = "model.toml", "config.json"


@dataclass(frozen=True)
class ModelSource:
    """A trained model on disk.

    `read` returns its weights by Trivium's names; those of a checkpoint are verified by checksum. `identify` returns a
    hash of weights and config. `context` is the longest sequence, in tokens, that it was trained on. `plan` is the data
    plan that it was trained on; if that is gone or has changed, `plan` is None and `lost_plan` is its former path.
    """

    path: Path
    step: int
    model: ModelConfig
    read: Callable[[], dict[str, torch.Tensor]]
    identify: Callable[[], str]
    context: int
    tokenizer: Path | None
    plan: Path | None = None
    chat_template: str | None = None
    lost_plan: str | None = None

    def need_tokenizer(self) -> Path:
        """Returns the tokenizer's path. Raises ConfigError if the model has none."""
        if self.tokenizer is None:
            raise ConfigError(
                f"{self.path} does not say which tokenizer it was trained with; a run of `trivium train` does, and an "
                "imported folder that had a tokenizer of Trivium"
            )
        return self.tokenizer

    def codec(self) -> "TextCodec":
        """Returns the codec of the model's tokenizer. Raises ValueError if it has more tokens than the model."""
        from export.chat_codec import TextCodec

        codec = TextCodec(self.need_tokenizer(), self.chat_template)
        if codec.tokenizer.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"{self.tokenizer} has {codec.tokenizer.vocab_size} tokens and the model in {self.path} "
                f"{self.model.vocab_size}; put the tokenizer that it was trained with there"
            )
        return codec


def open_source(path: str | Path, step: int | str = "latest") -> ModelSource:
    """Opens the model at `path` without reading its weights.

    Raises ConfigError if there is no model at `path`, CheckpointError if a part of it is missing or was replaced.
    """
    path = Path(path)
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise ConfigError(f"{path} {found}; name a run directory, a checkpoint or an imported model")
    if (path / IMPORTED).is_file():
        return _imported(path)
    if (path / HF_CONFIG).is_file():
        return _hugging_face(path)
    if (path / "manifest.json").is_file():
        return _checkpoint(path)
    if not (path / "checkpoints").is_dir():
        raise ConfigError(f"{path} has no checkpoints folder and no {IMPORTED}; train first, or name another run")
    if step == "latest":
        from pretrain.checkpoint import latest

        return _checkpoint(latest(path))
    checkpoint = path / "checkpoints" / f"step_{step}"
    if not checkpoint.is_dir():
        saved = sorted(int(p.name[5:]) for p in (path / "checkpoints").glob("step_*") if p.name[5:].isdigit())
        raise ConfigError(f"step = {step} has no checkpoint in {path}; saved steps are {saved or 'none'}")
    return _checkpoint(checkpoint)


def _checkpoint(checkpoint: Path) -> ModelSource:
    from pretrain.checkpoint import read_full, read_manifest
    from pretrain.checkpoint.lineage import Lineage
    from pretrain.checkpoint.storage import run_of

    manifest = read_manifest(checkpoint)
    lineage = Lineage.of_checkpoint(checkpoint, manifest)
    plan = lineage.plan.find(run_of(checkpoint)) if lineage.plan else None
    return ModelSource(
        path=checkpoint,
        step=int(manifest["step"]),
        model=validate(ModelConfig, manifest["config"]["model"], origin=f"{checkpoint}, [model]"),
        read=lambda: read_full(checkpoint),
        identify=lambda: file_sha256(checkpoint / "manifest.json"),  # the manifest has the checksums of all files
        context=lineage.context,
        tokenizer=lineage.tokenizer,
        plan=plan,
        chat_template=lineage.chat_template,
        lost_plan=lineage.plan.path if lineage.plan and plan is None else None,
    )


def _imported(path: Path) -> ModelSource:
    tree = tomllib.loads((path / IMPORTED).read_text(encoding="utf-8"))
    model = validate(ModelConfig, tree["model"], origin=str(path / IMPORTED))
    names, read = open_tensors(path)
    template = path / CHAT_TEMPLATE
    return ModelSource(
        path=path,
        step=0,
        model=model,
        read=lambda: {name: read(name).float() for name in sorted(names)},
        identify=lambda: _hash_of_files([path / IMPORTED, *tensor_files(path)]),
        context=int(tree["import"]["max_positions"]),
        tokenizer=_imported_tokenizer(path, tree["import"]),
        chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
    )


def _hugging_face(path: Path) -> ModelSource:
    """Opens a Hugging Face folder as `trivium import` would convert it, such as an export of Trivium."""
    from export.families import from_hf
    from export.import_hf import read_facts

    facts = read_facts(path)
    names, read = open_tensors(path)
    template = path / CHAT_TEMPLATE
    return ModelSource(
        path=path,
        step=0,
        model=facts.model,
        read=lambda: {name: tensor.float() for name, tensor in from_hf(read, names, facts.model)},
        identify=lambda: _hash_of_files([path / HF_CONFIG, *tensor_files(path)]),
        context=facts.max_positions,
        tokenizer=tokenizer_file(path) if facts.tokenizer_sha256 else None,
        chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
    )


def _imported_tokenizer(path: Path, facts: dict[str, Any]) -> Path | None:
    """Returns the path of the tokenizer that came with the weights. Raises ConfigError if another one is there."""
    expected = facts.get("tokenizer_sha256")
    file = tokenizer_file(path) if expected else path / SENTENCEPIECE_FILE
    found = file_sha256(file) if file.is_file() else ""
    if expected is None:
        raise ConfigError(f"{path} was imported by another version of Trivium; import its Hugging Face folder again")
    if found != expected:
        came = f"with a tokenizer of SHA-256 {expected[:12]}..." if expected else "without a tokenizer"
        raise ConfigError(
            f"the weights in {path} came {came}, and {file} {f'has {found[:12]}...' if found else 'is gone'}; import "
            "the Hugging Face folder again, with the model's own tokenizer in it"
        )
    return file if expected else None


def _hash_of_files(files: list[Path]) -> str:
    return hashlib.sha256("".join(f"{file.name} {file_sha256(file)}\n" for file in files).encode()).hexdigest()
