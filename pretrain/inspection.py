"""`trivium inspect CHECKPOINT`: shows the contents of a checkpoint of any layout, in one process.

It first checks every file against its checksum. Tensors are read one at a time, so it needs memory for the largest one
only. It does not compare two checkpoints.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from configs.addresses import refuse_address
from configs.cli import command_parser, entrypoint
from configs.loader import ConfigError, toml
from pages import duration
from pretrain.checkpoint import storage
from pretrain.logs import goodput
from pretrain.run import history


@dataclass(frozen=True)
class TensorFacts:
    """Statistics of one parameter: of its master weight and of Adam's moments, None for those of an imported model.

    `norm` is the weight's Frobenius norm, `largest` its greatest absolute value. `exp_avg` is the root mean square of
    the first moment, `exp_avg_sq` the root of the second one's mean: both in units of the gradient. `not_finite` counts
    weights and moments that are NaN or infinite.
    """

    name: str
    shape: tuple[int, ...]
    norm: float
    largest: float
    exp_avg: float | None
    exp_avg_sq: float | None
    not_finite: int


def tensor_facts(path: Path) -> Iterator[TensorFacts]:
    """Yields the statistics of all parameters, in the checkpoint's order."""
    with storage.Reader(path) as reader:
        for name in reader.shapes:
            weight = reader.read(name).double()
            moments = (
                [reader.read(name, kind).double() for kind in storage.KINDS[1:]]
                if "exp_avg" in reader.kinds_of(name)
                else []
            )
            yield TensorFacts(
                name,
                tuple(weight.shape),
                norm=float(weight.norm()),
                largest=float(weight.abs().max()),
                exp_avg=math.sqrt(float(moments[0].square().mean())) if moments else None,
                exp_avg_sq=math.sqrt(float(moments[1].mean())) if moments else None,
                not_finite=sum(int((~tensor.isfinite()).sum()) for tensor in (weight, *moments)),
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `trivium inspect`; returns 1 if the checkpoint is damaged or a value in it is not finite, else 0."""
    parser = command_parser(
        prog="trivium inspect",
        description="Shows a checkpoint's step, config, shapes and norms, after checking its files.",
        example="trivium inspect runs/demo/pretrain",
    )
    parser.add_argument("path", metavar="CHECKPOINT", help="a checkpoint, or a run: its newest whole one")
    parser.add_argument("--json", action="store_true", help="print JSON instead, for scripts")
    args = parser.parse_args(argv)
    try:
        refuse_address(args.path, "CHECKPOINT")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    try:
        path = _checkpoint(Path(args.path))
        manifest = storage.verify(path)
    except storage.CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    facts = list(tensor_facts(path))
    summary = _summary(path, manifest, facts)
    if args.json:
        print(json.dumps({**summary, "config": manifest["config"], "tensors": [vars(f) for f in facts]}, indent=1))
    else:
        _show(summary, manifest["config"], facts, Console())
    return 1 if summary["not_finite"] else 0


def _checkpoint(path: Path) -> Path:
    if (path / "manifest.json").is_file():
        return path
    if (path / "checkpoints").is_dir():
        return storage.latest(path, warn=lambda said: print(f"warning: {said}", file=sys.stderr))
    raise ConfigError(
        f"{path} is neither a checkpoint (it has no manifest.json) nor a run (it has no checkpoints/); name one, "
        "e.g. runs/demo/pretrain"
    )


def _summary(path: Path, manifest: dict[str, Any], facts: list[TensorFacts]) -> dict[str, Any]:
    return {
        "path": str(path),
        "step": manifest["step"],
        "tokens": manifest["tokens"],
        "samples": manifest["samples"],
        "ledger": manifest.get("ledger", {}),
        "data_spans": manifest.get("data_spans", []),
        "layout": manifest["layout"],
        "optimizer_steps": manifest["optimizer_steps"],
        "parameters": sum(math.prod(f.shape) for f in facts),
        "norm": math.sqrt(sum(f.norm**2 for f in facts)),
        "bytes": sum(file["bytes"] for file in manifest["files"].values()),
        "files": len(manifest["files"]),
        "not_finite": sum(f.not_finite for f in facts),
    }


def _show(summary: dict[str, Any], config: dict[str, Any], facts: list[TensorFacts], console: Console) -> None:
    console.print(toml(config).decode().strip(), markup=False, highlight=False)
    table = Table("parameter", "shape", *(("norm", "largest", "exp_avg", "√exp_avg_sq")))
    for column in table.columns[2:]:
        column.justify = "right"
    for f in facts:
        values = (f.norm, f.largest, f.exp_avg, f.exp_avg_sq)
        numbers = ("none" if value is None else f"{value:.4g}" for value in values)
        table.add_row(f.name, "×".join(map(str, f.shape)), *numbers, style="bold red" if f.not_finite else None)
    console.print(table)
    console.print(
        f"{summary['path']}: step {summary['step']}, {summary['tokens']:,} tokens, {summary['parameters']:,} "
        f"parameters of norm {summary['norm']:.4g}\nsaved by {summary['layout']} in {summary['files']} files, "
        f"{summary['bytes'] / 1e6:.1f} MB, all matching their checksums",
        highlight=False,
    )
    if summary["ledger"]:
        used = (f"{source} {tokens:,.0f}" for source, tokens in summary["ledger"].items())
        console.print(f"trained on, in tokens with a loss: {', '.join(used)}", markup=False, highlight=False)
    for kind, seconds, share in goodput.table(goodput.read(storage.run_of(Path(summary["path"])))):
        console.print(f"time: {share:6.1%}  {duration(seconds):>12}  {kind}", markup=False, highlight=False)
    for line in history.describe_spans(summary["data_spans"]):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if summary["not_finite"]:
        console.print(f"{summary['not_finite']:,} values are not finite (red); go back to an earlier checkpoint")


if __name__ == "__main__":
    entrypoint(main)
