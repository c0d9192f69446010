"""`trivium rehearse CONFIG [--world N]`: runs a training step of every distinct rank of a large job, on this machine.

It needs no GPU, no data and no other machine. Every rank runs the real engine, without values; what ranks ask of the
process groups that they share is compared, and counted. Out of scope are values, time, what training does beside its
steps (checkpoints, evaluation), and the order of collectives of different groups.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING

from configs.cli import entrypoint, parse_args
from configs.layout import Layout
from configs.loader import ConfigError, Failure
from configs.train import Precision, PretrainConfig
from launch.processes import cores
from pages import duration
from pretrain.rehearsal.distinct_ranks import coordinates_of, distinct_micro_batches, distinct_ranks, smallest_world
from pretrain.run.pretraining_config import with_initial_model

if TYPE_CHECKING:
    from pretrain.rehearsal.rehearsal_rank import RehearsedRank

DEVICES = ("gpu", "cpu")
FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Rehearses a step, prints what it found, and returns 1 if ranks differ or one of them fails, else 0."""
    config, args = parse_args(
        PretrainConfig,
        argv,
        prog="trivium rehearse",
        description="Runs one training step of every distinct rank on this machine, and compares their collectives.",
        example="trivium rehearse CONFIG --world 512 model=llama-3-70b parallel.tp=8 parallel.pp=8",
        flags=[("--all", "run every rank, not only the distinct ones")],
        options=[
            ("--world", "", "number of ranks of the job (default: the fewest that the degrees in [parallel] allow)"),
            ("--device", "gpu", "what the job runs on, gpu or cpu: they use different collectives"),
            (
                "--micro-batches",
                "",
                "number of micro-batches that are run (default: as many as show all of the schedule)",
            ),
            ("--processes", "", "number of processes that run ranks (default: one a core)"),
        ],
        complete=lambda tree, args: with_initial_model(tree, args.config, "trivium rehearse"),
    )
    if args.device not in DEVICES:
        raise ConfigError(f"--device {args.device} is neither gpu nor cpu; set --device gpu or --device cpu")
    world = _number("--world", args.world, smallest_world(config.parallel))
    processes = _number("--processes", args.processes, cores())
    layout = Layout.of(world, config.parallel, config.model, config.train)
    refuse(config)
    run, config = _shortened(
        config, layout, _number("--micro-batches", args.micro_batches, distinct_micro_batches(layout))
    )
    ranks = list(range(world)) if args.all else distinct_ranks(layout)
    device = "GPUs over NCCL" if args.device == "gpu" else "CPUs over gloo"
    print(
        f"{config.model.num_parameters():,} parameters in {_precision(config, args.device)} on {world:,} ranks as "
        f"{layout}, {layout.grad_accum_steps} micro-batches a step, as on {device}"
    )
    print(_chosen(ranks, layout))
    if run.grad_accum_steps < layout.grad_accum_steps:
        print(
            f"Runs {run.grad_accum_steps} of {layout.grad_accum_steps} micro-batches, which show all of the pipeline's "
            "schedule; calls and bytes of the others are added to the table."
        )
    if args.dry_run:
        return 0
    began = time.monotonic()
    done = list(_rehearsed(config, run, ranks, args.device == "cpu", processes))
    repeated = Fraction(layout.grad_accum_steps, run.grad_accum_steps)
    return _report(done, layout, repeated, time.monotonic() - began)


def refuse(config: PretrainConfig) -> None:
    """Raises ConfigError for what needs values, and so cannot be rehearsed."""
    parallel = config.parallel
    if parallel.zero > 1 or parallel.offload_optimizer:
        key = f"zero = {parallel.zero}" if parallel.zero > 1 else "offload_optimizer = true"
        remedy = "zero=1" if parallel.zero > 1 else "offload_optimizer=false"
        raise ConfigError(
            f"parallel.{key} cannot be rehearsed: DeepSpeed's optimizer, which it uses, reads the values of tensors; "
            f"set parallel.{remedy}, or try the layout in small with `trivium prove`"
        )
    if config.adapter is not None and config.adapter.base != "full":
        raise ConfigError(
            f"adapter.base = {config.adapter.base!r} cannot be rehearsed, since weights are quantized by their values; "
            "set adapter.base=full"
        )
    if config.adapter is not None and config.adapter.kind == "adalora":
        raise ConfigError(
            'adapter.kind = "adalora" cannot be rehearsed, since it chooses ranks by the values of weights; set '
            "adapter.kind=lora, whose collectives are the same but for that choice"
        )


def _precision(config: PretrainConfig, device: str) -> str:
    chosen = config.train.precision
    return ("bf16" if device == "gpu" else "auto") if chosen == Precision.AUTO else str(chosen)


def _shortened(config: PretrainConfig, layout: Layout, micro_batches: int) -> tuple[Layout, PretrainConfig]:
    """Returns layout and config of the same step with a smaller number of micro-batches on each rank."""
    if micro_batches > layout.grad_accum_steps:
        raise ConfigError(
            f"--micro-batches {micro_batches} is more than the {layout.grad_accum_steps} of a step; set "
            f"--micro-batches {layout.grad_accum_steps}, or leave it out"
        )
    batch = micro_batches * layout.dp * config.train.micro_batch_size
    train = config.train.model_copy(update={"global_batch_size": batch})
    run = Layout.of(layout.world_size, config.parallel, config.model, train)
    return run, config.model_copy(update={"train": train})


def _number(option: str, given: str, default: int) -> int:
    if not given:
        return default
    if not (given.isascii() and given.isdigit() and int(given) > 0):
        raise ConfigError(f"{option} {given} is no number; give 1 or more, such as {option} {default}")
    return int(given)


def _chosen(ranks: Sequence[int], layout: Layout) -> str:
    if len(ranks) == layout.world_size:
        return f"Runs every rank: 0 to {layout.world_size - 1}."
    of_stage = [str(rank) for rank in ranks if coordinates_of(rank, layout).stage == 0]
    stages = f" and their like in each of the {layout.pp} stages" if layout.pp > 1 else ""
    return (
        f"Runs {len(ranks):,} of {layout.world_size:,} ranks, {', '.join(of_stage)}{stages}: every stage, and the "
        "first and last rank of every group. The others differ only in who their peers are; --all runs them, too."
    )


def _rehearsed(
    config: PretrainConfig, layout: Layout, ranks: Sequence[int], on_cpu: bool, processes: int
) -> "Iterator[RehearsedRank]":
    """Yields what each rank did; with one process, in this one. Raises Failure if a process dies."""
    # Before torch is imported: it sees no GPU then, and its C++ parts print no warnings.
    os.environ.update(CUDA_VISIBLE_DEVICES="", TORCH_CPP_LOG_LEVEL="ERROR")
    from pretrain.rehearsal.rehearsal_rank import rehearse

    one = partial(rehearse, config, config.model, layout, on_cpu=on_cpu)
    # Forked, so that libraries are imported once, and this process joins no group.
    with ProcessPoolExecutor(min(processes, len(ranks)), get_context("fork")) as pool:
        try:
            yield from pool.map(one, ranks)
        except BrokenProcessPool:
            raise Failure("a process has died, most likely for lack of memory; give --processes 1") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _report(done: "Sequence[RehearsedRank]", layout: Layout, repeated: Fraction, seconds: float) -> int:
    """Prints the tables and the verdict; returns the exit status."""
    from rich.console import Console

    from pretrain.rehearsal import rehearsal_tables
    from pretrain.rehearsal.comparison import mismatch

    if failed := next((rank for rank in done if rank.failure), None):
        rank_at = coordinates_of(failed.rank, layout)
        print(
            f"error: rank {failed.rank} (stage {rank_at.stage}, tensor-parallel rank {rank_at.tensor}) fails: "
            f"{failed.failure}",
            file=sys.stderr,
        )
        return FAILED
    console = Console()
    print(
        "Stand-ins for data: every row is one document of train.seq_length trained tokens, and routers spread tokens "
        "evenly over experts.\n"
    )
    console.print(rehearsal_tables.traffic(done, repeated))
    print()
    console.print(rehearsal_tables.memory(done))
    print("\nWithout activations, and without buffers of NCCL and of kernels.")
    if found := mismatch({rank.rank: rank.calls for rank in done}):
        print(f"error: {found}", file=sys.stderr)
        return FAILED
    calls = sum(len(rank.calls) for rank in done)
    print(f"All {calls:,} calls of {len(done):,} ranks fit together ({duration(seconds)}).")
    return 0


if __name__ == "__main__":
    entrypoint(main)
