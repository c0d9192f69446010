"""Writes the files of an exported folder, tensor by tensor, and builds the decoder that they are compared with."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from configs.adapters import AdapterConfig
from configs.export import ExportConfig
from configs.files import write_atomic
from configs.loader import plain, validate
from configs.model import ModelConfig
from configs.reward_model import RewardSection
from export.conversion.family_registry import family_of
from export.conversion.table import Family
from export.conversion.tensor_shapes import parameters
from export.conversion.values import labelled
from export.conversion.walk import ConversionError, convert, entries, problems
from export.hf_config import to_hf_config
from export.hf_folder import TOKEN_IDS
from export.hf_tokenizer import write_tokenizer
from export.model_source import ModelSource, Weights
from export.reloading import Reference
from export.tensors import write_tensors
from pretrain.model import Decoder, LayerContext
from pretrain.model.adapters import add_adapters

if TYPE_CHECKING:
    from export.checked_texts import Texts
    from pretrain.generation.text_codec import TextCodec


def write_model(source: ModelSource, weights: Weights, texts: "Texts", config: ExportConfig, folder: Path) -> Reference:
    """Writes weights, configs and tokenizer into `folder` and returns what the reloaded folder must equal."""
    model, weights = with_plain_head(source.model, weights)
    codec = texts.codec
    family = family_of(model, source.architecture)
    if not family.further_layers:
        model, weights = without_modules(model, weights)
    read = reader_as(config.dtype, family, model, weights)
    write_weights(family, model, weights, read, config.max_shard_gb, folder)

    dtype = str(read("embedding.weight").dtype).removeprefix("torch.")
    if codec is None:
        for file in source.tokenizer_files():
            shutil.copyfile(file, folder / file.name)
    else:
        template, as_it_came = source.chat_template, is_untrained(source)
        write_tokenizer(folder, source.need_tokenizer(), source.context, template, family.model_type, as_it_came)
    ids, generation = special_ids(source, codec)
    bos, eos, pad = (ids.get(name) for name in TOKEN_IDS)
    hf_config = to_hf_config(model, source.context, dtype, bos, eos, pad, family.architecture)
    # Of ids that an imported folder did not state, transformers' own are taken, before as after.
    hf_config = {key: value for key, value in hf_config.items() if key not in TOKEN_IDS or key in ids}
    files = {"config.json": hf_config | weights.kept_keys, "generation_config.json": generation}
    if not model.has_logits:
        files = {"config.json": hf_config | _of_classifier(source, bos, pad) | weights.kept_keys}
    for name, content in files.items():
        write_atomic(folder / name, (json.dumps(content, indent=2) + "\n").encode())
    return Reference(
        config=model,
        family=family,
        read=read,
        decoder=build_decoder(model, read, config.verify.layers),
        codec=codec,
        context=source.context,
        passages=texts.passages,
        held_out=texts.held_out,
        prompts=texts.prompts,
        as_it_came=is_untrained(source),
    )


def is_untrained(source: ModelSource) -> bool:
    """Whether a model is as it was imported."""
    return source.architecture is not None and "train" not in source.run_config


def special_ids(source: ModelSource, codec: "TextCodec | None") -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the ids of special tokens for config.json, and the content of generation_config.json.

    Those of an imported model are as they came; one that was trained since may end its answers with other tokens.
    """
    told = source.token_ids
    if codec is None or is_untrained(source):
        return dict(told), source.generation | {name: value for name, value in told.items() if value is not None}
    bos, eos = (number if number >= 0 else None for number in (codec.bos_id, codec.eos_id))
    ids: dict[str, Any] = dict(zip(TOKEN_IDS, (bos, eos, codec.pad_id), strict=True)) | told
    if source.architecture is None:
        return ids, ids | {"eos_token_id": codec.stop_ids}
    ends = ids["eos_token_id"]
    if codec.stop_ids != (ends if isinstance(ends, list) else [ends]):
        ids["eos_token_id"] = codec.stop_ids or None
    return ids, source.generation | {name: value for name, value in ids.items() if value is not None}


def _of_classifier(source: ModelSource, bos: int | None, pad: int | None) -> dict[str, Any]:
    """Returns the keys of config.json with which transformers reads a score from the last token and names it.

    transformers takes for padding what comes after the last token that is not `pad_token_id`. A model without a token
    for padding is given the one that begins a document, which no text ends with.
    """
    keys: dict[str, Any] = {} if pad is not None or bos is None else {"pad_token_id": bos}
    if trained := source.run_config.get("reward_model"):
        keys |= labelled(validate(RewardSection, trained).classes or ("reward",))
    return keys


def with_plain_head(model: ModelConfig, weights: Weights) -> tuple[ModelConfig, Weights]:
    """Returns a model that computes the same with a plain head, its rows divided by their lengths once (Baichuan 2).

    A head that was the embedding becomes one of its own. Models with a plain head are returned as they are.
    """
    if not model.head.normalized:
        return model, weights
    head = "lm_head.weight"
    origin = "embedding.weight" if model.tie_embeddings else head

    def read(name: str) -> torch.Tensor:
        if name != head:
            return weights.read(name)
        tensor = weights.read(origin)
        return F.normalize(tensor.float()).to(tensor.dtype)

    plain_head = {"tie_embeddings": False, "head": model.head.model_copy(update={"normalized": False})}
    shapes = {**weights.shapes, head: weights.shapes[origin]}
    return model.model_copy(update=plain_head), replace(weights, shapes=shapes, read=read)


def without_modules(model: ModelConfig, weights: Weights) -> tuple[ModelConfig, Weights]:
    """Returns a model without its modules of multi-token prediction, which most families cannot hold."""
    modules = tuple(f"layers.{layer.index}." for layer in model.mtp_layers)
    if not modules:
        return model, weights
    shapes = {name: shape for name, shape in weights.shapes.items() if not name.startswith(modules)}
    return model.without_mtp(), replace(weights, shapes=shapes)


def reader_as(dtype: str, family: Family, model: ModelConfig, weights: Weights) -> Callable[[str], torch.Tensor]:
    """Returns a function that reads a tensor, by Trivium's name, in the dtype in which it is written.

    With "auto" that is its own; otherwise it is `dtype`, but fp32 for tensors that the family keeps so.
    """
    fp32 = {name for entry in entries(family, model) if entry.keep_fp32 for name in entry.ours}

    def read(name: str) -> torch.Tensor:
        tensor = weights.read(name)
        return tensor if dtype == "auto" else tensor.to(torch.float32 if name in fp32 else getattr(torch, dtype))

    return read


def write_weights(
    family: Family,
    model: ModelConfig,
    weights: Weights,
    read: Callable[[str], torch.Tensor],
    max_shard_gb: float,
    folder: Path,
) -> None:
    """Writes all tensors as `read` returns them, layer by layer.

    Raises ConversionError naming all tensors of the checkpoint that are missing, extra or misshapen.
    """
    # The load of experts is a state of training.
    found = {name: shape for name, shape in weights.shapes.items() if not name.endswith(".moe.balance.load")}
    if said := problems(parameters(model), found, "the model of the config"):
        raise ConversionError(said)
    walked = entries(family, model)

    def kept(name: str) -> torch.Tensor | None:
        return weights.read(name) if name in weights.kept else None

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield from convert(walked, read, model, "theirs", kept)
        written = {name for entry in walked for name in entry.theirs}
        yield from ((name, weights.read(name)) for name in weights.kept if name not in written)

    write_tensors(folder, tensors(), int(max_shard_gb * 1e9))


def build_decoder(
    model: ModelConfig,
    read: Callable[[str], torch.Tensor],
    layers: int | None,
    adapter: AdapterConfig | None = None,
) -> Decoder:
    """Builds Trivium's decoder in fp32 from tensors read one by one, those of an adapter among them if there is one.

    It has the first `layers` alone if that is given.
    """
    model = model.without_mtp()  # outputs are those of the model itself
    compared = model if layers is None or layers >= model.num_layers else first_layers(model, layers)
    context = LayerContext(dtype=torch.float32)
    decoder = Decoder(compared, context=context).eval()
    if adapter is not None:
        add_adapters(decoder, adapter, context)
    with torch.no_grad():
        for name, tensor in {**dict(decoder.named_global_parameters()), **decoder.named_balance()}.items():
            if not name.endswith(".moe.balance.load"):
                tensor.copy_(read(name))
    return decoder


def first_layers(model: ModelConfig, count: int) -> ModelConfig:
    """Returns the config of a model that ends after its first `count` layers, at least `memory.fewest_layers`."""
    tree = plain(model) | {"num_layers": count}
    tree["layer_pattern"] = tree["layer_pattern"][:count]
    tree["kinds"] = {name: kind for name, kind in tree["kinds"].items() if name in tree["layer_pattern"]}
    if model.moe:
        tree["moe"]["dense_layers"] = [layer for layer in model.moe.dense_layers if layer < count]
    return validate(ModelConfig, tree, origin=f"verify.layers = {count}")
