"""Runs `trivium prove CONFIG --layouts tp2,pp2,...`: compares layouts with one rank on the same model, batch and seed.

Each layout is started as training would be (`launch.ranks`) and takes one step of real training
(`proof.recorded_step`). Its loss, grad norm, activations, gradients and updated parameters are compared within the
bounds of `proof.bounds`. Where they differ, the FIRST tensor out of bounds, in the order of the forward pass, the
backward pass and the gradients, says where to look. Leaves out layouts over several machines.
"""

import ast
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from configs.cli import command_parser, entrypoint
from configs.files import write_atomic
from configs.folders import check_writable
from configs.layout import Layout
from configs.loader import ConfigError, load, plain, toml, validate
from configs.train import ParallelConfig, PretrainConfig
from pretrain.proof import proof_page
from pretrain.proof.bounds import UNIT_ROUNDOFF, Bounds
from pretrain.proof.verdict import COLUMNS, Verdict

DEGREES = ("tp", "pp", "vpp", "dp", "ep", "cp", "zero")
SECONDS = 1800  # for one layout
PLAIN_WIDTH = 100  # columns of the table where the output is no terminal


@dataclass(frozen=True)
class Candidate:
    """A layout to compare: its name, e.g. `tp2sp_pp2`, its number of ranks, and its keys of `parallel`."""

    name: str
    world_size: int
    parallel: dict[str, Any]

    @classmethod
    def parse(cls, name: str) -> "Candidate":
        """Parses a name that is made of degrees. Raises ConfigError for any other name."""
        parts = re.findall(r"sp|[a-z]+\d+", name)
        degrees = {p.rstrip("0123456789"): int(p.lstrip("abcdefghijklmnopqrstuvwxyz")) for p in parts if p != "sp"}
        if "".join(parts) != re.sub("[_x]", "", name) or not parts or set(degrees) - set(DEGREES):
            raise ConfigError(
                f"--layouts: {name!r} is not a layout; write degrees one after another, e.g. tp2, tp2sp, tp2pp2dp2 "
                f"(of {', '.join(DEGREES)}, and sp)"
            )
        cp = degrees.get("cp", 1)
        dp = degrees.pop("dp", max(2 if "zero" in degrees else 1, -(-degrees.get("ep", 1) // cp)))
        world = degrees.get("tp", 1) * degrees.get("pp", 1) * cp * dp
        return cls(name, world, {**degrees, "sp": True} if "sp" in parts else dict(degrees))

    @property
    def overrides(self) -> list[str]:
        """The layout as key=value arguments of a command line."""
        return [f"parallel.{key}={str(value).lower()}" for key, value in self.parallel.items()]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0 if every layout is within bounds, else 1."""
    parser = command_parser(
        prog="trivium prove",
        description="Compares layouts with one rank: loss, every gradient, grad norm, parameters after a step.",
        example="trivium prove configs/pretrain/demo_moe.toml --layouts tp2,tp2sp,pp2vpp2,tp2pp2",
        schema=PretrainConfig,
    )
    parser.add_argument(
        "config", metavar="CONFIG", help="a pretraining config; its [parallel] degrees and its data are not used"
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="dotted overrides of its keys")
    parser.add_argument("--layouts", required=True, help=f"names with commas between, from {', '.join(DEGREES)} and sp")
    parser.add_argument("--precision", choices=UNIT_ROUNDOFF, default="fp32", help="fp32 if left out")
    parser.add_argument("--inject", metavar="BUG", help="plant one of the known bugs below, to see it caught")
    parser.add_argument("--out", type=Path, default=Path("runs/prove"), help="where to work; runs/prove if left out")
    bugs = known_bugs()
    listed = (f"  {name}\n    {what}" for name, what in bugs.items())
    parser.epilog = "\n".join(["known bugs:", *listed, "", parser.epilog or ""])
    args = parser.parse_intermixed_args(argv)
    config = load(PretrainConfig, args.config, args.overrides)
    parallel = ParallelConfig(offload_optimizer=config.parallel.offload_optimizer)  # names say all the rest
    config = config.model_copy(update={"parallel": parallel})
    if args.inject and args.inject not in bugs:
        raise ConfigError(f"--inject {args.inject!r} is no known bug; there are {', '.join(bugs)}")
    candidates = [Candidate.parse(name) for name in args.layouts.split(",")]
    for candidate in candidates:
        _check(candidate, config, args.precision)
    check_writable(args.out, "--out")
    write_atomic(args.out / "config.toml", toml(plain(config)))

    # torch takes seconds to import: mistakes in the arguments are reported before that.
    from pretrain.proof.compare import compare

    console = Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)
    verdicts = []
    try:
        one = args.out / "one"
        _run(Candidate("one", 1, {}), args.out, console, args.precision)
        for candidate in candidates:
            name = candidate.name
            seconds = _run(candidate, args.out, console, args.precision, args.inject)
            verdicts.append(compare(one, args.out / name, name, candidate.world_size, config, seconds))
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    facts = _facts(args.config, config, args.precision, args.inject)
    record = {**facts, "layouts": [verdict.as_json() for verdict in verdicts]}
    write_atomic(args.out / "prove.json", json.dumps(record, indent=1).encode())
    write_atomic(args.out / "prove.html", proof_page.draw(facts, verdicts).encode())
    _show(facts, verdicts, console)
    console.print(
        f"tensor by tensor: {args.out / 'prove.html'}; all numbers: {args.out / 'prove.json'}", highlight=False
    )
    return 0 if all(verdict.passed for verdict in verdicts) else 1


def known_bugs() -> dict[str, str]:
    """Returns {name: description} of the bugs in injections.py, which is parsed, since importing it imports torch."""
    tree = ast.parse(Path(__file__).with_name("injections.py").read_text(encoding="utf-8"))
    bugs = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {bug.name: (ast.get_docstring(bug) or "").partition("\n")[0] for bug in bugs}


def _facts(path: str, config: PretrainConfig, precision: str, inject: str | None) -> dict[str, Any]:
    """Returns the entries of prove.json other than the layouts: config, versions, precision, bounds."""
    import torch

    train = config.train
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": path,
        "model": plain(config.model),
        "parameters": config.model.num_parameters(),
        "batch": {key: getattr(train, key) for key in ("global_batch_size", "micro_batch_size", "seq_length")},
        "seed": config.run.seed,
        "precision": precision,
        "inject": inject,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: version(name) for name in ("torch", "megatron-core", "deepspeed")},
        "bounds": Bounds.of(config, precision).derivation(),
    }


def _check(candidate: Candidate, config: PretrainConfig, precision: str) -> None:
    """Raises ConfigError for a layout that training would refuse, or that fp64 does not support."""
    parallel = plain(config.parallel) | candidate.parallel
    try:
        layout = Layout.of(candidate.world_size, validate(ParallelConfig, parallel), config.model, config.train)
    except ConfigError as error:
        raise ConfigError(f"--layouts: {candidate.name}: {error}") from None
    if precision == "fp64" and (layout.zero != 1 or layout.offload_optimizer):
        raise ConfigError(
            f"--precision fp64: {candidate.name} has parallel.zero = {layout.zero} and parallel.offload_optimizer = "
            f"{str(layout.offload_optimizer).lower()}, and fp64 is built for ZeRO stage 1 that is not offloaded; "
            "compare it in fp32"
        )


def _run(candidate: Candidate, out: Path, console: Console, precision: str, inject: str | None = None) -> float:
    """Runs the ranks of a layout; returns seconds. Raises RuntimeError, with the end of their output, if they fail."""
    started = time.perf_counter()
    directory = out / candidate.name
    for stale in directory.glob("*"):
        stale.unlink()
    command = [sys.executable, "-m", "launch.ranks", "--nproc-per-node", str(candidate.world_size)]
    command += ["pretrain.proof.recorded_step", str(out / "config.toml"), f"run.dir={directory}", *candidate.overrides]
    command += ["--precision", precision]
    if inject:
        command += ["--inject", inject]
    with console.status(f"{candidate.name}: one step on {candidate.world_size} ranks"):
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=SECONDS
        )
    if done.returncode or not (directory / "step.json").is_file():
        raise RuntimeError(f"{candidate.name}: its ranks ended with status {done.returncode}:\n{done.stdout[-3000:]}")
    return time.perf_counter() - started


def _show(facts: dict[str, Any], verdicts: Sequence[Verdict], console: Console) -> None:
    title = f"{facts['parameters']:,} parameters, {facts['precision']}: errors against one rank, and what is allowed"
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("layout", no_wrap=True)
    for column in COLUMNS.values():
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict")
    for v in verdicts:
        errors = [v.worst.get(column) for column in COLUMNS]
        numbers = (
            f"{proof_page.number(e.found)}\n[dim]≤ {proof_page.number(e.allowed)}[/]" if e else "" for e in errors
        )
        verdict = "[green]pass[/]" if v.passed else "[bold red]FAIL[/]"
        table.add_row(f"{v.layout}\n[dim]{v.ranks} ranks[/]", *numbers, f"{verdict}\n[dim]{v.seconds:.0f} s[/]")
    console.print(table)
    console.print(facts["bounds"], highlight=False)
    for v in verdicts:
        if not v.passed:
            console.print(f"{v.layout}: {v.num_failed} out of bounds; first on the way: {v.first or v.failed[0]}")
        for line in v.failed[:5]:
            console.print(f"  {line}", highlight=False)


if __name__ == "__main__":
    entrypoint(main)
