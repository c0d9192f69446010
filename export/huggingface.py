"""`trivium export`: writes a training run's model as a verified Hugging Face directory.

The folder is written beside `out`, reloaded with transformers and compared with Trivium's own decoder on held-out text
(export.checks). It is renamed to `out` only if every check passes. Nothing is uploaded.
"""

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.cli import entrypoint, parse_args
from configs.export import ExportConfig
from configs.files import file_sha256, write_atomic
from configs.loader import ConfigError, plain

if TYPE_CHECKING:
    from export.checked_texts import Texts
    from export.checks import Check
    from export.model_source import ModelSource
    from export.reloading import Reference, Reloaded

EXAMPLE = "trivium export configs/export/demo.toml run=runs/demo/sft out=runs/demo/export/sft"


def main(argv: Sequence[str] | None = None) -> int:
    """Exports the run that the config names and returns the exit status."""
    config, args = parse_args(
        ExportConfig,
        argv,
        prog="trivium export",
        description="Writes a run's model as a Hugging Face directory, and publishes it once all checks pass.",
        example=EXAMPLE,
        flags=[("--force", "export again even if the folder is up to date")],
    )
    from rich.console import Console

    from export import publishing
    from export.checked_texts import read_texts
    from export.memory import check_layers, check_memory, free_memory
    from export.model_source import open_source

    console, out = Console(), Path(config.out)
    try:
        source = open_source(config.run, config.step)
        if config.adapter != "peft":
            check_merged(source)
        if config.adapter != "merge":
            from export.peft.exporting import open_adapter

            open_adapter(source, config.adapter)  # a mistake is told before texts are read
        check_layers(source.model, config.verify.layers)
        texts = read_texts(source, config, console)
        publishing.check_target(out, mend=not args.dry_run)
        made_from = fingerprint(source, texts, config)
        if not args.force and publishing.is_current(out, made_from):
            console.print(f"{out} is up to date with {source.path}; --force exports it again", soft_wrap=True)
            return 0
        console.print(
            f"{source.path}, {source.model.num_parameters():,} parameters, as {config.dtype} to {out}",
            soft_wrap=True,
        )
        check_memory(source.model, config.verify.layers, free_memory())
        if args.dry_run:
            return 0
        return export(source, texts, config, out, made_from, console)
    except ConfigError:
        raise
    except ValueError as error:
        console.print(f"error: {error}; nothing was published", style="red", markup=False, soft_wrap=True)
        return 1


def check_merged(source: "ModelSource") -> None:
    """Raises ConfigError if the model has adapters that no class of transformers computes."""
    if source.adapter is None:
        return
    from export.peft.exporting import open_adapter

    remedy = "tune the model with adapter.kind=lora"
    with contextlib.suppress(ValueError):
        open_adapter(source, "peft")
        remedy = f"set adapter=peft, which writes them alone, or {remedy}"
    raise ConfigError(
        f"{source.path} has adapters of kind {source.adapter.kind!r}, which cannot be merged into its weights, and no "
        f"class of transformers computes them; {remedy}"
    )


def export(
    source: "ModelSource", texts: "Texts", config: ExportConfig, out: Path, made_from: dict[str, Any], console: Any
) -> int:
    """Writes, verifies and publishes the folder; returns 0. Raises ValueError if a check fails, leaving no folder."""
    from export import publishing

    with publishing.partly_written(out, "out") as partial:
        checks = _write_adapter(source, texts, config, partial, console) if config.adapter != "merge" else []
        if config.adapter != "peft":
            checks = [*_write_model(source, texts, config, partial, console), *checks]
        measured = {check.name: check.measured for check in checks}
        record = {"checkpoint": str(source.path), "made_from": made_from, "checks": measured}
        publishing.publish(partial, out, record)
    if config.adapter == "peft":
        console.print(f'published {out}; load it with PeftModel.from_pretrained(base, "{out}")', soft_wrap=True)
        return 0
    auto = "AutoModelForCausalLM" if source.model.has_logits else "AutoModelForSequenceClassification"
    console.print(f'published {out}; load it with {auto}.from_pretrained("{out}")', soft_wrap=True)
    return 0


def _write_adapter(
    source: "ModelSource", texts: "Texts", config: ExportConfig, partial: Path, console: Any
) -> list["Check"]:
    """Writes and checks the adapters in PEFT's format: into the folder, or beside the merged model into one in it."""
    from export.peft.exporting import open_adapter, write_adapter

    folder = partial / "adapter" if config.adapter == "both" else partial
    folder.mkdir(exist_ok=True)
    with console.status("writing the adapters, and loading them with peft"):
        checks = write_adapter(source, open_adapter(source, config.adapter), texts, config, folder)
    _show(checks, "peft against Trivium, fp32", console)
    return checks


def _write_model(
    source: "ModelSource", texts: "Texts", config: ExportConfig, partial: Path, console: Any
) -> list["Check"]:
    """Writes and checks the model; what the checks found is in the model card, too."""
    from export.checks import verify
    from export.hf_writer import write_model
    from export.model_card import model_card
    from export.reloading import has_odd_experts, reload

    with source.weights() as weights:
        with console.status("writing"):
            reference = write_model(source, weights, texts, config, partial)
        with console.status("reloading with transformers"):
            hf = reload(partial, reference)
        with console.status("comparing with Trivium's decoder"):
            checks = verify(partial, reference, hf, config.verify)
        _show(checks, "transformers against Trivium, fp32", console)
        if reference.config.head.mtp_depth < source.model.head.mtp_depth:
            said = f"{reference.family.architecture} has no modules of multi-token prediction, which are left out"
            console.print(f"note: {said}", markup=False, soft_wrap=True)
        if has_odd_experts(reference.config):
            said = 'experts of these sizes need from_pretrained(..., experts_implementation="eager") in transformers 5'
            console.print(f"note: {said}", markup=False, soft_wrap=True)
        whole = reference.compared.num_layers == reference.config.num_layers
        if reference.codec is not None and whole and reference.config.has_logits:
            sample(hf, reference, config, console)
        card = model_card(source, reference.family, config.dtype, checks)
        write_atomic(partial / "README.md", card.encode())
    return checks


def fingerprint(source: "ModelSource", texts: "Texts", config: ExportConfig) -> dict[str, Any]:
    """Returns everything that decides the folder's content and its checks, as hashes of contents and not as paths."""
    code, codec = sorted(Path(__file__).parent.rglob("*.py")), texts.codec
    return {
        "trivium": importlib.metadata.version("trivium") if _installed() else "source tree",
        "code_sha256": _digest([[file.name, file_sha256(file)] for file in code]),
        "transformers": importlib.metadata.version("transformers"),
        "step": source.step,
        "weights_sha256": source.identify(),
        "model": plain(source.model),
        "context": source.context,
        "told": [source.architecture, source.token_ids, source.generation],
        "roles": codec and [codec.tokenizer.symbols, codec.tokenizer.special_ids, codec.bos_id, codec.stop_ids],
        "tokenizer_sha256": {file.name: file_sha256(file) for file in source.tokenizer_files()},
        "chat_template_sha256": _digest(source.chat_template),
        "texts_sha256": _digest([texts.passages, texts.held_out, texts.prompts]),
        "sample": [config.sample_tokens, config.sample_temperature, config.seed],
        "adapter": config.adapter,
        "base": config.base,
        "dtype": config.dtype,
        "max_shard_gb": config.max_shard_gb,
        "verify": config.verify.model_dump(mode="json"),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _show(checks: list["Check"], title: str, console: Any) -> None:
    """Prints the checks as a table. Raises ValueError for the first that failed."""
    from rich.table import Table

    table = Table(title=title)
    for column in ("check", "", "measured", "wanted"):
        table.add_column(column, overflow="fold")
    for check in checks:
        mark = "[green]ok[/]" if check.passed else "[red]FAILED[/]"
        table.add_row(check.name, mark, _plain(check.measured), _plain(check.wanted))
    console.print(table)
    failed = next((check for check in checks if not check.passed), None)
    if failed is not None:
        raise ValueError(f"{failed.name}: {failed.measured} (wanted: {failed.wanted})")


def sample(hf: "Reloaded", reference: "Reference", config: ExportConfig, console: Any) -> None:
    """Prints continuations of the prompts that transformers, not Trivium, samples with the reloaded folder."""
    import torch
    from rich.table import Table
    from transformers import GenerationConfig

    codec = reference.codec
    assert codec is not None
    table = Table(title=f"written by transformers, temperature {config.sample_temperature:g}", show_lines=True)
    table.add_column("prompt", overflow="fold")
    table.add_column("continuation", overflow="fold")
    settings = GenerationConfig(
        max_new_tokens=config.sample_tokens,
        do_sample=config.sample_temperature > 0,
        temperature=config.sample_temperature or None,
        eos_token_id=codec.stop_ids,
        pad_token_id=codec.pad_id,
    )
    chat = codec.chat_template is not None
    for prompt in config.chat_prompts if chat else config.prompts:
        if chat:
            asked = codec.chat.question(prompt)
            ids = hf.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        else:
            ids = hf.tokenizer(prompt).input_ids
        tokens = torch.tensor([ids])
        # The seed is set for each prompt, so that its sample does not depend on the other prompts.
        torch.manual_seed(config.seed)
        output = hf.model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)
        text = hf.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        table.add_row(_plain(prompt), _plain(text))
    console.print(table)


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)


def _installed() -> bool:
    try:
        importlib.metadata.version("trivium")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    entrypoint(main)
