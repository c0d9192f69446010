"""Opens a Hugging Face model directory, and finds everything that is wrong with it before a tensor is converted.

Training reads such a directory as well (`init.hf`), so this module and what it imports need nothing of the trainer.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.adapters import AdapterConfig
from configs.checkpoint_folders import MANIFEST, steps
from configs.files import file_sha256
from configs.loader import ConfigError
from configs.model import ModelConfig
from data_pipeline.tokens.tokenizer import HUGGINGFACE_FILE, SENTENCEPIECE_FILE, SPACE, Tokenizer
from export.conversion.family_registry import family_of_config
from export.conversion.table import Family
from export.conversion.walk import KEPT, ConversionError, Fit, convert, embedding_name, fit, head_name, modules_in
from export.publishing import check_export
from export.tensors import TensorFolder, scan_tensors, tensor_files

HF_CONFIG, GENERATION = "config.json", "generation_config.json"
FLOATS = ("F32", "BF16", "F16", "F64")  # of safetensors
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class HFFolder:
    """A Hugging Face directory without faults: its family, model, tensors, and the content of its config.json."""

    raw: dict[str, Any]
    family: Family
    model: ModelConfig
    tensors: TensorFolder
    fit: Fit

    def converted(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (Trivium's name, tensor), layer by layer, then the tensors that are only kept, named "kept." and so
        on.
        """
        yield from convert(self.fit.walked, self._read, self.model, to="ours")
        for name in self.fit.kept:
            yield KEPT + name, self.tensors.read(name)

    def reader(self) -> Callable[[str], torch.Tensor]:
        """Returns a function that reads a tensor by Trivium's name; those of one rule are read together."""
        entries = {name: entry for entry in self.fit.walked for name in entry.ours}
        read: dict[str, torch.Tensor] = {}

        def one(name: str) -> torch.Tensor:
            if name not in read:
                read.clear()
                read.update(convert([entries[name]], self._read, self.model, to="ours"))
            return read.pop(name)

        return one

    def _read(self, name: str) -> torch.Tensor:
        return self.tensors.read(self.fit.names[name])


class FolderTensors:
    """The weights of a Hugging Face directory by Trivium's names; `balance` is the router bias of its MoE layers."""

    adapter: AdapterConfig | None = None

    def __init__(self, opened: HFFolder):
        self.path = opened.tensors.folder
        self.shapes = {name: shape for entry in opened.fit.walked for name, shape in entry.ours.items()}
        self.read = opened.reader()
        self.balance = {name: self.read(name) for name in self.shapes if ".moe.balance." in name}


def open_hf_folder(directory: Path, check: bool = False) -> HFFolder:
    """Opens a directory. Raises one ConversionError that names everything wrong with config.json, files and tensors.

    With `check` it raises ConfigError as `check_export`, for a damaged export of Trivium.
    """
    if check:
        check_export(directory)
    if (directory / "adapter_config.json").is_file() and not (directory / HF_CONFIG).is_file():
        raise ConversionError(
            [
                f"{directory} is an adapter in PEFT's format; make a run of it with its base, and name that: trivium "
                f"import {directory} OUT --base FOLDER"
            ]
        )
    raw = read_json(directory / HF_CONFIG)
    tensors = scan_tensors(directory)
    try:
        family = family_of_config(raw)
    except ValueError as error:
        raise ConversionError([str(error), *tensors.problems]) from None
    model, problems = family.read(raw)
    problems += tensors.problems
    if model is not None:
        problems += _vocabulary_problems(directory, model)
        if family.further_layers:
            depth = modules_in(family, tensors.files, model.num_layers)
            model = model.model_copy(update={"head": model.head.model_copy(update={"mtp_depth": depth})})
    fitted = None
    if model is not None and tensors.files:
        fitted = fit(family, model, tensors.shapes)
        problems += fitted.problems
        problems += _dtype_problems(tensors, fitted)
        if not problems:
            problems += _copy_problems(model, tensors, fitted)
        if model.tie_embeddings and not problems:
            problems += head_problems(family, tensors, fitted)
    if problems or model is None or fitted is None:
        raise ConversionError(problems)
    return HFFolder(raw, family, model, tensors, fitted)


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object. Raises ConversionError if it is missing or holds anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConversionError([_what_it_is(file.parent, file.name)]) from None
    except ValueError as error:
        raise ConversionError([f"{file} is not valid JSON ({error}); fetch it again"]) from None
    if not isinstance(found, dict):
        raise ConversionError([f"{file} holds no JSON object; fetch it again"])
    return found


def _what_it_is(folder: Path, missing: str) -> str:
    """Says what a path is that lacks a file of a Hugging Face directory, and what to name instead."""
    if not folder.is_dir():
        fault = "is a file" if folder.exists() else "does not exist"
        return f"{folder} {fault}; name a Hugging Face model directory"
    if steps(folder) or (folder / MANIFEST).is_file():
        key = "run" if steps(folder) else "checkpoint"
        return f"{folder} is Trivium's own {key}, which needs no import; train from it with init.{key}={folder}"
    return f"{folder} has no {missing}; name a Hugging Face model directory"


def _vocabulary_problems(directory: Path, model: ModelConfig) -> list[str]:
    """Returns a problem if tokenizer.json has tokens that the model has no rows for."""
    file = directory / "tokenizer.json"
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = described["model"]["vocab"]
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
        last = max([*ids, *(int(token["id"]) for token in described.get("added_tokens") or [])])
    except (OSError, ValueError, KeyError, TypeError):
        return []  # whether Trivium can use the tokenizer is another question
    if last < model.vocab_size:
        return []
    return [
        f"{file} has tokens up to id {last}, and config.json says vocab_size = {model.vocab_size}; put the model's own "
        "tokenizer there"
    ]


def _dtype_problems(tensors: TensorFolder, fitted: Fit) -> list[str]:
    """Returns a problem if a tensor is not of floating point, or if tensors that are joined have different dtypes.

    The experts of a layer, which some folders store one by one, are joined in one tensor.
    """
    entries = [[fitted.names[name] for name in entry.theirs if name in fitted.names] for entry in fitted.walked]
    types = {name: tensors.dtypes.get(name, FLOATS[0]) for names in entries for name in names}
    if other := sorted(name for name, dtype in types.items() if dtype not in FLOATS):
        more = f" and {len(other) - 1} more" if len(other) > 1 else ""
        return [
            f"{other[0]} is {types[other[0]]}{more}, and weights are {', '.join(FLOATS[:-1])} or {FLOATS[-1]}; "
            "name a folder of the model that is not quantized"
        ]
    for names in entries:
        unlike = next((name for name in names if types[name] != types[names[0]]), None)
        if unlike is not None:
            return [
                f"{names[0]} is {types[names[0]]} and {unlike} is {types[unlike]}, which become one tensor; save the "
                "weights in one dtype, as by from_pretrained(..., dtype=...) and save_pretrained of transformers"
            ]
    return []


def head_problems(family: Family, tensors: TensorFolder, fitted: Fit) -> list[str]:
    """Returns a problem if a tied model's file has a head of its own that differs from the embedding."""
    head, embedding = head_name(family), embedding_name(family)
    if head not in tensors.files or torch.equal(tensors.read(head), tensors.read(fitted.names[embedding])):
        return []
    return [
        f"tie_word_embeddings = true, but {head} differs from {embedding}; set tie_word_embeddings = false in "
        "config.json if the head is its own"
    ]


def _copy_problems(model: ModelConfig, tensors: TensorFolder, fitted: Fit) -> list[str]:
    """Returns a problem for each embedding or head of a module of multi-token prediction that is not the model's."""
    names = {ours: theirs for entry in fitted.walked for ours, theirs in zip(entry.ours, entry.theirs, strict=False)}
    embedding = names["embedding.weight"]
    shared, found = {"embed_tokens": embedding, "shared_head.head": names.get("lm_head.weight", embedding)}, []
    for layer, (kind, name) in itertools.product(model.mtp_layers, shared.items()):
        for copy in (kept for kept in fitted.kept if kept.endswith(f"layers.{layer.index}.{kind}.weight")):
            if not torch.equal(tensors.read(copy), tensors.read(fitted.names[name])):
                found.append(
                    f"{copy} differs from {name}, which modules of multi-token prediction share with the model; "
                    f"remove all tensors of layers.{layer.index} from the files to import the model without its module"
                )
    return found


def facts_of(directory: Path, opened: HFFolder) -> dict[str, Any]:
    """Returns what an export of the model, or of one trained from it, has to know: architecture and special ids.

    `token_ids` has the ids that the directory states, None where it states that there is none.
    """
    generation = read_json(directory / GENERATION) if (directory / GENERATION).is_file() else {}
    # An empty generation_config.json says nothing, and does not take back what config.json says.
    ids = opened.raw | {name: value for name, value in generation.items() if value is not None}
    return {
        "source": str(directory),
        "architecture": opened.family.architecture,
        "token_ids": {name: ids[name] for name in TOKEN_IDS if name in ids},
        "generation": generation,
    }


def weight_files(directory: Path) -> list[Path]:
    """Returns the paths of config.json and of all files of weights."""
    return [directory / HF_CONFIG, *tensor_files(directory)]


def content_sha256(directory: Path) -> str:
    """Returns a SHA-256 of config.json and of all files of weights; it reads all of them."""
    files = weight_files(directory)
    return hashlib.sha256("".join(f"{file.name} {file_sha256(file)}\n" for file in files).encode()).hexdigest()


def tokenizer_of_folder(directory: Path) -> Tokenizer | None:
    """Returns the directory's tokenizer, None if it has none that Trivium can use; tokenizer.model comes first.

    Raises ConfigError if its two files of tokenizers have different vocabularies.
    """
    file, fast = directory / SENTENCEPIECE_FILE, directory / HUGGINGFACE_FILE
    if not file.is_file():
        return _usable(fast)
    vocabulary = read_json(fast).get("model", {}).get("vocab") if fast.is_file() else None
    if isinstance(vocabulary, dict):
        _check_same_pieces(file, fast, vocabulary)
    return _usable(file) or _usable(fast)  # the first puts a space before a text, for example, as LLaMA's does


def _check_same_pieces(file: Path, fast: Path, vocabulary: dict[str, int]) -> None:
    """Raises ConfigError if a sentencepiece model and the vocabulary of tokenizer.json have ids of different pieces."""
    import sentencepiece

    theirs = {number: piece for piece, number in vocabulary.items()}
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except RuntimeError:
        raise ConfigError(f"{file} is not a sentencepiece model; fetch it again, or remove it") from None
    for number in range(pieces.vocab_size()):
        piece = pieces.id_to_piece(number)
        if theirs.get(number, piece) not in (piece, piece.replace(SPACE, " ")):
            raise ConfigError(
                f"{file} and {fast} have different vocabularies (token {number} is {piece!r} and "
                f"{theirs[number]!r}), so one of them is another model's; put the right one there"
            )


def _usable(file: Path) -> Tokenizer | None:
    """Returns the tokenizer in a file, None if there is no file or Trivium cannot use it."""
    try:
        return Tokenizer.load(file, complete=False)
    except ValueError:
        return None
