"""Checks a run before it starts: config, layout and data by the command's own dry run, then disk and clock."""

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

from configs.folders import check_run_dir
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


def disk(config: TrainerConfig, parameters: int | None) -> Iterator[Finding]:
    """Looks at the file system of run.dir: whether it can be written to, its clock, its room for checkpoints."""
    folder = Path(config.run.dir)
    try:
        check_run_dir(folder)
    except ConfigError as error:
        what, _, remedy = str(error).partition("; ")
        yield failure(what, remedy)
        return
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    seconds, skew = _write(there)
    if abs(skew) > MOST_SKEW:
        yield warning(
            f"the clock of run.dir's file system differs from this machine's by {skew:.1f} s",
            "let both follow one time server; times in logs and of files will disagree",
        )
    rate, free = PROBE_BYTES / seconds, shutil.disk_usage(there).free
    said = f"run.dir = {config.run.dir!r}: {free / 1e9:,.1f} GB free, {rate / 1e6:,.0f} MB/s written"
    if parameters is None:
        yield ok(said)
        return
    size, number = parameters * BYTES_PER_PARAMETER, checkpoints_kept(config) + 1  # one is written before one goes
    said += f"; {number} checkpoints of {size / 1e9:,.2f} GB are kept at most"
    if size * number > free:
        fit = int(free // size)
        remedy = f"at most {fit} fit: set checkpoint.keep={fit - 1}" if fit > 1 else "not even two fit"
        yield failure(said, f"{remedy}, make room, or name another run.dir")
    elif size / rate > SLOW_SAVE:
        yield warning(said, f"one takes {duration(size / rate)} to write; name a faster disk, or save less often")
    else:
        yield ok(said)


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
