"""Rehearses a training step of every distinct rank of a large job, on this machine: the part that all commands share.

It needs no GPU, no data and no other machine. Every rank runs the real engine, without values; what ranks ask of the
process groups that they share is compared, and counted. Out of scope are values, time, what training does beside its
steps (checkpoints, evaluation, rollouts), and the order of collectives of different groups.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from configs.cli import parse_args
from configs.layout import Layout
from configs.loader import ConfigError, Failure
from configs.model import ModelConfig
from configs.train import Precision, PretrainConfig, TrainerConfig
from launch.processes import cores
from pages import duration
from pretrain.rehearsal.distinct_ranks import coordinates_of, distinct_micro_batches, distinct_ranks, smallest_world

if TYPE_CHECKING:
    from pretrain.rehearsal.rehearsal_rank import RehearsedRank

DEVICES = ("gpu", "cpu")
FAILED = 1


@dataclass(frozen=True)
class Training:
    """A kind of training with the `schema` of its configs, whose `opened` returns model and layout of a config.

    `opened` is called with the config and the number of ranks, and raises ConfigError as the training command does.
    `prepare` names the function, as "module:function", that makes the step on a rank; it imports torch. `rows` says
    what the rows are like. `adds` returns the key by which a config adds micro-batches of another kind to a step, or
    "": then none of its micro-batches stands for others.
    """

    schema: type[TrainerConfig]
    opened: Callable[[Any, int], tuple[ModelConfig, Layout]]
    prepare: str = "pretrain.rehearsal.rehearsal_rank:pretraining_step"
    rows: str = "every row is one document of train.seq_length trained tokens"
    adds: Callable[[Any], str] = lambda config: ""


def opened_pretraining(config: PretrainConfig, world: int) -> tuple[ModelConfig, Layout]:
    """Returns model and layout of a pretraining run."""
    return config.model, Layout.of(world, config.parallel, config.model, config.train)


PRETRAINING = Training(PretrainConfig, opened_pretraining)


def rehearse_training(training: Training, argv: Sequence[str] | None = None) -> int:
    """Rehearses a step, prints what it found, and returns 1 if ranks differ or one of them fails, else 0."""
    # Before torch is imported: it sees no GPU then, and its C++ parts print no warnings.
    os.environ.update(CUDA_VISIBLE_DEVICES="", TORCH_CPP_LOG_LEVEL="ERROR")

    def complete(tree: dict[str, Any], args: Any) -> dict[str, Any]:
        """Gives a pretraining config with [init] the keys of that model."""
        if training is not PRETRAINING or not tree.get("init"):
            return tree
        from pretrain.run.initial_model import with_model

        return with_model(tree, "auto")[0]

    config, args = parse_args(
        training.schema,
        argv,
        prog="trivium rehearse",
        description="Runs one training step of every distinct rank on this machine, and compares their collectives. "
        "CONFIG is that of any training command; the command's name may come before it.",
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
        complete=complete,
    )
    if args.device not in DEVICES:
        raise ConfigError(f"--device {args.device} is neither gpu nor cpu; set --device gpu or --device cpu")
    world = _number("--world", args.world, smallest_world(config.parallel))
    processes = _number("--processes", args.processes, cores())
    model, layout = training.opened(config, world)
    key, enough = training.adds(config), distinct_micro_batches(layout)
    chosen = _number("--micro-batches", args.micro_batches, layout.grad_accum_steps if key else enough)
    if key and chosen < layout.grad_accum_steps:
        raise ConfigError(
            f"--micro-batches {chosen} is less than the {layout.grad_accum_steps} of a step, and {key} adds others "
            "that may differ; leave --micro-batches out, and all are run"
        )
    run, config = _shortened(config, model, layout, chosen)
    ranks = list(range(world)) if args.all else distinct_ranks(layout)
    device = "GPUs over NCCL" if args.device == "gpu" else "CPUs over gloo"
    print(
        f"{model.num_parameters():,} parameters in {_precision(config, args.device)} on {world:,} ranks as "
        f"{layout}, {layout.grad_accum_steps} micro-batches a step, as on {device}"
    )
    print(_chosen(ranks, layout))
    missing = layout.grad_accum_steps - run.grad_accum_steps
    if missing:
        print(
            f"Runs {run.grad_accum_steps} of {layout.grad_accum_steps} micro-batches, which show all of the pipeline's "
            "schedule; calls and bytes of the others are added to the table."
        )
    if args.dry_run:
        return 0
    began = time.monotonic()
    # Without a pipeline calls of the others can be put where they would come; ZeRO 2 and 3 have none.
    added = missing if layout.zero > 1 else 0
    arguments = {"on_cpu": args.device == "cpu", "missing": added, "prepare": training.prepare}
    done = list(_rehearsed(config, model, run, ranks, processes, arguments))
    repeated = Fraction(layout.grad_accum_steps - added, run.grad_accum_steps)
    print(f"Stand-ins for data: {training.rows}, and routers spread tokens evenly over experts.\n")
    return _report(done, layout, repeated, time.monotonic() - began)


def _precision(config: TrainerConfig, device: str) -> str:
    chosen = config.train.precision
    return ("bf16" if device == "gpu" else "auto") if chosen == Precision.AUTO else str(chosen)


def _shortened(
    config: TrainerConfig, model: ModelConfig, layout: Layout, micro_batches: int
) -> tuple[Layout, TrainerConfig]:
    """Returns layout and config of the same step with a smaller number of micro-batches on each rank."""
    if layout.zero > 1 and micro_batches < (least := distinct_micro_batches(layout)):
        raise ConfigError(
            f"--micro-batches {micro_batches} is too few at parallel.zero = {layout.zero}, whose first micro-batches "
            f"differ from the others; set --micro-batches {least}, or leave it out"
        )
    if micro_batches > layout.grad_accum_steps:
        raise ConfigError(
            f"--micro-batches {micro_batches} is more than the {layout.grad_accum_steps} of a step; set "
            f"--micro-batches {layout.grad_accum_steps}, or leave it out"
        )
    batch = micro_batches * layout.dp * config.train.micro_batch_size
    train = config.train.model_copy(update={"global_batch_size": batch})
    run = Layout.of(layout.world_size, config.parallel, model, train)
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
    config: TrainerConfig,
    model: ModelConfig,
    layout: Layout,
    ranks: Sequence[int],
    processes: int,
    arguments: dict[str, Any],
) -> "Iterator[RehearsedRank]":
    """Yields what each rank did. Raises Failure if a process dies."""
    from pretrain.rehearsal.rehearsal_rank import rehearse

    one = partial(rehearse, config, model, layout, **arguments)
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
    console.print(rehearsal_tables.traffic(done, repeated))
    print()
    console.print(rehearsal_tables.memory(done))
    print("\nWithout activations, and without buffers of NCCL and of kernels.")
    if layout.offload_optimizer:
        print("With parallel.offload_optimizer the optimizer's part is in host memory.")
    if found := mismatch({rank.rank: rank.calls for rank in done}):
        print(f"error: {found}", file=sys.stderr)
        return FAILED
    calls = sum(len(rank.calls) for rank in done)
    print(f"All {calls:,} calls of {len(done):,} ranks fit together ({duration(seconds)}).")
    return 0
