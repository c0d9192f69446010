"""Sends the numbers of a run to its trackers without ever holding up training.

Each tracker has a process of its own, in which its library runs (`child.py`), and threads here that talk to it. At most
`WAITING` records wait for a tracker; further ones are dropped and counted. At the end of a run a tracker has
`CLOSE_SECONDS` to finish, less if it fails, and is then killed. What goes wrong is printed once a tracker, and training
goes on.

The id of the tracker's run is kept in tracking.json, so that a run that goes on continues it.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from configs.differences import flat
from configs.files import write_atomic
from configs.folders import check_writable
from configs.loader import ConfigError, plain
from configs.tracking import TrackingConfig
from launch.environment import is_main

CHILD = Path(__file__).with_name("child.py")
FILE = "tracking.json"
WAITING = 1000  # records of one tracker
CLOSE_SECONDS = 20.0  # of all trackers together
SILENT_SECONDS = 60.0  # after which one that has taken nothing is told to be silent
FAILED_CLOSE_SECONDS = 3.0  # of one that did not take the last record that it was given
# What must be importable, and the distribution package that has it.
LIBRARIES = {
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "prometheus": ("prometheus_client", "prometheus-client"),
    "otel": ("opentelemetry.exporter.otlp.proto.http", "opentelemetry-exporter-otlp-proto-http"),
}


def check_installed(config: TrackingConfig) -> None:
    """Raises ConfigError if the library of a tracker is not installed, or its file or folder cannot be written to.

    Only the main rank writes there, and only it looks.
    """
    for name in config.chosen:
        module, package = LIBRARIES[name]
        try:
            found = find_spec(module)
        except ModuleNotFoundError:  # of a package that `module` is in
            found = None
        if found is None:
            raise ConfigError(
                f"[tracking.{name}] needs the package {package}, which is not installed; run "
                "`pip install 'trivium[tracking]'`, or take the section out"
            )
    if not is_main():
        return
    if config.mlflow and config.mlflow.uri and "://" not in config.mlflow.uri:
        check_writable(config.mlflow.uri, "tracking.mlflow.uri")
    if config.prometheus and (file := config.prometheus.file):
        check_writable(Path(file).parent, "tracking.prometheus.file", file)
        if Path(file).is_dir():
            raise ConfigError(
                f"tracking.prometheus.file = {file!r} is a folder; name a file in it, such as {file}/metrics.prom"
            )


class Tracker:
    """One tracker: its process, the records that wait for it, and the count of those that it took."""

    def __init__(self, name: str, settings: dict[str, Any], begun: Callable[[str], None]) -> None:
        """`begun` is called, in a thread, with the id of the tracker's run once that is known."""
        self.name, self._settings, self._begun = name, settings, begun
        self._records: queue.Queue[dict[str, Any]] = queue.Queue(WAITING)
        self._offered = self._taken = 0
        self._dropping = False
        self._heard = time.monotonic()
        self._error, self._fails = "", False
        self._process: subprocess.Popen[bytes] | None = None
        self._over = threading.Event()
        self._sender = threading.Thread(target=self._send, name=f"tracking.{name}", daemon=True)
        self._sender.start()

    def write(self, record: dict[str, Any]) -> None:
        """Queues a record, which nobody may change from now on, for the tracker's process; returns at once."""
        if self._offered == self._taken:  # nothing waits for an answer, so the silence begins now
            self._heard = time.monotonic()
        self._offered += 1
        if not self._error and time.monotonic() - self._heard > SILENT_SECONDS:
            self._fail(f"it has not answered for {SILENT_SECONDS:g} seconds")
        try:
            self._records.put_nowait(record)
        except queue.Full:
            if not self._dropping:
                self._dropping = True
                self._warn(f"{WAITING:,} steps wait already, and further ones are dropped until it takes some")

    def close(self, finished: bool, deadline: float) -> None:
        """Waits until the tracker has taken all records, at most to the `deadline`, and ends its process."""
        with contextlib.suppress(queue.Full):
            self._records.put({"end": finished}, timeout=max(0.0, deadline - time.monotonic()))
        given_up = time.monotonic() + FAILED_CLOSE_SECONDS
        while not (in_time := self._over.wait(0.02)) and time.monotonic() < (given_up if self._fails else deadline):
            pass
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
                if in_time:
                    self._process.wait(max(0.5, deadline - time.monotonic()))
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if lost := self._offered - self._taken:
            why = f" ({self._error})" if self._error else "" if in_time else " (it did not answer in time)"
            self._warn(f"{lost:,} of {self._offered:,} records did not get there{why}; metrics.jsonl has them all")

    def _send(self) -> None:
        # Signals are for the trainer, and what this thread starts inherits that it blocks them.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP})
        try:
            process = self._process = subprocess.Popen(
                [sys.executable, "-P", "-B", str(CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a group of its own, which is ended as a whole
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            threading.Thread(target=self._listen, args=(process,), name=f"{self.name} replies", daemon=True).start()
            assert process.stdin is not None
            message = self._settings
            while True:
                process.stdin.write(json.dumps(message).encode() + b"\n")
                process.stdin.flush()
                if "end" in message:
                    return
                message = self._records.get()
        except OSError as error:  # no process could be started, or it has ended
            self._fail(f"its process ended: {error.strerror}")
            if self._process is None:
                self._over.set()

    def _listen(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            reply = json.loads(line)
            self._heard = time.monotonic()
            if "run" in reply:
                self._begun(reply["run"])
            if "done" in reply:
                self._taken += 1
                self._fails = False
            if "error" in reply:
                self._fail(reply["error"])
            if "end" in reply:
                break
        self._over.set()

    def _fail(self, error: str) -> None:
        first, self._error, self._fails = not self._error, error, True
        if first:
            self._warn(f"{error}; training goes on")

    def _warn(self, text: str) -> None:
        print(f"warning: tracking.{self.name}: {text}", flush=True)


class Trackers:
    """All trackers of a run. Only the main rank makes one."""

    def __init__(self, config: TrackingConfig, run_dir: Path, full_config: dict[str, Any]) -> None:
        self._path, self._lock = run_dir / FILE, threading.Lock()
        self._runs = self._read()
        known = {key: _text(value) for key, value in flat(full_config).items()}
        self._trackers = []
        for name, section in config.chosen.items():
            own = plain(section)
            before = self._runs.get(name, {})
            settings = {
                "tracker": name,
                "name": run_dir.absolute().name,
                "run_dir": str(run_dir.absolute()),
                "config": known,
                "run": before.get("run") if before.get("settings") == own else None,
                **dict.fromkeys(type(section).model_fields),
                **own,
            }
            self._trackers.append(Tracker(name, settings, partial(self._keep, name, own)))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Hands the numbers of a step to all trackers, by name; returns at once."""
        for tracker in self._trackers:
            tracker.write({"step": step, "values": values})

    def close(self, finished: bool) -> None:
        """Ends all trackers; `finished` is whether the run has done all of its steps."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for tracker in self._trackers:
            tracker.close(finished, deadline)

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _keep(self, name: str, settings: dict[str, Any], run: str) -> None:
        with self._lock:
            self._runs[name] = {"run": run, "settings": settings}
            with contextlib.suppress(OSError):  # a full disk: a later start begins another run of the tracker
                write_atomic(self._path, json.dumps(self._runs, indent=1).encode())


def _text(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) else json.dumps(value)
