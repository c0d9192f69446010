"""Turns an adapter in PEFT's format into a run with one checkpoint, of what is trained on top of its base.

The base is a run, an imported model or a Hugging Face folder. It must be the model that the adapter was trained on: by
hash, where Trivium wrote the adapter, else by name, and by the shapes of all tensors.
"""

from dataclasses import replace
from pathlib import Path

import torch

from configs.files import write_atomic
from configs.initial import InitConfig
from configs.loader import ConfigError, plain, toml
from data_pipeline.tokens.foreign import template_in
from export.conversion.family_registry import family_of
from export.model_source import ModelSource, open_source
from export.peft import folder
from export.peft.adapter import Base, OwnAdapter
from export.peft.folder import BaseRecord
from export.peft.forms import form_of_config
from export.publishing import check_export, partly_written
from pretrain.checkpoint import storage
from pretrain.checkpoint.adapter_base import keep_bases, named_base
from pretrain.run.initial_model import InitialModel, initial_weights


def import_adapter(directory: Path, out: Path, base: Path | None, any_base: bool = False, dry_run: bool = False) -> str:
    """Converts the adapter in `directory` into the run `out`; returns a sentence about it.

    Raises ConfigError or PeftError if the base is not there, is not the adapter's, or the adapter cannot be expressed.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; name a new folder")
    check_export(directory)
    adapter, record = folder.read(directory)
    form = form_of_config(adapter.config)
    source = open_source(_base_folder(directory, base, record))
    if not any_base:
        _check_base(directory, source, record)
    family = family_of(source.model, source.architecture)
    with source.weights() as weights:
        own = form.read(adapter, Base(family, source.model.without_mtp(), weights.read))
    count = sum(tensor.numel() for tensor in own.tensors.values())
    what = f"{own.config.kind} of {count:,} parameters on {source.path}"
    if dry_run:
        return f"{what}: every tensor fits; nothing was written"
    initial = InitialModel.open(_init(source.path), str(out), "no")
    with partly_written(out, "OUT") as partial:
        _write(partial, out, own, initial, template_in(directory))
        partial.rename(out)
    return f"{what}: written to {out}; train from it with init.run={out}"


def _base_folder(directory: Path, base: Path | None, record: BaseRecord) -> Path:
    if base is not None:
        return base
    if record.name is not None and Path(record.name).is_dir():
        return Path(record.name)
    raise ConfigError(
        f"{directory} is an adapter of {record.name!r}, which is no folder here; name the model that it was trained on "
        "with --base FOLDER"
    )


def _check_base(directory: Path, source: ModelSource, record: BaseRecord) -> None:
    """Raises ConfigError if the base has not the recorded hash, or where none is recorded not the recorded name."""
    remedy = "name the right one with --base, or take it all the same with --any-base"
    if record.sha256:
        # An export of the base is the base as well, in whatever precision it was written.
        if not folder.hashes_of(source) & set(record.sha256):
            raise ConfigError(
                f"{directory} was trained on top of {record.name}, whose SHA-256 begins with {record.sha256[0][:12]}, "
                f"and {source.path} is another model ({source.identify()[:12]}...); {remedy}"
            )
        return
    if record.name is None:
        return
    wanted = Path(record.name).name
    paths = [source.path, *([Path(source.imported_from)] if source.imported_from else [])]
    parts = {part for path in paths for part in (*path.parts, *path.resolve().parts)}
    hub = {part.rpartition("--")[2] for part in parts}  # the hub's cache calls a folder models--OWNER--NAME
    if wanted not in parts | hub:
        raise ConfigError(
            f"{directory} is an adapter of {record.name!r}, and nothing says that {source.path} is that model; {remedy}"
        )


def _init(base: Path) -> InitConfig:
    """Returns the [init] section of a run that starts from a base."""
    if (base / storage.MANIFEST).is_file():
        return InitConfig(checkpoint=str(base))
    return InitConfig(hf=str(base))


def _write(partial: Path, out: Path, own: OwnAdapter, initial: InitialModel, template: str | None) -> None:
    """Writes a run with one checkpoint, which holds the adapter and names its base."""
    lineage = replace(initial.lineage, chat_template=template or initial.lineage.chat_template)
    final = storage.directory(partial, 0)
    temporary = storage.temporary_name(final)
    temporary.mkdir(parents=True)
    pieces: dict[str, tuple[storage.Piece, dict[str, torch.Tensor]]] = {}
    for name, tensor in own.tensors.items():
        shape = tuple(tensor.shape)
        piece = storage.Piece(name, shape, (0,) * len(shape), shape, 0, tensor.numel())
        pieces[name] = piece, {"weight": tensor.float().flatten()}
    part = storage.write_pieces(temporary, "adapter.safetensors", pieces)
    base = named_base(initial.pin, out)
    with initial_weights(initial.pin) as tensors:
        balance = tensors.balance
    state = {
        "step": 0,
        "samples": 0,
        "tokens": 0,
        "identity": lineage.identity,
        "context": lineage.context,
        **lineage.facts,
        "base": base,
        "layout": "trivium import",
        "optimizer_steps": 0,
        "balance": {name: tensor.tolist() for name, tensor in balance.items()},
        "balance_dtypes": {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in balance.items()},
        "config": {"model": plain(initial.model), "adapter": plain(own.config)},
    }
    storage.publish(temporary, final, [part], state, kinds=("weight",))
    lineage.keep(partial, lineage.identity)
    keep_bases(partial, [base], print)
    write_atomic(partial / "config.toml", toml({"model": plain(initial.model)}))
