"""Opens a trained model from a run directory, one of its checkpoints, an imported folder or a Hugging Face folder.

The model's config, weights, tokenizer, chat template and data plan are found through the run itself, also after it was
moved (pretrain/checkpoint/lineage.py).
"""

import hashlib
import json
import tomllib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from configs.files import file_sha256
from configs.loader import ConfigError, validate
from configs.model import ModelConfig
from data_pipeline.tokens.tokenizer import HUGGINGFACE_FILE, SENTENCEPIECE_FILE, tokenizer_file
from export.conversion.walk import KEPT, ConversionError
from export.tensors import scan_tensors, tensor_files

if TYPE_CHECKING:
    from export.chat_codec import TextCodec

CHAT_TEMPLATE = "chat_template.jinja"
IMPORTED, HF_CONFIG = "model.toml", "config.json"
GENERATION = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Files of a tokenizer as transformers writes it, which an import copies.
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
    read: Callable[[str], torch.Tensor]
    kept: tuple[str, ...] = ()
    kept_keys: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelSource:
    """A trained model on disk.

    `weights` opens its tensors by Trivium's names; those of a checkpoint are verified by checksum. `identify` returns a
    hash of weights and config. `context` is the longest sequence, in tokens, that it was trained on. `plan` is the data
    plan that it was trained on; if that is gone or has changed, `plan` is None and `lost_plan` is its former path.
    `architecture` is transformers' class that it was imported as, `token_ids` and `generation` the ids and the
    generation_config.json that came with it, and `run_config` the config of the run that trained it.
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
    run_config: dict[str, Any] = field(default_factory=dict)

    def read(self) -> dict[str, torch.Tensor]:
        """Reads all weights in fp32, by Trivium's names."""
        with self.weights() as weights:
            return {name: weights.read(name).float() for name in weights.shapes}

    def tokenizer_files(self) -> list[Path]:
        """Returns the tokenizer that the model was trained with, or the files that came with an imported one."""
        if self.tokenizer is not None or self.architecture is None:
            return [self.need_tokenizer()]
        return [self.path / name for name in TOKENIZER_FILES if (self.path / name).is_file()]

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

        ends = self.token_ids.get("eos_token_id")
        codec = TextCodec(self.need_tokenizer(), self.chat_template, ends if isinstance(ends, list) else ())
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
    from pretrain.checkpoint import read_manifest
    from pretrain.checkpoint.lineage import Lineage
    from pretrain.checkpoint.storage import run_of

    manifest = read_manifest(checkpoint)
    lineage = Lineage.of_checkpoint(checkpoint, manifest)
    plan = lineage.plan.find(run_of(checkpoint)) if lineage.plan else None
    return ModelSource(
        path=checkpoint,
        step=int(manifest["step"]),
        model=validate(ModelConfig, manifest["config"]["model"], origin=f"{checkpoint}, [model]"),
        weights=lambda: _checkpoint_weights(checkpoint),
        identify=lambda: file_sha256(checkpoint / "manifest.json"),  # the manifest has the checksums of all files
        context=lineage.context,
        tokenizer=lineage.tokenizer,
        plan=plan,
        chat_template=lineage.chat_template,
        lost_plan=lineage.plan.path if lineage.plan and plan is None else None,
        run_config=manifest["config"],
    )


@contextmanager
def _checkpoint_weights(checkpoint: Path) -> Iterator[Weights]:
    """Opens the tensors of a checkpoint of any layout, after checking every file's checksum."""
    from pretrain.checkpoint.storage import Reader, verify

    balance = verify(checkpoint).get("balance", {})
    with Reader(checkpoint) as reader:
        shapes = {name: tuple(entry["shape"]) for name, entry in reader.manifest["parameters"].items()}

        def read(name: str) -> torch.Tensor:
            return torch.tensor(balance[name]) if name in balance else reader.read(name)

        yield Weights(shapes | {name: (len(values),) for name, values in balance.items()}, read)


def _imported(path: Path) -> ModelSource:
    tree = tomllib.loads((path / IMPORTED).read_text(encoding="utf-8"))
    model = validate(ModelConfig, tree["model"], origin=str(path / IMPORTED))
    template, generation = path / CHAT_TEMPLATE, path / GENERATION
    return ModelSource(
        path=path,
        step=0,
        model=model,
        weights=lambda: _imported_weights(path, tree["import"]),
        identify=lambda: _hash_of_files([path / IMPORTED, *tensor_files(path)]),
        context=int(tree["import"]["max_positions"]),
        tokenizer=_imported_tokenizer(path, tree["import"]),
        chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
        architecture=tree["import"].get("architecture"),
        token_ids=tree["import"].get("token_ids", {}) | dict.fromkeys(tree["import"].get("no_token_ids", [])),
        generation=json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {},
    )


@contextmanager
def _imported_weights(path: Path, facts: dict[str, Any]) -> Iterator[Weights]:
    """Opens the tensors of an imported folder, apart from those that are only kept."""
    found = scan_tensors(path)
    if found.problems:
        raise ConversionError(found.problems)
    kept = tuple(name.removeprefix(KEPT) for name in found.shapes if name.startswith(KEPT))
    shapes = {name: shape for name, shape in found.shapes.items() if shape and not name.startswith(KEPT)}

    def read(name: str) -> torch.Tensor:
        return found.read(KEPT + name if name in kept else name)

    yield Weights(shapes, read, kept, dict(facts.get("kept", {})))


def _hugging_face(path: Path) -> ModelSource:
    """Opens a Hugging Face folder as `trivium import` would convert it, such as an export of Trivium."""
    from export.hf_folder import open_hf_folder
    from export.import_hf import tokenizer_sha256

    opened = open_hf_folder(path)
    template = path / CHAT_TEMPLATE
    shapes = {name: shape for entry in opened.fit.walked for name, shape in entry.ours.items()}
    return ModelSource(
        path=path,
        step=0,
        model=opened.model,
        weights=lambda: nullcontext(Weights(shapes, opened.reader())),
        identify=lambda: _hash_of_files([path / HF_CONFIG, *tensor_files(path)]),
        context=opened.family.longest_row(opened.raw),
        tokenizer=tokenizer_file(path) if tokenizer_sha256(path) else None,
        chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
        architecture=opened.family.architecture,
    )


def _imported_tokenizer(path: Path, facts: dict[str, Any]) -> Path | None:
    """Returns the path of the tokenizer that came with the weights. Raises ConfigError if another one is there."""
    expected = facts.get("tokenizer_sha256")
    file = tokenizer_file(path) if expected else path / SENTENCEPIECE_FILE
    other = path / HUGGINGFACE_FILE
    if expected and other.is_file() and file_sha256(other) == expected:
        return other
    if expected == "":  # what there is came with the weights, and Trivium cannot use it
        return None
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
