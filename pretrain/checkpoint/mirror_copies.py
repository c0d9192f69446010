"""Copies a run's checkpoints to its mirror in the background, and removes old ones there as `checkpoint.keep` says.

One thread of the main rank compares what the run's folder has with what the mirror has, each time a checkpoint was
written: so copies that failed, or that an earlier start of the run did not finish, are made up for. If training is
faster than the copy, the newest checkpoint is next. Training never waits for it but at its end, for a limited time. A
mirror is one run's alone.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from configs.checkpoints import CheckpointConfig
from configs.loader import ConfigError
from pretrain.checkpoint import storage
from pretrain.checkpoint.mirror import RUN_FILES, Mirror, MirrorError, is_same, local_files, patiently
from pretrain.checkpoint.storage import MANIFEST, CheckpointError

AT_ONCE = 4  # files that are copied at the same time
SIGNAL_SECONDS = 30.0  # the longest wait for a copy after a signal, since schedulers kill soon after it
REMEDY = (
    "check the address, and endpoint and credentials in the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID...); "
    "checkpoints of the run's own folder are untouched, and the copy is tried again after the next one"
)


class Mirroring:
    """Context manager of the thread that copies checkpoints of the run in `run_dir`; `say` prints a line.

    `notify` asks for the copy of a checkpoint that was just written. `held` is the step that is being copied, which
    must not be removed; None for none.
    """

    def __init__(self, run_dir: str | Path, config: CheckpointConfig, say: Callable[[str], None]):
        assert config.mirror is not None
        self._run_dir, self._config, self._say = Path(run_dir), config, say
        self._mirror = Mirror(config.mirror)
        self._wake, self._idle, self._stop = threading.Event(), threading.Event(), threading.Event()
        self._lock = threading.Lock()  # of `_wake` and `_idle`
        self._failures, self._since = 0, 0  # in a row, and the step of the first
        self.held: int | None = None
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.notify()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout=1.0)

    def notify(self) -> None:
        """Asks for a copy of what the mirror lacks."""
        with self._lock:
            self._idle.clear()
            self._wake.set()

    def finish(self, seconds: float) -> None:
        """Waits until the mirror has the newest checkpoint, at most `seconds`; says so if that is not the case."""
        began = time.monotonic()
        done = self._idle.wait(seconds)
        if done and not self._failures:
            return
        why = "the last try failed" if done else f"was not finished after {time.monotonic() - began:.0f} s"
        newest = storage.steps(self._run_dir)[-1:]
        self._say(
            f"warning: the copy of {''.join(f'step {step}' for step in newest)} to {self._config.mirror}: {why}; "
            f"{self._run_dir} has it, and the same command run again copies it"
        )

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            if self._stop.is_set():
                return
            self._copy_all()
            with self._lock:
                if not self._wake.is_set():
                    self._idle.set()

    def _copy_all(self) -> None:
        step = None
        try:
            while not self._stop.is_set() and (step := self._next()) is not None:
                self.held = step
                self._copy(step)
            if not self._stop.is_set():
                self._prune()
        except (MirrorError, CheckpointError, ConfigError, OSError) as error:
            if not self._stop.is_set():
                self._fail(step, str(error))
        except Exception as error:  # a bug, which must not end the training; its text may hold anything
            self._fail(step, type(error).__name__)
        finally:
            self.held = None

    def _fail(self, step: int | None, said: str) -> None:
        self._failures += 1
        self._since = self._since or step or max(storage.steps(self._run_dir), default=0)
        if self._failures & (self._failures - 1):  # printed the first, second, fourth, eighth time
            return
        times = f" ({self._failures} times since step {self._since})" if self._failures > 1 else ""
        what = f"the checkpoint of step {step} was not copied to" if step is not None else "no checkpoint was copied to"
        self._say(f"warning: {what} {self._config.mirror}{times}: {said}; {REMEDY}")

    def _kept(self) -> list[int]:
        """Returns the steps that `checkpoint.keep` and `keep_every` keep of the run's own, ascending."""
        own, every = storage.steps(self._run_dir), self._config.keep_every
        return [step for step in own if step in own[-self._config.keep :] or (every and step % every == 0)]

    def _next(self) -> int | None:
        """Returns the newest checkpoint of the run that the mirror lacks; None if it has all that are kept."""
        for step in reversed(self._kept()):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                if not patiently(partial(is_same, self._mirror, self._run_dir, step), self._stop):
                    return step
        return None

    def _copy(self, step: int) -> None:
        """Copies one checkpoint, its manifest last, and then the small files of the run."""
        began, path = time.monotonic(), storage.directory(self._run_dir, step)
        folder, files = f"checkpoints/step_{step}", local_files(path)
        manifest = (path / MANIFEST).read_bytes()
        patiently(partial(self._mirror.remove, step), self._stop)  # what a copy that was cut off has left
        with ThreadPoolExecutor(AT_ONCE, "mirror") as pool:
            list(pool.map(lambda name: self._put(path / name, f"{folder}/{name}", files[name]), files))
        for name in RUN_FILES:
            if (file := self._run_dir / name).is_file():
                patiently(partial(self._mirror.write, name, file.read_bytes()), self._stop)
        if self._stop.is_set():
            return
        patiently(partial(self._mirror.write, f"{folder}/{MANIFEST}", manifest), self._stop)
        size = sum(facts["bytes"] for facts in files.values())
        failed = f", after {self._failures} failures" if self._failures else ""
        self._failures = self._since = 0
        self._say(
            f"copied step {step} to {self._config.mirror} in {time.monotonic() - began:.1f} s ({size / 1e6:.1f} MB)"
            f"{failed}"
        )

    def _put(self, file: Path, name: str, facts: dict[str, int]) -> None:
        if not self._stop.is_set():
            patiently(partial(self._mirror.put, file, name, facts), self._stop)

    def _prune(self) -> None:
        """Removes checkpoints from the mirror that are not kept any more, and those that were never whole."""
        own, every = storage.steps(self._run_dir), self._config.keep_every
        there = [step for step in self._mirror.steps() if own and step <= own[-1]]
        whole = [step for step in there if self._mirror.manifest(step) is not None]
        for step in there:
            newest = step in whole[-self._config.keep :]
            if not newest and not (step in whole and every and step % every == 0):
                patiently(partial(self._mirror.remove, step), self._stop)


def make_up(run_dir: Path, config: CheckpointConfig, say: Callable[[str], None]) -> None:
    """Copies what the mirror of a finished run lacks, within `checkpoint.mirror_seconds`."""
    if config.mirror is not None:
        with Mirroring(run_dir, config, say) as mirroring:
            mirroring.finish(config.mirror_seconds)
