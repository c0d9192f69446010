"""`trivium import`: converts a Hugging Face directory, or another trainer's checkpoint, to a model to start from.

OUT is laid out as a run with one checkpoint, `checkpoints/step_0`, whose weights are bit-identical and in the dtype of
the files, and so are tensors that Trivium computes nothing with, which an export gives back. Beside it are the model's
tokenizer and chat template, and `config.toml` with its `[model]` section. `trivium train`, `sft` and `grpo` start from
OUT by `init.run`, and `trivium generate`, `chat`, `eval` and `export` take it as they take a run. Nothing is
downloaded, and pickled weights are not loaded.
"""

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.cli import command_parser, entrypoint
from configs.files import write_atomic
from configs.loader import ConfigError, plain, toml
from export.publishing import partly_written

CHECKED = 2**22  # numbers of a tensor that are looked at together, for NaN and infinity

if TYPE_CHECKING:
    import torch

    from data_pipeline.tokens.tokenizer import Tokenizer
    from export.hf_folder import HFFolder


def main(argv: Sequence[str] | None = None) -> int:
    """Converts the directory that the command line names and returns 0."""
    parser = command_parser(
        prog="trivium import",
        description="Turns a Hugging Face directory with safetensors, of a family in docs/families.md, into a run.",
        example="trivium import ~/models/tinyllama runs/imported/tinyllama",
    )
    parser.add_argument(
        "directory", metavar="DIR", type=Path, help="a folder with config.json and safetensors, or an adapter of PEFT"
    )
    parser.add_argument(
        "--from",
        dest="kind",
        choices=("hf", "dcp", "megatron"),
        default="hf",
        help="what DIR is: Hugging Face's, torch.distributed.checkpoint's or megatron-core's torch_dist (default hf)",
    )
    parser.add_argument(
        "--config", metavar="FOLDER", type=Path, help="with dcp and megatron: config.json and tokenizer of the model"
    )
    parser.add_argument("--base", metavar="FOLDER", type=Path, help="with an adapter of PEFT in DIR: its base")
    parser.add_argument(
        "--any-base", action="store_true", help="take --base even if its hash or name is not the adapter's"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; it must not exist")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="maximum size of a file of weights (default 5)")
    parser.add_argument("--dry-run", action="store_true", help="check the config and the tensors, write nothing")
    args = parser.parse_args(argv)
    if args.config is not None and args.kind == "hf":
        raise ConfigError(
            f"--config {args.config} is for a checkpoint of another trainer, and {args.directory} has a config.json of "
            "its own; leave --config out, or give --from dcp or --from megatron"
        )
    if not args.max_shard_gb > 0:
        raise ConfigError(f"--max-shard-gb {args.max_shard_gb:g} holds no weight; give a size above 0, such as 5")
    is_adapter = (args.directory / "adapter_config.json").is_file() and args.kind == "hf"
    if (args.base is not None or args.any_base) and not is_adapter:
        raise ConfigError(
            f"--base and --any-base are for an adapter in PEFT's format, and {args.directory} has no "
            "adapter_config.json; leave them out"
        )
    try:
        if is_adapter:
            from export.peft.importing import import_adapter

            print(import_adapter(args.directory, args.out, args.base, args.any_base, args.dry_run))
            return 0
        print(import_directory(args.directory, args.out, args.max_shard_gb, args.dry_run, args.kind, args.config))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return 0


def import_directory(
    directory: Path,
    out: Path,
    max_shard_gb: float = 5.0,
    dry_run: bool = False,
    kind: str = "hf",
    described: Path | None = None,
) -> str:
    """Converts `directory`, a folder of Hugging Face's or of another `kind`, into `out`; returns a sentence about it.

    Of another kind, `described` is the folder with config.json and tokenizer, `directory` by default. Raises ValueError
    (ConfigError among them) that names every file, key and tensor that is wrong.
    """
    from export.hf_folder import open_hf_folder, tokenizer_of_folder
    from export.publishing import check_export

    if out.exists():
        raise ConfigError(f"{out} exists already; name a new folder")
    if kind == "hf":
        opened, described = open_hf_folder(directory, check=True), directory
    else:
        from export.training_checkpoint import open_checkpoint

        described = described or directory
        check_export(described, largest=None)
        opened = open_checkpoint(directory, "megatron" if kind == "megatron" else "dcp", described)
    tokenizer = tokenizer_of_folder(described)
    kept = _said_of_kept(opened.fit.kept)
    what = f"{opened.family.architecture}, {opened.model.num_parameters():,} parameters{kept}"
    if dry_run:
        return f"{what}: every tensor is there; nothing was written"
    with partly_written(out, "OUT") as partial:
        ends = _write(described, opened, tokenizer, partial, int(max_shard_gb * 1e9))
        partial.rename(out)
    said = f"{what}: written to {out}; train from it with init.run={out}"
    if not ends:
        said += f"; no file of {described} names an eos_token_id, so that nothing says where its texts end"
    return said


def _write(directory: Path, opened: "HFFolder", tokenizer: "Tokenizer | None", out: Path, max_bytes: int) -> bool:
    """Writes the checkpoint and the files beside it; returns whether a file names a token that ends a text."""
    from data_pipeline.tokens.foreign import roles_file, template_in
    from export.hf_folder import facts_of
    from export.model_source import TOKENIZER_FILES
    from pretrain.checkpoint import storage
    from pretrain.checkpoint.lineage import Lineage

    facts, template = facts_of(directory, opened), template_in(directory)
    lineage = Lineage(None, template, opened.family.longest_row(opened.raw), imported=facts)
    if tokenizer is not None:
        roles = roles_file(tokenizer) if tokenizer.foreign else None
        lineage = Lineage(Path(tokenizer.origin), template, lineage.context, roles=roles, imported=facts)
    final = storage.directory(out, 0)
    temporary = storage.temporary_name(final)
    temporary.mkdir(parents=True)
    balance: dict[str, torch.Tensor] = {}
    parts = list(_write_tensors(temporary, opened, max_bytes, balance))
    state = {
        "step": 0,
        "samples": 0,
        "tokens": 0,
        "identity": lineage.identity,
        "context": lineage.context,
        **lineage.facts,
        "layout": "trivium import",
        "optimizer_steps": 0,
        "balance": {name: tensor.tolist() for name, tensor in balance.items()},
        "balance_dtypes": {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in balance.items()},
        "kept_keys": {key: opened.raw[key] for key in opened.family.kept_keys if opened.raw.get(key) is not None},
        "config": {"model": plain(opened.model)},
    }
    storage.publish(temporary, final, parts, state, kinds=("weight",))
    if tokenizer is None:  # an export gives them back as they are
        for name in TOKENIZER_FILES:
            if (directory / name).is_file():
                shutil.copyfile(directory / name, out / name)
    lineage.keep(out, lineage.identity)
    write_atomic(out / "config.toml", toml({"model": plain(opened.model)}))
    return facts["token_ids"].get("eos_token_id") is not None or (tokenizer is not None and tokenizer.eos_id >= 0)


def _write_tensors(
    folder: Path, opened: "HFFolder", max_bytes: int, balance: "dict[str, torch.Tensor]"
) -> "Iterator[dict[str, Any]]":
    """Writes the model's tensors as they come, and yields each file's part of the manifest.

    A file has at most `max_bytes`, or one tensor. The router biases of MoE layers, which belong into the manifest, are
    put into `balance`. Raises ConversionError, after all of them, that names tensors with NaN or infinite numbers.
    """
    from export.conversion.walk import KEPT, SHOWN, ConversionError
    from pretrain.checkpoint import storage

    pieces: dict[str, tuple[storage.Piece, dict[str, torch.Tensor]]] = {}
    size = number = 0
    broken: list[str] = []
    for named, tensor in opened.converted():
        kind = storage.KEPT if named.startswith(KEPT) else "weight"
        name = named.removeprefix(KEPT)
        if not all(bool(part.isfinite().all()) for part in tensor.reshape(-1).split(CHECKED)):
            broken.append(name)
        if ".moe.balance." in name and kind == "weight":
            balance[name] = tensor
            continue
        if pieces and size + tensor.nbytes > max_bytes:
            number += 1
            yield storage.write_pieces(folder, f"weights_{number:05d}.safetensors", pieces)
            pieces, size = {}, 0
        shape = tuple(tensor.shape)
        piece = storage.Piece(name, shape, (0,) * len(shape), shape, 0, tensor.numel())
        # A view of a larger tensor would keep the whole of it.
        pieces[named] = (piece, {kind: tensor.flatten().clone() if tensor._is_view() else tensor.flatten()})
        size += tensor.nbytes
    if broken:
        more = f" and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        raise ConversionError(
            [
                f"the files have NaN or infinite numbers in {', '.join(broken[:SHOWN])}{more} (by Trivium's names), "
                "with which the model computes nothing; fetch the files again, or ask whoever made them"
            ]
        )
    yield storage.write_pieces(folder, f"weights_{number + 1:05d}.safetensors", pieces)


def _said_of_kept(names: Sequence[str]) -> str:
    """Returns a clause about tensors that take no part in what Trivium computes; "" if there are none."""
    if not names:
        return ""
    layers = sorted({match[0] for name in names if (match := re.search(r"layers\.\d+", name))})
    where = ", ".join(layers) if layers else names[0]
    return f" (and {len(names)} tensors of {where}, which are not used, and are kept for an export)"


if __name__ == "__main__":
    entrypoint(main)
