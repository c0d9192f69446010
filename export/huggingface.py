"""`trivium export`: a training run to a Hugging Face directory that has proven itself.

The folder is written beside its place, reloaded with transformers, and held against Trivium's own decoder on
real held-out text (export.verify). It is renamed into place only if every check holds. Leaves out uploading,
and formats other than transformers'.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.export import ExportConfig
from configs.loader import ConfigError, entrypoint, parse_args, write_atomic

if TYPE_CHECKING:
    from export.source import Source
    from export.verify import Check, Reference, Reloaded

EXAMPLE = "trivium export configs/export/demo.toml run=runs/demo/sft out=runs/demo/export/sft"


def main(argv: Sequence[str] | None = None) -> int:
    config, args = parse_args(
        ExportConfig,
        argv,
        prog="trivium export",
        description="Writes a run's model as a Hugging Face directory, and publishes it once proven.",
        example=EXAMPLE,
        flags=[("--force", "export again even if the folder is up to date")],
    )
    from rich.console import Console

    from export import folder
    from export.source import open_source

    console, out = Console(), Path(config.out)
    try:
        source = open_source(config.run, config.step)
        folder.check_place(out)
        made_from = fingerprint(source, config)
        if not args.force and folder.is_current(out, made_from):
            console.print(f"{out} is up to date with {source.path}; --force exports it again", soft_wrap=True)
            return 0
        console.print(
            f"{source.path}, {source.model.num_parameters():,} parameters, as {config.dtype} to {out}",
            soft_wrap=True,
        )
        if args.dry_run:
            return 0
        return export(source, config, out, made_from, console)
    except ConfigError:
        raise
    except ValueError as error:
        console.print(f"error: {error}; nothing was published", style="red", markup=False, soft_wrap=True)
        return 1


def export(source: "Source", config: ExportConfig, out: Path, made_from: dict[str, Any], console: Any) -> int:
    """Writes, verifies, publishes. Returns the exit status; whatever fails, no partial folder is left."""
    from export import folder
    from export.verify import reload, verify

    partial = folder.begin(out)
    try:
        with console.status("writing"):
            reference = write_model(source, config, partial)
        with console.status("reloading with transformers"):
            hf = reload(partial)
        with console.status("comparing with Trivium's decoder"):
            checks = verify(partial, reference, hf, config.verify)
        show(checks, console)
        failed = next((check for check in checks if not check.passed), None)
        if failed is not None:
            raise ValueError(f"{failed.name}: {failed.measured} (wanted: {failed.wanted})")
        sample(hf, reference, config, console)
        measured = {check.name: check.measured for check in checks}
        folder.publish(partial, out, {"made_from": made_from, "checks": measured})
    finally:
        folder.discard(partial)
    console.print(f'published {out}; load it with AutoModelForCausalLM.from_pretrained("{out}")', soft_wrap=True)
    return 0


def fingerprint(source: "Source", config: ExportConfig) -> dict[str, Any]:
    """All that decides the content of the folder."""
    template = (source.chat_template or "").encode()
    return {
        "trivium": importlib.metadata.version("trivium") if _installed() else "source tree",
        "transformers": importlib.metadata.version("transformers"),
        "checkpoint": str(source.path),
        "step": source.step,
        "manifest_sha256": source.identity,
        "tokenizer_sha256": hashlib.sha256(source.need_tokenizer().read_bytes()).hexdigest(),
        "chat_template_sha256": hashlib.sha256(template).hexdigest(),
        "dtype": config.dtype,
        "max_shard_gb": config.max_shard_gb,
        "verify": config.verify.model_dump(mode="json"),
    }


def write_model(source: "Source", config: ExportConfig, folder: Path) -> "Reference":
    """Writes weights, configs and tokenizer into `folder`; returns what it has to be equal to."""
    import torch

    from export.chat import TextCodec
    from export.families import to_hf
    from export.heldout import heldout_passages
    from export.hf_config import to_hf_config
    from export.tensors import write_tensors
    from export.tokenizer import write_tokenizer
    from export.verify import Reference
    from pretrain.model import build_single

    model, tokenizer = source.model, source.need_tokenizer()
    codec = TextCodec(tokenizer, source.chat_template)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    weights = {name: tensor.to(dtype) for name, tensor in source.read().items()}
    write_tensors(folder, to_hf(weights, model), int(config.max_shard_gb * 1e9))

    hf_config = to_hf_config(model, source.seq_length, config.dtype, codec.bos_id, codec.eos_id, codec.pad_id)
    generation = {"bos_token_id": codec.bos_id, "eos_token_id": codec.stop_ids, "pad_token_id": codec.pad_id}
    for name, content in (("config.json", hf_config), ("generation_config.json", generation)):
        write_atomic(folder / name, (json.dumps(content, indent=2) + "\n").encode())
    write_tokenizer(folder, tokenizer, source.seq_length, source.chat_template)

    if codec.chat_template is None:
        prompts = [codec.encode_prompt(text) for text in config.prompts]
    else:
        prompts = [codec.encode_chat(asked(text)) for text in config.chat_prompts]
    plan = config.plan or source.plan
    passages = list(prompts)
    if plan is not None:
        options = config.verify
        passages = heldout_passages(plan, options.rows, options.max_tokens, model.vocab_size)
        prompts += [passage[:16] for passage in passages[:: options.rows]]
    return Reference(
        config=model,
        weights=weights,
        decoder=build_single(model, {name: tensor.float() for name, tensor in weights.items()}),
        codec=codec,
        passages=passages,
        held_out=plan is not None,
        prompts=prompts,
    )


def show(checks: list["Check"], console: Any) -> None:
    """The checks as a table."""
    from rich.table import Table

    table = Table(title="transformers against Trivium, fp32")
    for column in ("check", "", "measured", "wanted"):
        table.add_column(column, overflow="fold")
    for check in checks:
        mark = "[green]ok[/]" if check.passed else "[red]FAILED[/]"
        table.add_row(check.name, mark, _plain(check.measured), _plain(check.wanted))
    console.print(table)


def sample(hf: "Reloaded", reference: "Reference", config: ExportConfig, console: Any) -> None:
    """Prints what transformers, not Trivium, makes of the prompts with the reloaded folder."""
    import torch
    from rich.table import Table
    from transformers import GenerationConfig

    table = Table(title=f"written by transformers, temperature {config.sample_temperature:g}", show_lines=True)
    table.add_column("prompt", overflow="fold")
    table.add_column("continuation", overflow="fold")
    settings = GenerationConfig(
        max_new_tokens=config.sample_tokens,
        do_sample=config.sample_temperature > 0,
        temperature=config.sample_temperature or None,
        eos_token_id=reference.codec.stop_ids,
        pad_token_id=reference.codec.pad_id,
    )
    chat = reference.codec.chat_template is not None
    for prompt in config.chat_prompts if chat else config.prompts:
        if chat:
            ids = hf.tokenizer.apply_chat_template(asked(prompt), add_generation_prompt=True, return_dict=False)
        else:
            ids = hf.tokenizer(prompt).input_ids
        tokens = torch.tensor([ids])
        # Each prompt draws alone, so that a sample does not change with the list it is in.
        torch.manual_seed(config.seed)
        output = hf.model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)
        text = hf.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        table.add_row(_plain(prompt), _plain(text))
    console.print(table)


def asked(text: str) -> list[dict[str, str]]:
    """A dialogue of one question."""
    return [{"role": "user", "content": text}]


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
