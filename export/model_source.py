"""Opens a trained model from a run directory, one of its checkpoints, an imported model or a Hugging Face folder.

The model's config, weights, tokenizer, chat template and data plan are found through the run itself, also after it was
moved (pretrain/checkpoint/lineage.py).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.adapters import AdapterConfig
from configs.checkpoint_folders import directory, steps
from configs.files import file_sha256
from configs.loader import ConfigError, validate
from configs.model import ModelConfig
from launch.environment import is_main

if TYPE_CHECKING:
    import torch

    from pretrain.generation.text_codec import TextCodec

COMPARED_BYTES = 1e9  # an export with no more weights than this is compared with its checksums before it is used
# Files of a tokenizer as transformers writes it, which an import copies if Trivium can use none of them.
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Weights:
    """The tensors of a model while its files are open: shapes by name, and a function that reads one of them.

    `kept` are the names of tensors of an imported file that Trivium computes nothing with, and `kept_keys` the keys of
    its config.json that say what they are.
    """

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], "torch.Tensor"]
    kept: tuple[str, ...] = ()
    kept_keys: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelSource:
    """A trained model on disk.

    `weights` opens its tensors by Trivium's names; those of a checkpoint are verified by checksum. `identify` returns a
    hash of weights and config. `context` is the longest sequence, in tokens, that it was trained on. `plan` is the data
    plan that it was trained on; if that is gone or has changed, `plan` is None and `lost_plan` is its former path.
    `architecture` is transformers' class that it, or the model it was trained from, was imported as, `token_ids` and
    `generation` the ids and the generation_config.json that came with that, and `run_config` the config of the run that
    trained it. `imported_from` is the folder that it was imported from and not trained since. `adapter` describes
    adapters among its weights that cannot be merged into the others.
    """

    path: Path
    step: int
    model: ModelConfig
    weights: Callable[[], AbstractContextManager[Weights]]
    identify: Callable[[], str]
    context: int
    tokenizer: Path | None
    plan: Path | None = None
    chat_template: str | None = None
    lost_plan: str | None = None
    architecture: str | None = None
    token_ids: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    imported_from: str | None = None
    run_config: dict[str, Any] = field(default_factory=dict)
    adapter: AdapterConfig | None = None

    def read(self) -> "dict[str, torch.Tensor]":
        """Reads all weights in fp32, by Trivium's names."""
        with self.weights() as weights:
            return {name: weights.read(name).float() for name in weights.shapes}

    def tokenizer_files(self) -> list[Path]:
        """Returns the tokenizer that the model was trained with, or the files that came with an imported one."""
        if self.tokenizer is not None or self.architecture is None:
            return [self.need_tokenizer()]
        from pretrain.checkpoint.storage import run_of

        return [file for name in TOKENIZER_FILES if (file := run_of(self.path) / name).is_file()]

    def need_tokenizer(self) -> Path:
        """Returns the tokenizer's path. Raises ConfigError if the model has none."""
        if self.tokenizer is None:
            raise ConfigError(
                f"{self.path} does not say which tokenizer it was trained with; a run of `trivium train` does, and an "
                "imported model whose folder had a tokenizer that Trivium can use"
            )
        return self.tokenizer

    def need_logits(self) -> None:
        """Raises ConfigError if the model is a reward model, which gives values and no logits."""
        if not self.model.has_logits:
            raise ConfigError(f"{self.path} is a reward model, which writes no text; name a language model")

    def codec(self) -> "TextCodec":
        """Returns the codec of the model's tokenizer.

        Raises ValueError if it has more tokens than the model, ConfigError if the chat template cannot be used.
        """
        from pretrain.generation.text_codec import TextCodec

        ends = self.token_ids.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends] if isinstance(ends, int) else []
        codec = TextCodec(self.need_tokenizer(), self.chat_template, ends)
        if codec.tokenizer.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"{self.tokenizer} has {codec.tokenizer.vocab_size} tokens and the model in {self.path} "
                f"{self.model.vocab_size}; put the tokenizer that it was trained with there"
            )
        if self.chat_template is not None:
            try:
                codec.chat.check()
            except ValueError as error:
                raise ConfigError(f"{self.path}: {error}") from None
        return codec


def check_source(path: str | Path, step: int | str = "latest") -> None:
    """Raises ConfigError if there is no model at `path`, or no such checkpoint. Imports no torch, and reads no file."""
    path = Path(path)
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise ConfigError(f"{path} {found}; name a run directory, a checkpoint or an imported model")
    if (path / "config.json").is_file() or (path / "manifest.json").is_file():
        return
    if (path / "adapter_config.json").is_file():
        raise ConfigError(
            f"{path} is an adapter in PEFT's format; make a run of it with its base: trivium import {path} OUT --base "
            "FOLDER"
        )
    if path.absolute().name == "checkpoints" and steps(path.parent):
        raise ConfigError(f"{path} is the folder of a run's checkpoints; name the run, {path.parent}, or one of them")
    if not (path / "checkpoints").is_dir():
        raise ConfigError(f"{path} has no checkpoints folder and no config.json; train first, or name another run")
    if step != "latest" and not directory(path, step).is_dir():
        raise ConfigError(
            f"step = {step} has no checkpoint in {path}; saved steps are {steps(path) or 'none'}: give one of them, or "
            "leave it out for the newest"
        )


def open_source(path: str | Path, step: int | str = "latest") -> ModelSource:
    """Opens the model at `path` without reading its weights.

    Raises ConfigError as `check_source`, CheckpointError if a part of the model is missing or was replaced.
    """
    check_source(path, step)
    path = Path(path)
    if (path / "config.json").is_file():
        return _hugging_face(path)
    if (path / "manifest.json").is_file():
        return _checkpoint(path, verified=False)
    if step != "latest":
        return _checkpoint(directory(path, step), verified=False)
    from pretrain.checkpoint.storage import latest
    from pretrain.checkpoint.whole_model import verify

    return _checkpoint(latest(path, verify, _warn))


def _warn(said: str) -> None:
    if is_main():
        print(f"warning: {said}", file=sys.stderr, flush=True)


def _checkpoint(checkpoint: Path, verified: bool = True) -> ModelSource:
    from pretrain.checkpoint import read_manifest
    from pretrain.checkpoint.lineage import Lineage
    from pretrain.checkpoint.storage import run_of
    from pretrain.checkpoint.whole_model import separate_adapter

    manifest = read_manifest(checkpoint)
    lineage = Lineage.of_checkpoint(checkpoint, manifest)
    plan = lineage.plan.find(run_of(checkpoint)) if lineage.plan else None
    imported, adapter = lineage.imported or {}, separate_adapter(manifest, checkpoint)
    model = validate(ModelConfig, manifest["config"]["model"], origin=f"{checkpoint}, [model]")
    return ModelSource(
        path=checkpoint,
        step=int(manifest["step"]),
        model=model,
        weights=lambda: _checkpoint_weights(checkpoint),
        identify=lambda: _identity(checkpoint, verified),
        context=lineage.context if adapter is None else adapter.longest_row(model, lineage.context),
        tokenizer=lineage.tokenizer,
        plan=plan,
        chat_template=lineage.chat_template,
        lost_plan=lineage.plan.path if lineage.plan and plan is None else None,
        architecture=imported.get("architecture"),
        token_ids=imported.get("token_ids", {}),
        generation=imported.get("generation", {}),
        imported_from=imported.get("source") if "train" not in manifest["config"] else None,
        run_config=manifest["config"],
        adapter=adapter,
    )


def _identity(checkpoint: Path, verified: bool) -> str:
    """Returns the checksum of a manifest, which has those of all files; these are compared unless they are `verified`.

    Raises CheckpointError for a file that is missing or changed.
    """
    from pretrain.checkpoint.whole_model import verify

    if not verified:
        verify(checkpoint)
    return file_sha256(checkpoint / "manifest.json")


@contextmanager
def _checkpoint_weights(checkpoint: Path) -> Iterator[Weights]:
    """Opens the tensors of a checkpoint of any layout, adapters merged, after checking every file's checksum."""
    from pretrain.checkpoint.whole_model import ModelReader, verify

    kept_keys = verify(checkpoint).get("kept_keys", {})
    with ModelReader(checkpoint) as reader:
        kept = tuple(reader.kept)

        def read(name: str) -> "torch.Tensor":
            if name in kept:
                return reader.read_kept(name)
            return reader.balance[name] if name in reader.balance else reader.read(name)

        shapes = reader.shapes | {name: tuple(tensor.shape) for name, tensor in reader.balance.items()}
        yield Weights(shapes, read, kept, kept_keys)


def _hugging_face(path: Path) -> ModelSource:
    """Opens a Hugging Face folder as `trivium import` would convert it, such as an export of Trivium."""
    from data_pipeline.tokens.foreign import template_in
    from export.hf_folder import FolderTensors, content_sha256, facts_of, open_hf_folder, tokenizer_of_folder
    from export.publishing import check_export

    check_export(path, COMPARED_BYTES)
    opened, tokenizer = open_hf_folder(path), tokenizer_of_folder(path)
    facts, tensors = facts_of(path, opened), FolderTensors(opened)
    return ModelSource(
        path=path,
        step=0,
        model=opened.model,
        weights=lambda: nullcontext(Weights(tensors.shapes, tensors.read)),
        identify=lambda: content_sha256(path),
        context=opened.family.longest_row(opened.raw),
        tokenizer=Path(tokenizer.origin) if tokenizer else None,
        chat_template=template_in(path),
        architecture=facts["architecture"],
        token_ids=facts["token_ids"],
        generation=facts["generation"],
    )
