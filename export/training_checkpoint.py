"""Opens checkpoints of other trainers for `trivium import`: torch's DCP, e.g. of torchtitan, and megatron-core's.

Such a checkpoint holds tensors alone. A Hugging Face folder with a config.json says of which model they are, and has
its tokenizer. The optimizer's state and everything else that belongs to the other trainer is left out.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch

from configs.model import ModelConfig
from export.conversion.families.other_trainers import MEGATRON, MEGATRON_SPLIT, TORCHTITAN
from export.conversion.family_registry import family_of_config
from export.conversion.table import Family
from export.conversion.walk import ConversionError, embedding_name, fit, head_name
from export.dcp_folder import METADATA, DcpFolder
from export.hf_folder import HF_CONFIG, HFFolder, head_problems, read_json
from export.tensors import TensorFolder

Kind = Literal["dcp", "megatron"]
_WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_STACKED = re.compile(r"decoder\.layers\.(?!\d+\.)")
# Other names of megatron-core for the same tensors, of layers without TransformerEngine.
_SAME = (
    (re.compile(r"\.input_layernorm\.weight$"), ".self_attention.linear_qkv.layer_norm_weight"),
    (re.compile(r"\.pre_mlp_layernorm\.weight$"), ".mlp.linear_fc1.layer_norm_weight"),
)


class CheckpointTensors(TensorFolder):
    """The model's tensors of a checkpoint, by the names of one table, a layer at a time.

    Rows of the vocabulary that fill it up to a multiple are left out.
    """

    def __init__(self, dcp: DcpFolder, prefix: str, table: Family, vocabulary: int):
        super().__init__(dcp.folder)
        self._dcp, self._vocabulary = dcp, vocabulary
        self._other_names = _SAME if table in (MEGATRON, MEGATRON_SPLIT) else ()
        self._stored_as: dict[str, tuple[str, int | None]] = {}
        self._tables = (embedding_name(table), head_name(table))
        for name in dcp.shapes:
            if name.startswith(prefix):
                self._add(name, _WRAPPERS.sub("", name.removeprefix(prefix)))

    def _add(self, stored: str, name: str) -> None:
        for pattern, other in self._other_names:
            name = pattern.sub(other, name)
        shape = self._dcp.shapes[stored]
        if _STACKED.match(name):
            for layer in range(shape[0] if shape else 0):
                each = _STACKED.sub(f"decoder.layers.{layer}.", name)
                self._stored_as[each], self.shapes[each] = (stored, layer), shape[1:]
            return
        if name in self._tables and shape[0] > self._vocabulary:
            shape = (self._vocabulary, *shape[1:])
        self._stored_as[name], self.shapes[name] = (stored, None), shape

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor by its name."""
        stored, layer = self._stored_as[name]
        whole = self._dcp.read(stored, layer)
        return whole[: self._vocabulary] if name in self._tables else whole


def open_checkpoint(directory: Path, kind: Kind, described: Path) -> HFFolder:
    """Opens a checkpoint, of a model that the config.json in `described` describes.

    Raises one ConversionError that names everything wrong with the config and the tensors.
    """
    if not (described / HF_CONFIG).is_file():
        raise ConversionError(
            [
                f"{described} has no {HF_CONFIG}, and a checkpoint does not say what its model computes; give --config "
                "a folder with the model's config.json and tokenizer, as on the Hugging Face hub"
            ]
        )
    raw = read_json(described / HF_CONFIG)
    try:
        family = family_of_config(raw)
    except ValueError as error:
        raise ConversionError([str(error)]) from None
    model, problems = family.read(raw)
    try:
        dcp = DcpFolder(_found(directory))
    except ValueError as error:
        raise ConversionError([*problems, str(error)]) from None
    if missing := dcp.missing_files():
        problems.append(f"{dcp.folder} lacks {', '.join(missing)}, which its {METADATA} names; fetch them again")
    if model is None:
        raise ConversionError(problems)
    problems += _unsupported(model, kind)
    table, prefix = _table(dcp.shapes, kind, family)
    if table is None:
        raise ConversionError([*problems, _without_embedding(dcp, kind, family)])
    tensors = CheckpointTensors(dcp, prefix, table, model.vocab_size)
    others = () if prefix else (r"(optimizer|optim|chained_\d+|rng_state|lr_scheduler|train_state|dataloader)\b.*",)
    tensors.shapes = {
        name: shape for name, shape in tensors.shapes.items() if not any(re.fullmatch(p, name) for p in others)
    }
    tensors.files = dict.fromkeys(tensors.shapes, METADATA)
    fitted = fit(table, model, tensors.shapes)
    problems += fitted.problems
    if model.tie_embeddings and not problems:
        problems += head_problems(table, tensors, fitted)
    if problems:
        raise ConversionError(problems)
    return HFFolder(raw, family, model, tensors, fitted)


def _table(names: Iterable[str], kind: Kind, family: Family) -> tuple[Family | None, str]:
    """Returns the conversion table that fits the checkpoint's name of the embedding, and the prefix of all names."""
    split = any(name.endswith("mlp.linear_fc1.weight_w") for name in names)
    tables = (MEGATRON_SPLIT if split else MEGATRON,) if kind == "megatron" else (TORCHTITAN, family)
    for table in tables:
        embedding = embedding_name(table)
        for name in names:
            plain = _WRAPPERS.sub("", name)
            if plain.endswith(embedding) and not plain.startswith("optim"):
                return table, plain.removesuffix(embedding)
    return None, ""


def _without_embedding(dcp: DcpFolder, kind: Kind, family: Family) -> str:
    other: Kind = "dcp" if kind == "megatron" else "megatron"
    remedy = "save it by the names of torchtitan, transformers or megatron-core"
    if _table(dcp.shapes, other, family)[0] is not None:
        remedy = f"they are those of the other format: give --from {other}"
    names = ", ".join(list(dcp.shapes)[:5]) or "none"
    return f"{dcp.folder} has no embedding that --from {kind} knows by its name; its tensors are {names}; {remedy}"


def _unsupported(model: ModelConfig, kind: Kind) -> list[str]:
    if model.moe is None:
        return []
    return [
        f"the config.json has experts, and of {kind} checkpoints only LLaMA shapes are read; save the model with "
        "transformers and import that folder"
    ]


def _found(directory: Path) -> Path:
    """Returns the folder of the newest step, where `directory` is that of a run of megatron-core."""
    latest = directory / "latest_checkpointed_iteration.txt"
    if (directory / METADATA).is_file() or not latest.is_file():
        return directory
    step = latest.read_text(encoding="utf-8").strip()
    return directory / (f"iter_{int(step):07d}" if step.isdigit() else step)
