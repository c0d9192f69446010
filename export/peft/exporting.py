"""Writes the adapters of a run in PEFT's format, and checks what `peft` computes with them on their base.

The base is a Hugging Face folder: the one that the config names, or that the run began from, or else one that is
written for the check alone. It must have the weights that the run was trained on top of.
"""

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from configs.adapters import AdapterConfig
from configs.export import ExportConfig
from configs.files import write_atomic
from configs.loader import ConfigError, validate
from configs.model import ModelConfig
from export.checks import Check, check_greedy, check_logits, check_tokenizer
from export.conversion.walk import ConversionError, convert, fit
from export.hf_folder import FolderTensors, HFFolder, content_sha256, open_hf_folder
from export.hf_tokenizer import write_tokenizer
from export.hf_writer import build_decoder, write_model
from export.model_source import ModelSource, open_source
from export.peft import folder
from export.peft.adapter import Base, OwnAdapter
from export.peft.forms import form_of_kind
from export.reloading import Reference, Reloaded, reload
from pretrain.checkpoint.adapter_base import base_of
from pretrain.checkpoint.storage import Reader, read_manifest
from pretrain.model.adapters import is_adapter

if TYPE_CHECKING:
    from export.checked_texts import Texts


@dataclass(frozen=True)
class AdapterOfRun:
    """The adapter in a checkpoint, and the model that it was trained on top of."""

    own: OwnAdapter
    base: ModelSource
    sha256: str


def open_adapter(source: ModelSource, way: str) -> AdapterOfRun:
    """Reads the adapter of a run. Raises ConfigError if the run has none, PeftError if PEFT cannot have it."""
    manifest = read_manifest(source.path) if (source.path / "manifest.json").is_file() else {}
    config = manifest.get("config", {}).get("adapter")
    if config is None:
        raise ConfigError(
            f"adapter = {way!r} writes what a run with an [adapter] section trains, and {source.path} is of none; "
            "set adapter=merge"
        )
    merge = "set adapter=merge" if source.adapter is None else "train with adapter.kind=lora, and set adapter=merge"
    base = base_of(source.path, manifest)
    if base is None:
        raise ConfigError(
            f"adapter = {way!r}: the adapters of {source.path} were trained on random weights, without [init], and "
            f"there is no base to load them onto; {merge}"
        )
    if not source.model.has_logits:
        raise ConfigError(f"adapter = {way!r} is for models that write text, not reward models; {merge}")
    settings = validate(AdapterConfig, config, origin=f"{source.path}, [adapter]")
    form_of_kind(settings.kind).check(settings, source.model)
    with Reader(source.path) as reader:
        further = tuple(f"layers.{layer.index}." for layer in source.model.mtp_layers)  # transformers has none of them
        tensors = {name: reader.read(name).float() for name in reader.shapes if not name.startswith(further)}
    return AdapterOfRun(OwnAdapter(settings, tensors), open_source(base), manifest["base"]["sha256"])


def write_adapter(
    source: ModelSource, adapter: AdapterOfRun, texts: "Texts", config: ExportConfig, out: Path
) -> list[Check]:
    """Writes the adapter's folder and returns its checks. Raises ConfigError if the base that is named is another."""
    model = source.model.without_mtp()
    with _base_folder(adapter.base, texts, config, out) as (base, name, is_lasting):
        opened = _opened(base, model)
        read_base = FolderTensors(opened).read
        theirs = form_of_kind(adapter.own.config.kind).write(adapter.own, Base(opened.family, model, read_base))
        hashes = (
            adapter.sha256,
            *sorted(folder.hashes_of(adapter.base)),
            *([content_sha256(base)] if is_lasting else []),
        )
        folder.write(out, theirs, folder.BaseRecord(name, hashes))
        if texts.codec is not None:
            tokenizer, family = source.need_tokenizer(), opened.family.model_type
            write_tokenizer(out, tokenizer, source.context, source.chat_template, family)
        reference = _reference(source, adapter.own, opened, read_base, texts, config)
        checks = list(_checks(base, out, reference, config))
    write_atomic(out / "README.md", _card(source, adapter.own.config, name, checks).encode())
    return checks


@contextmanager
def _base_folder(
    base: ModelSource, texts: "Texts", config: ExportConfig, out: Path
) -> Iterator[tuple[Path, str, bool]]:
    """Context manager that gives a Hugging Face folder of the base, the base's name, and whether the folder stays."""
    if config.base is not None:
        folder_of_base = Path(config.base)
        if (difference := _difference(folder_of_base, base)) is not None:
            raise ConfigError(
                f"base = {config.base!r} is not the model that the run was trained on top of, {base.path}: "
                f"{difference}; name an export of that, or leave base out"
            )
        yield folder_of_base, config.base, True
        return
    if (base.path / "config.json").is_file():
        yield base.path, str(base.path), True
        return
    with tempfile.TemporaryDirectory(prefix=".base.", dir=out) as temporary, base.weights() as weights:
        write_model(base, weights, texts, config, Path(temporary))
        yield Path(temporary), str(base.path), False


def _difference(folder_of_base: Path, base: ModelSource) -> str | None:
    """Returns how the weights of a folder differ from those of the base, in the folder's precision; None if nowhere."""
    try:
        opened = _opened(folder_of_base, base.model.without_mtp())
    except ValueError as error:
        return str(error)
    with base.weights() as weights:
        for name, tensor in convert(opened.fit.walked, weights.read, opened.model, "theirs"):
            found = opened.tensors.read(opened.fit.names[name])
            if not torch.equal(found, tensor.to(found.dtype)):
                return f"{name} has other values"
    return None


def _opened(folder_of_model: Path, model: ModelConfig) -> HFFolder:
    """Opens a folder as that of a model of Trivium's, which may keep rows in another order than its files do.

    Raises ConversionError if it is of another model.
    """
    opened = open_hf_folder(folder_of_model)
    fitted = fit(opened.family, model, opened.tensors.shapes)
    if fitted.problems:
        raise ConversionError(fitted.problems)
    return replace(opened, model=model, fit=fitted)


def _reference(
    source: ModelSource,
    own: OwnAdapter,
    opened: HFFolder,
    read_base: Callable[[str], torch.Tensor],
    texts: "Texts",
    config: ExportConfig,
) -> Reference:
    """Returns Trivium's decoder of the base's weights and the adapter, which peft's model of both must equal."""

    def read(name: str) -> torch.Tensor:
        return own.tensors[name] if is_adapter(name) else read_base(name).float()

    return Reference(
        config=opened.model,
        family=opened.family,
        read=read,
        decoder=build_decoder(opened.model, read, None, own.config),
        codec=texts.codec,
        context=source.context,
        passages=texts.passages,
        held_out=texts.held_out,
        prompts=texts.prompts,
    )


def _checks(base: Path, out: Path, reference: Reference, config: ExportConfig) -> Iterator[Check]:
    """Yields the checks of the folder `out`: what peft makes of it on the base, or at least that it can be read."""
    theirs, _ = folder.read(out)
    if importlib.util.find_spec("peft") is None:
        count = len(theirs.tensors)
        yield Check("adapter", True, f"{count} tensors; not loaded, since peft is not installed", "loaded by peft")
        return
    from peft import PeftModel

    hf = reload(base, reference, tokenizer=out)
    tuned = PeftModel.from_pretrained(hf.model, str(out)).eval()
    has_virtual_tokens = "num_virtual_tokens" in theirs.config  # which peft has in a module of its own
    loaded = {name.replace(".default", "") for name, _ in tuned.named_parameters()}
    lacking = sorted(name for name in theirs.tensors if not {name, f"{name}.weight"} & loaded)
    lacking = [] if has_virtual_tokens else lacking
    yield Check("peft loads it", not lacking, ", ".join(lacking[:3]) or f"{len(theirs.tensors)} tensors", "all tensors")
    model: Any = tuned if has_virtual_tokens else tuned.get_base_model()
    hf = Reloaded(model, hf.tokenizer, hf.loading)
    with torch.inference_mode():
        yield check_logits(hf, reference, config.verify)
        yield check_greedy(hf, reference, config.verify.greedy_tokens, config.verify.tolerance)
        yield check_tokenizer(hf, reference)


def _card(source: ModelSource, config: AdapterConfig, base: str, checks: list[Check]) -> str:
    """Returns README.md of the folder, in Markdown."""
    rows = "\n".join(f"| {check.name} | {check.measured} | {check.wanted} |" for check in checks)
    return (
        f"---\nlibrary_name: peft\nbase_model: {base}\n---\n\n"
        f"# Adapter ({config.kind}) on {base}\n\n"
        f"Written and checked by `trivium export`, from {source.path.name} of a run. It is loaded with "
        "`PeftModel.from_pretrained(base, folder)`.\n\n"
        f"| check | measured | wanted |\n|---|---|---|\n{rows}\n"
    )
