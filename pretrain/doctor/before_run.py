"""Checks a run before it starts: config, layout and data by the command's own dry run, links between ranks, disks."""

import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.folders import check_run_dir, check_writable
from configs.loader import ConfigError
from configs.train import TrainerConfig
from launch.bootstrap import TRAINING
from launch.environment import ClusterEnvironment
from launch.ranks import free_port
from pages import duration
from pretrain.doctor.findings import Finding, failure, ok, warning
from pretrain.logs.metrics_file import read_metrics

PROBE_BYTES = 64 * 2**20  # written to measure a disk
MOST_SKEW = 2.0  # seconds between this clock and that of the file system
SLOW_SAVE = 300.0  # seconds
BYTES_PER_PARAMETER = 12  # of a checkpoint: fp32 weight and two moments
PATIENCE = 1800.0  # seconds for a dry run or a trial


def dry_run(command: str, words: Sequence[str], ranks: int) -> Finding:
    """Calls a training command with --dry-run as the first of `ranks` ranks, and returns what it says."""
    first = ClusterEnvironment("torchrun", 0, ranks, 0, ranks, 0, "127.0.0.1", free_port())
    env = {**os.environ, **(first.as_variables() if ranks > 1 else {})}
    argv = [sys.executable, "-m", TRAINING[command], *words, "--dry-run"]
    done = _run(argv, env)
    if done is None:
        return failure(f"the dry run has not ended in {duration(PATIENCE)}", "look at the disk that holds the data")
    if done.returncode == 0:
        return ok(done.stdout.strip().replace("\n", "; "))
    said = done.stderr.strip().splitlines()
    error = next((line.removeprefix("error: ") for line in reversed(said) if line.startswith("error: ")), "")
    what, _, remedy = (error or (said[-1] if said else f"status {done.returncode}")).partition("; ")
    return failure(what, remedy or f"`{' '.join(['trivium', command, *words, '--dry-run'])}` says more")


def links(ranks: int, backend: str) -> Finding:
    """Measures what collectives take between ranks of this machine, which a command of its own starts."""
    words = ["--nnodes", "1", "--nproc-per-node", str(ranks), "pretrain.doctor.collective_speed", backend]
    done = _run([sys.executable, "-m", "launch.ranks", *words], None)
    if done is not None and done.returncode == 0:
        return ok(done.stdout.strip().splitlines()[-1])
    said = done.stderr.strip().splitlines() if done else []
    reason = next((f": {line}" for line in said if line.startswith("error: ")), "")
    return failure(
        f"{ranks} ranks of this machine do not reach each other{reason.replace('error: ', '')}",
        f"`trivium launch {' '.join(words)}` says more",
    )


def folder_fault(config: TrainerConfig) -> Finding | None:
    """Returns what is wrong with run.dir, such as a file in its place; None if a run can write there."""
    try:
        check_run_dir(config.run.dir)
    except ConfigError as error:
        what, _, remedy = str(error).partition("; ")
        return failure(what, remedy)
    return None


def disk(config: TrainerConfig, parameters: int | None) -> Iterator[Finding]:
    """Looks at the file systems of run.dir and of local checkpoints: whether they can be written to, clock and room."""
    if fault := folder_fault(config):
        yield fault
        return
    folder = Path(config.run.dir)
    free, rate, skew = _probed(folder)
    if abs(skew) > MOST_SKEW:
        yield warning(
            f"the clock of run.dir's file system differs from this machine's by {skew:.1f} s",
            "let both follow one time server; times in logs and of files will disagree",
        )
    said = _said("run.dir", config.run.dir, free, rate)
    size = (parameters or 0) * BYTES_PER_PARAMETER
    number = checkpoints_kept(config) + 1  # one is written before one goes
    if parameters is not None:
        said += f"; {number} checkpoints of {size / 1e9:,.2f} GB are kept at most"
    if rate is None:
        yield failure(
            said, f"a run also writes logs; leave {PROBE_BYTES // 10**6} MB at least, or name another run.dir"
        )
    elif size * number > free:
        fit = int(free // size)
        every = " and checkpoint.keep_every=0" if config.checkpoint.keep_every else ""
        remedy = f"at most {fit} fit: set checkpoint.keep={fit - 1}{every}" if fit > 1 else "not even two fit"
        yield failure(said, f"{remedy}, make room, or name another run.dir")
    elif size / rate > SLOW_SAVE:
        yield warning(said, f"one takes {duration(size / rate)} to write; name a run.dir on a faster disk")
    else:
        yield ok(said)
    if config.checkpoint.local_dir is not None:
        yield _local_disk(config.checkpoint.local_dir, folder, parameters)


def _local_disk(local_dir: str, run_dir: Path, parameters: int | None) -> Finding:
    """Looks at this node's disk for local checkpoints; one without room costs those, and not the run."""
    folder = Path(local_dir)
    try:
        check_writable(folder, "checkpoint.local_dir")
    except ConfigError as error:
        what, _, remedy = str(error).partition("; ")
        return failure(what, remedy)
    free, rate, _ = _probed(folder)
    said = _said("checkpoint.local_dir", local_dir, free, rate)
    other = "name a folder on a disk that each node has for itself, or leave checkpoint.local_dir out"
    if _there(folder).stat().st_dev == _there(run_dir).stat().st_dev:
        return warning(f"{said}; it is on the same file system as run.dir", other)
    # A disk holds two checkpoints while one is written: on one node whole ones, else its share and another node's.
    size = (parameters or 0) * BYTES_PER_PARAMETER
    if parameters is not None:
        said += f"; at most {2 * size / 1e9:,.2f} GB are needed, and from three nodes on four times a node's share"
    if rate is None:
        return warning(said, f"local checkpoints would be given up; make room, {other}")
    if 2 * size > free:
        nodes = max(3, -(-4 * size // free))
        return warning(said, f"local checkpoints are given up on fewer than {nodes} nodes; make room, or {other}")
    return ok(said)


def _said(key: str, value: str, free: int, rate: float | None) -> str:
    speed = f"{rate / 1e6:,.0f} MB/s written" if rate else "too little to measure its speed"
    shown = f"{free / 1e9:,.1f} GB" if free >= 1e9 else f"{free / 1e6:,.1f} MB"
    return f"{key} = {value!r}: {shown} free, {speed}"


def _there(folder: Path) -> Path:
    """Returns the folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _probed(folder: Path) -> tuple[int, float | None, float]:
    """Returns the free bytes of a folder's file system, its bytes written a second, and how far its clock is ahead.

    The speed is None if there is less room than for the file that measures it.
    """
    there = _there(folder)
    free = shutil.disk_usage(there).free
    if free < PROBE_BYTES:
        return free, None, 0.0
    try:
        seconds, skew = _write(there)
    except OSError:  # another process has taken the room, or a quota ends here
        return free, None, 0.0
    return free, PROBE_BYTES / seconds, skew


def checkpoints_kept(config: TrainerConfig) -> int:
    """Returns the most checkpoints that a run has on disk between two saves."""
    keep = config.checkpoint
    saves = math.ceil(config.train.steps / keep.every)
    forever = config.train.steps // keep.keep_every if keep.keep_every else 0
    return min(saves, keep.keep + forever)


def _write(folder: Path) -> tuple[float, float]:
    """Returns (seconds to write PROBE_BYTES to disk, seconds that the file system's clock is ahead of this one)."""
    block = os.urandom(2**20)  # which no file system compresses
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor.") as probe:
        began = time.monotonic()
        for _ in range(PROBE_BYTES // len(block)):
            probe.write(block)
        probe.flush()
        os.fsync(probe.fileno())
        seconds = time.monotonic() - began
        before = time.time()
        os.utime(probe.name)
        return max(seconds, 1e-6), os.stat(probe.name).st_mtime - before


def trial(command: str, words: Sequence[str], ranks: int, config: TrainerConfig) -> Finding:
    """Trains two steps on `ranks` ranks into a temporary folder, and returns speed, memory and the time of the run."""
    with tempfile.TemporaryDirectory(prefix="trivium-doctor-") as folder:
        steps = {"train.steps": 2, "schedule.steps": config.schedule.steps or config.train.steps, "run.dir": folder}
        changes = [*(f"{key}={value}" for key, value in steps.items()), "log.tensorboard=false", "eval.rows=0"]
        changes += ["checkpoint.mirror=", "checkpoint.local_dir=", "checkpoint.local_every=0"]
        launch = [sys.executable, "-m", "launch.ranks", "--nproc-per-node", str(ranks), command, *words, *changes]
        done = _run(launch, None)
        steps_done = [record for record in read_metrics(Path(folder, "metrics.jsonl")).records if "loss" in record]
    if done is None:
        return failure(f"two steps have not ended in {duration(PATIENCE)}", "start the run, whose watchdog says why")
    if done.returncode or not steps_done:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        what = next((line for line in reversed(said) if line.startswith("error: ")), said[-1] if said else "no output")
        return failure(f"two steps on {ranks} ranks ended with status {done.returncode}: {what}", "mend it first")
    return ok(_described(steps_done[-1], config))


def _run(argv: Sequence[str], env: Mapping[str, str] | None) -> "subprocess.CompletedProcess[str] | None":
    """Runs a command without a terminal; None if it does not end within PATIENCE and is killed."""
    try:
        return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return None


def _described(last: dict[str, Any], config: TrainerConfig) -> str:
    left = config.train.steps * config.train.global_batch_size * config.train.seq_length / last["tokens_per_s"]
    return (
        f"two steps ran: {last['tokens_per_s']:,.0f} tokens/s, {last['memory_bytes'] / 2**30:.2f} GiB of the first "
        f"rank; at this speed {config.train.steps:,} steps take {duration(left)}"
    )
