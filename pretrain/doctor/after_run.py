"""The end of a run, read from its folder: how far it came, why it ended, and what to do."""

import fcntl
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pages import duration
from pretrain.checkpoint import storage
from pretrain.doctor.findings import Finding, failure, ok, warning
from pretrain.logs import goodput
from pretrain.logs.metrics_file import read_metrics


def after_run(run_dir: Path) -> Iterator[Finding]:
    """Yields findings about how a training run ended, from the files in its folder."""
    config, fault = _config(run_dir)
    saved = storage.steps(run_dir)
    steps = (config if "train" in config else _saved_config(run_dir)).get("train", {}).get("steps", 0)
    if fault:
        yield warning(fault, "the run writes it again when it goes on")
    metrics = read_metrics(run_dir / "metrics.jsonl")
    logged = [record for record in metrics.records if "loss" in record]
    last = max([*saved, *(record["step"] for record in logged)], default=0)  # either may be damaged
    if metrics.warning:
        yield warning(metrics.warning, "broken lines are set aside when the run goes on")
    yield from _checkpoints(run_dir, saved, last)
    skipped = [record["step"] for record in logged if "skipped" in record]
    if skipped:
        yield warning(
            f"{len(skipped)} steps were skipped, the last at step {skipped[-1]}", "see their loss in report.html"
        )
    if starts := goodput.read(run_dir):
        whole = {kind: share for kind, _, share in goodput.table(starts)}
        used = whole.get(goodput.KINDS["training"], 0.0)
        spent = duration(starts[-1].updated - starts[0].began)
        yield ok(f"{len(starts)} start{'s' * (len(starts) > 1)} in {spent}, of which steps that count took {used:.0%}")
    yield _end(run_dir, last, steps)


def _checkpoints(run_dir: Path, saved: list[int], last: int) -> Iterator[Finding]:
    if not saved:
        yield warning("there is no checkpoint", "the run would begin again at step 0")
        return
    newest = storage.directory(run_dir, saved[-1])
    try:
        storage.verify(newest)
    except storage.CheckpointError as error:
        yield failure(str(error), "the run goes on from the newest checkpoint that is whole, if there is one")
        return
    lost = last - saved[-1]
    said = f"{newest} is whole"
    yield ok(said) if lost <= 0 else warning(said, f"{lost} steps after it are done again")


def _end(run_dir: Path, last: int, steps: int) -> Finding:
    """Says whether the run is finished, runs, hung, or ended before its last step."""
    of_all = f" of {steps}" if steps else ""
    if _is_held(run_dir):
        return ok(f"it is running, at step {last}{of_all}")
    if steps and last >= steps and storage.steps(run_dir)[-1:] == [steps]:
        return ok(f"it is finished, at step {steps}")
    again = "run the same command again to go on"
    hang = _last_hang(run_dir)
    if hang is not None and hang["step"] > last:
        return failure(f"it hung in step {hang['step']}: {hang['text']}", again)
    return warning(
        f"it ended at step {last}{of_all}, by a signal, an error or the end of its machine",
        f"what it printed says which; {again}",
    )


def _is_held(run_dir: Path) -> bool:
    """Whether a process has the lock of the run."""
    try:
        with open(run_dir / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _last_hang(run_dir: Path) -> dict[str, Any] | None:
    found = []
    for path in (run_dir / "hang").glob("*/verdict.json"):
        try:
            found.append((int(path.parent.name), json.loads(path.read_text())))
        except (OSError, ValueError):
            continue
    hangs = [told for _, told in sorted(found, key=lambda pair: pair[0]) if told.get("hangs")]
    return hangs[-1] if hangs else None


def _saved_config(run_dir: Path) -> dict[str, Any]:
    """Returns the config in a run's newest checkpoint, {} if there is none or it is damaged."""
    try:
        return dict(storage.read_manifest(storage.directory(run_dir, storage.steps(run_dir)[-1]))["config"])
    except (IndexError, KeyError, storage.CheckpointError):
        return {}


def _config(run_dir: Path) -> tuple[dict[str, Any], str]:
    """Reads a run's config.toml; returns it, empty if it cannot be read, and what is wrong with it."""
    file = run_dir / "config.toml"
    try:
        return tomllib.loads(file.read_text(encoding="utf-8")), ""
    except OSError as error:
        return {}, f"{file} cannot be read: {error.strerror}"
    except ValueError as error:
        return {}, f"{file} is damaged: {error}"
