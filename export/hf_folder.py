"""Opens a Hugging Face model directory, and finds everything that is wrong with it before a tensor is converted."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.model import ModelConfig
from export.conversion.registry import family_of_config
from export.conversion.table import Family
from export.conversion.walk import KEPT, ConversionError, Fit, convert, embedding_name, fit, head_name
from export.tensors import TensorFolder, scan_tensors


@dataclass(frozen=True)
class HFFolder:
    """A Hugging Face directory without faults: its family, model, tensors, and the content of its config.json."""

    raw: dict[str, Any]
    family: Family
    model: ModelConfig
    tensors: TensorFolder
    fit: Fit

    def converted(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (Trivium's name, tensor), layer by layer, and then what is kept, under names after "kept."."""
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


def open_hf_folder(directory: Path) -> HFFolder:
    """Opens a directory. Raises one ConversionError that names everything wrong with config.json, files and tensors."""
    raw = read_json(directory / "config.json")
    tensors = scan_tensors(directory)
    try:
        family = family_of_config(raw)
    except ValueError as error:
        raise ConversionError([str(error), *tensors.problems]) from None
    model, problems = family.read(raw)
    problems += tensors.problems
    if model is not None:
        problems += _vocabulary_problems(directory, model)
    fitted = None
    if model is not None and tensors.files:
        fitted = fit(family, model, tensors.shapes)
        problems += fitted.problems
        if model.tie_embeddings and not problems:
            problems += _head_problems(family, tensors, fitted)
    if problems or model is None or fitted is None:
        raise ConversionError(problems)
    return HFFolder(raw, family, model, tensors, fitted)


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object. Raises ConversionError if it is missing or holds anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError([f"{file.parent} has no {file.name}; name a Hugging Face model directory"]) from None
    except ValueError as error:
        raise ConversionError([f"{file} is not valid JSON: {error}"]) from None
    if not isinstance(found, dict):
        raise ConversionError([f"{file} holds no JSON object; fetch it again"])
    return found


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


def _head_problems(family: Family, tensors: TensorFolder, fitted: Fit) -> list[str]:
    """Returns a problem if a tied model's file has a head of its own that differs from the embedding."""
    head, embedding = head_name(family), embedding_name(family)
    if head not in tensors.files or torch.equal(tensors.read(head), tensors.read(fitted.names[embedding])):
        return []
    return [
        f"tie_word_embeddings = true, but {head} differs from {embedding}; set tie_word_embeddings = false in "
        "config.json if the head is its own"
    ]
