"""Runs `trivium prove CONFIG --layouts tp2,pp2,...`: compares layouts with one rank on the same model, batch and seed.

Each layout takes three steps of real training (`proof.recorded_step`) in fp32 and bf16. Loss, grad norm, activations,
gradients and state of the first step are compared within the bounds of `proof.bounds`; facts that must hold exactly
(`proof.exact_facts`) are checked after every step. Where tensors differ, the FIRST one out of bounds, in the order of
forward pass, backward pass and gradients, says where to look. `--fuzz` does the same for configs drawn at
random (`proof.fuzz`), and `--against` compares devices instead of layouts (`proof.devices`). Leaves out layouts over
several machines.
"""

import argparse
import ast
import json
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from configs import presets
from configs.checkpoint_folders import MANIFEST, check_start, model_of, newest_manifest
from configs.cli import command_parser, entrypoint
from configs.files import write_atomic
from configs.folders import check_writable
from configs.layout import Layout
from configs.loader import ConfigError, load, plain, toml, validate
from configs.train import ParallelConfig, PretrainConfig
from pretrain.proof import proof_page
from pretrain.proof.bounds import UNIT_ROUNDOFF, Bounds
from pretrain.proof.candidate import DEGREES, Candidate
from pretrain.proof.fuzz import Prover, Run, command_of, draw, shrink
from pretrain.proof.rank_pool import ProofRanks
from pretrain.proof.verdict import COLUMNS, Verdict

PRECISIONS = ("fp32", "bf16")
PLAIN_WIDTH = 100  # columns of the table where the output is no terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0 if every layout is within bounds, else 1."""
    bugs = known_bugs()
    args = _parser(bugs).parse_intermixed_args(argv)
    if args.inject and args.inject not in bugs:
        raise ConfigError(f"--inject {args.inject!r} is no known bug; there are {', '.join(bugs)}")
    modes = [option for option in (args.layouts, args.fuzz, args.against, args.record) if option is not None]
    if len(modes) != 1 or (args.config is None) != (args.layouts is None):
        raise ConfigError(
            "give either CONFIG and --layouts, or --fuzz N without CONFIG, which draws configs itself, or, to compare "
            "devices, --against cpu or --record FOLDER without CONFIG"
        )
    precisions = args.precision.split(",")
    if unknown := [name for name in precisions if name not in UNIT_ROUNDOFF]:
        raise ConfigError(
            f"--precision: {unknown[0]!r} is none of {', '.join(UNIT_ROUNDOFF)}; write fp32,bf16 for both"
        )
    if args.against is not None or args.record is not None:
        return _devices(args, precisions)
    if args.fuzz is not None:
        if args.fuzz < 1:
            raise ConfigError(f"--fuzz {args.fuzz} draws nothing; give a number of 1 or more")
        check_writable(args.out, "--out")
        with ProofRanks() as pool:
            return fuzz(args.fuzz, args.seed, args.out, pool.run, args.inject)
    named = [Candidate.parse(name) for name in args.layouts.split(",")]  # before torch is imported for [init]
    config = load(PretrainConfig, args.config, args.overrides, _with_model_of_init)
    layers_per_stage = config.parallel.layers_per_stage
    # Names of layouts say all the rest.
    parallel = ParallelConfig(offload_optimizer=config.parallel.offload_optimizer, backend=config.parallel.backend)
    config = config.model_copy(update={"parallel": parallel})
    candidates = [candidate.with_layers(layers_per_stage) for candidate in named]
    for candidate in candidates:
        _check(candidate, config, precisions)
    check_writable(args.out, "--out")
    return _prove(config, candidates, precisions, args)


def _with_model_of_init(tree: dict[str, Any]) -> dict[str, Any]:
    """Gives a config with [init] the keys of that model; its weights are drawn at random, as those of others are."""
    if not tree.get("init"):
        return tree
    check_start(tree)
    init = tree["init"]
    if isinstance(init, dict) and (folder := init.get("checkpoint") or init.get("run")):
        manifest = Path(folder, MANIFEST) if init.get("checkpoint") else newest_manifest(folder)
        if model := model_of(manifest):
            return {**tree, "model": presets.merged(plain(model), tree.get("model") or {})}
    from pretrain.run.initial_model import with_model  # imports torch

    return with_model(tree, "auto")[0]


def _parser(bugs: dict[str, str]) -> argparse.ArgumentParser:
    parser = command_parser(
        prog="trivium prove",
        description="Compares layouts with one rank, or a GPU with the CPU: loss, every gradient, grad norm, and the "
        "state after a step.",
        example="trivium prove configs/pretrain/demo_moe.toml --layouts tp2,tp2sp,pp2vpp2,tp2pp2\n"
        "  trivium prove --fuzz 100 --seed 7\n"
        "  trivium prove --against cpu",
        schema=PretrainConfig,
    )
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?", help="a pretraining config; its [parallel] degrees and data are not used"
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="dotted overrides of its keys")
    parser.add_argument("--layouts", help=f"names with commas between, from {', '.join(DEGREES)} and sp")
    both = ",".join(PRECISIONS)
    parser.add_argument("--precision", default=both, help=f"of {', '.join(UNIT_ROUNDOFF)}; {both} if left out")
    parser.add_argument("--inject", metavar="BUG", help="plant one of the known bugs below, to see it caught")
    parser.add_argument(
        "--fuzz", metavar="N", type=int, help="draw N small models and layouts at random, and prove them"
    )
    parser.add_argument(
        "--against",
        metavar="REFERENCE",
        help="compare one rank on --device with this CPU: cpu; or with what --record wrote: its FOLDER",
    )
    parser.add_argument("--record", metavar="FOLDER", type=Path, help="write what --against compares with: CPU's steps")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="device to compare, for --against; cuda if left out"
    )
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="the seed of --fuzz; 0 if left out")
    parser.add_argument("--out", type=Path, default=Path("runs/prove"), help="where to work; runs/prove if left out")
    listed = (f"  {name}\n    {what}" for name, what in bugs.items())
    parser.epilog = "\n".join(["known bugs:", *listed, "", parser.epilog or ""])
    return parser


def _prove(
    config: PretrainConfig, candidates: Sequence[Candidate], precisions: Sequence[str], args: argparse.Namespace
) -> int:
    from pretrain.proof.compare import compare  # imports torch, after mistakes in the arguments have been reported

    console, verdicts = _console(), []
    try:
        with ProofRanks() as pool:
            for precision in precisions:
                out = args.out / precision
                one = out / "one"
                _run(pool, Candidate("one", 1, {}), config, out, console, precision, None, None)
                for layout in candidates:
                    seconds = _run(pool, layout, config, out, console, precision, args.inject, one)
                    verdicts.append(compare(one, out / layout.name, layout.name, layout.world_size, config, seconds))
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return _finish(_facts(args.config, config, precisions, args.inject), verdicts, args.out, console)


def _devices(args: argparse.Namespace, precisions: Sequence[str]) -> int:
    """Records reference files, or compares a device with them; returns the exit status."""
    from pretrain.proof import devices

    try:
        if args.record is not None:
            devices.record(args.record, precisions)
            print(f"{args.record}: one rank on this CPU, in {args.precision}; --against {args.record} compares with it")
            return 0
        check_writable(args.out, "--out")
        if args.against != "cpu":
            devices.read_reference(Path(args.against), precisions)  # a mistake is told before torch is imported
        devices.check_device(args.device)
        folder = Path(args.against)
        if args.against == "cpu":
            folder = args.out / "cpu"
            shutil.rmtree(folder, ignore_errors=True)
            devices.record(folder, precisions)
        reference, verdicts = devices.hold_against(folder, args.out, precisions, args.device, args.inject)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    config = validate(PretrainConfig, max(reference["cases"].values(), key=len))
    facts = _facts(f"--against {args.against}", config, precisions, args.inject)
    if args.device == "cpu":
        facts["device"] = "cpu"
    return _finish(facts, verdicts, args.out, _console())


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)


def _finish(facts: dict[str, Any], verdicts: Sequence[Verdict], out: Path, console: Console) -> int:
    """Writes prove.json and prove.html, prints the table, and returns the exit status."""
    record = {**facts, "layouts": [verdict.as_json() for verdict in verdicts]}
    write_atomic(out / "prove.json", json.dumps(record, indent=1).encode())
    write_atomic(out / "prove.html", proof_page.draw(facts, verdicts).encode())
    _show(facts, verdicts, console)
    console.print(f"tensor by tensor: {out / 'prove.html'}; all numbers: {out / 'prove.json'}", highlight=False)
    return 0 if all(verdict.passed for verdict in verdicts) else 1


def fuzz(count: int, seed: int, out: Path, run: Run, inject: str | None = None) -> int:
    """Proves `count` draws of a seed and prints a command for every failure, shrunk. Returns the exit status."""
    prover, failed = Prover(run, inject), 0
    try:
        for index in range(count):
            started, drawn = time.perf_counter(), draw(seed, index)
            failures = prover.failures(drawn)
            word = "FAIL" if failures else "pass"
            print(f"{index + 1}/{count} {drawn}: {word}, {time.perf_counter() - started:.0f} s", flush=True)
            if not failures:
                continue
            failed += 1
            smallest, failures = shrink(drawn, prover.failures)
            file = out / f"fuzz_{seed}_{index}.toml"
            config, command = command_of(smallest, file)
            write_atomic(file, toml(config))
            print(f"  shrunk to {smallest}: {command}{f' --inject {inject}' if inject else ''}")
            for line in failures[:3]:
                print(f"    {line}", flush=True)
    finally:
        prover.close()
    print(f"{count} draws of seed {seed}: {failed} failed")
    return 1 if failed else 0


def known_bugs() -> dict[str, str]:
    """Returns {name: description} of the bugs in injections.py, which is parsed, since importing it imports torch."""
    tree = ast.parse(Path(__file__).with_name("injections.py").read_text(encoding="utf-8"))
    bugs = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    described = {bug.name: (ast.get_docstring(bug) or "").partition("\n")[0] for bug in bugs}
    return {name: words.removeprefix("Plants a bug: ") for name, words in described.items()}


def _facts(path: str, config: PretrainConfig, precisions: Sequence[str], inject: str | None) -> dict[str, Any]:
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
        "precision": ",".join(precisions),
        "inject": inject,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: version(name) for name in ("torch", "megatron-core", "deepspeed")},
        "bounds": " ".join(Bounds.of(config, precision).derivation() for precision in precisions),
    }


def _check(candidate: Candidate, config: PretrainConfig, precisions: Sequence[str]) -> None:
    """Raises ConfigError for a layout that training would refuse, or that fp64 does not support."""
    parallel = plain(config.parallel) | candidate.parallel
    try:
        layout = Layout.of(candidate.world_size, validate(ParallelConfig, parallel), config.model, config.train)
    except ConfigError as error:
        raise ConfigError(f"--layouts: {candidate.name}: {error}") from None
    if "fp64" in precisions and (layout.zero != 1 or layout.offload_optimizer):
        raise ConfigError(
            f"--precision fp64: {candidate.name} has parallel.zero = {layout.zero} and parallel.offload_optimizer = "
            f"{str(layout.offload_optimizer).lower()}, and fp64 is built for ZeRO stage 1 that is not offloaded; "
            "compare it in fp32"
        )


def _run(
    pool: ProofRanks,
    candidate: Candidate,
    config: PretrainConfig,
    out: Path,
    console: Console,
    precision: str,
    inject: str | None,
    reference: Path | None,
) -> float:
    """Records a layout's steps in a folder of its name; returns seconds. Raises RuntimeError if its ranks fail."""
    started = time.perf_counter()
    directory = out / candidate.name
    shutil.rmtree(directory, ignore_errors=True)
    settings = plain(config)
    settings["run"]["dir"] = str(directory)
    settings["parallel"] |= candidate.parallel
    with console.status(f"{candidate.name} in {precision} on {candidate.world_size} ranks"):
        try:
            pool.run(candidate.world_size, settings, precision, inject, reference)
        except RuntimeError as error:
            raise RuntimeError(f"{candidate.name} in {precision}: {error}") from None
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
        table.add_row(
            f"{v.layout}\n[dim]{v.ranks} ranks, {v.precision}[/]", *numbers, f"{verdict}\n[dim]{v.seconds:.0f} s[/]"
        )
    console.print(table)
    console.print(facts["bounds"], highlight=False)
    for v in verdicts:
        if not v.passed:
            console.print(
                f"{v.layout} in {v.precision}: {v.num_failed} out of bounds; first on the way: {v.first or v.failed[0]}"
            )
        for line in v.failed[:5]:
            console.print(f"  {line}", highlight=False)


if __name__ == "__main__":
    entrypoint(main)
