"""Saves checkpoints in the background: training stops for a copy to host memory, and a thread of each rank writes it.

The threads communicate over their own gloo group, never over a group that training uses: each reports to the main rank
what it wrote, and the main rank publishes the checkpoint, or gives it up, and tells all. So a save completes even if
training has failed on one rank. At most one save is in flight. A save does not survive the death of a rank (the other
ranks' threads fail with it). Local checkpoints, on the nodes' own disks, are written by local_saving.py.
"""

import datetime
import errno
import hashlib
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from configs.checkpoints import CheckpointConfig
from configs.loader import plain
from configs.run_lock import LOCK_FILE
from pretrain.checkpoint import pruning, state, storage
from pretrain.checkpoint.local_disk import LocalDisk
from pretrain.checkpoint.local_saving import LocalSaver
from pretrain.checkpoint.mirror_copies import SIGNAL_SECONDS, Mirroring
from pretrain.checkpoint.storage import CheckpointError, Piece
from pretrain.parallel.engine import Engine
from pretrain.parallel.rank_messages import broadcast_json, gather_json

# The slowest rank's write must end within this time after the fastest's.
AGREEMENT_MINUTES = 60


class Saver:
    """Writes `checkpoints/step_N` of a run. All ranks make one and call its methods in the same order.

    `companions` are the engines of other models that are trained beside the first, by name; each is saved as a
    checkpoint in a folder of the run's. On the main rank `say` is called with one line at the end of each save, from
    the thread that saves.
    """

    def __init__(
        self,
        engine: Engine,
        run_dir: str | Path,
        config: CheckpointConfig,
        say: Callable[[str], None],
        companions: Mapping[str, Engine] | None = None,
        local: LocalDisk | None = None,
    ):
        self._engines = {"": engine, **(companions or {})}  # by folder in the checkpoint
        self.engine, self.run_dir, self.config, self.say = engine, run_dir, config, say
        self.failure: str | None = None  # why the last save was given up, if it was; the same on every rank
        self._error: BaseException | None = None
        self._host: dict[str, dict[str, torch.Tensor]] = {name: {} for name in self._engines}
        self._pieces: dict[str, dict[str, tuple[Piece, dict[str, torch.Tensor]]]] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        self._copy_seconds = 0.0
        self._thread: threading.Thread | None = None
        timeout = datetime.timedelta(minutes=AGREEMENT_MINUTES)
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._mirroring: Mirroring | None = None
        if engine.mesh.is_main:
            pruning.remove_leftovers(run_dir)
            self._mirroring = Mirroring(run_dir, config, say) if config.mirror else None
        dist.barrier(self._group)  # no rank may write its first file before leftovers are removed
        self._local = LocalSaver(local, self._group) if local else None

    def copy(self) -> float:
        """Copies this rank's pieces for the next save; waits first if an earlier save is still being written.

        Returns the seconds that the copy took, without the wait.
        """
        self._wait_for_earlier()
        started = time.perf_counter()
        engines = self._engines.items()
        self._pieces = {name: state.copy_owned(engine, self._host[name]) for name, engine in engines}
        self._facts = {name: state.manifest_facts(engine) for name, engine in engines}
        self._copy_seconds = time.perf_counter() - started
        return self._copy_seconds

    def start(self, step: int, facts: dict[str, Any], ends: bool = True) -> None:
        """Starts the thread that writes the pieces copied by `copy`; `facts` go into the manifest.

        Unless the run `ends` with it, it is a local checkpoint if none is due in the run's folder.
        """
        facts = {"step": step, **facts, **self._facts[""]}
        is_local = self._local is not None and not ends and step % self.config.every != 0
        save = self._save_locally if is_local else self._save
        self._thread = threading.Thread(target=self._run, args=(save, step, facts), name=f"save of step {step}")
        self._thread.start()

    def save_now(self, step: int, facts: dict[str, Any]) -> None:
        """Saves a checkpoint of the present state, and waits until it is written or given up."""
        self.copy()
        self.start(step, facts)
        self.wait()

    def wait(self) -> None:
        """Blocks until no save is in flight. Raises the error that ended its thread, unless the file system failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    @property
    def why(self) -> str:
        """Sentence on why the last save was given up, and what to do."""
        full = any(os.strerror(number) in str(self.failure) for number in (errno.ENOSPC, errno.EDQUOT))
        return f"{self.failure}; {'free disk space' if full else 'see to that'} and run the same command again"

    def wait_for_mirror(self, stopped: bool) -> None:
        """Waits for the copy of the newest checkpoint, as long as the config says, or less if a signal `stopped` it."""
        if self._mirroring:
            self._mirroring.finish(min(self.config.mirror_seconds, SIGNAL_SECONDS if stopped else math.inf))
        if self.config.mirror:
            dist.barrier(self._group)  # a rank that ends earlier would have its launcher end the others

    def __enter__(self) -> "Saver":
        if self._mirroring:
            self._mirroring.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finishes the save in flight when training ends; its error is dropped if training raised one."""
        try:
            self.wait()
        except Exception:
            if kind is None:
                raise
        finally:
            if self._mirroring:
                self._mirroring.__exit__(kind, None, None)

    def _wait_for_earlier(self) -> None:
        started = time.perf_counter()
        busy = self._thread is not None and self._thread.is_alive()
        self.wait()
        if busy and self.engine.mesh.is_main:
            self.say(f"waited {time.perf_counter() - started:.2f} s for the checkpoint before; checkpoint.every is low")

    def _run(self, save: Callable[[int, dict[str, Any]], str | None], step: int, facts: dict[str, Any]) -> None:
        try:
            self.failure = save(step, facts)
        except BaseException as error:  # e.g. another rank has died; `wait` raises it again in the training thread
            self._error = error

    def _save(self, step: int, facts: dict[str, Any]) -> str | None:
        """Writes this rank's file and has the main rank publish. Returns why the save was given up, or None."""
        started = time.perf_counter()
        mesh, final = self.engine.mesh, storage.directory(self.run_dir, step)
        temporary = storage.temporary_name(final)
        answer: dict[str, Any] = {"parts": {}, "failure": None}
        try:
            for name, pieces in self._pieces.items():
                (temporary / name).mkdir(parents=True, exist_ok=True)
                answer["parts"][name] = storage.write_rank(temporary / name, mesh.rank, pieces)
        except OSError as error:
            answer["failure"] = f"rank {mesh.rank} could not write {temporary}: {error.strerror}"
        answers = gather_json(answer, self._group, everywhere=False)
        verdict: dict[str, str | None] = {"failure": None, "mistake": None}
        if mesh.is_main:
            verdict = self._publish(temporary, final, answers, facts)
        verdict = broadcast_json(verdict, self._group)
        if verdict["mistake"] is not None:
            raise CheckpointError(verdict["mistake"])
        if mesh.is_main:
            self._report(step, final, verdict["failure"], time.perf_counter() - started)
        if self._local and verdict["failure"] is None:
            self._local.superseded(step)
        return verdict["failure"]

    def _save_locally(self, step: int, facts: dict[str, Any]) -> str | None:
        """Writes a local checkpoint. Returns why it was given up, or None."""
        assert self._local is not None
        started = time.perf_counter()
        failure = self._local.save(step, self._pieces, lambda parts: self._manifests(parts, facts))
        if self.engine.mesh.is_main:
            seconds = time.perf_counter() - started
            said = f"copied in {self._copy_seconds:.2f} s; saved locally in {seconds:.1f} s: {self._local.said}"
            if failure is not None:
                said = f"warning: no local checkpoint of step {step}: {failure}; earlier ones are untouched"
            self.say(said)
        return failure

    def _manifests(self, parts: Mapping[str, list[dict[str, Any]]], facts: dict[str, Any]) -> dict[str, bytes]:
        """Returns the content of the manifests of all models, by folder."""
        found = {
            name: storage.manifest_content(parts[name], self._companion_facts(name, facts)) for name in parts if name
        }
        sealed = {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}
        facts = {**facts, **({"companions": sealed} if sealed else {})}
        return {**found, "": storage.manifest_content(parts[""], facts)}

    def _publish(
        self, temporary: Path, final: Path, answers: list[dict[str, Any]], facts: dict[str, Any]
    ) -> dict[str, str | None]:
        """Publishes the checkpoint. Returns a `failure` of the file system or a `mistake`, a bug that ends the run."""
        failure = next((answer["failure"] for answer in answers if answer["failure"]), None)
        mistake = None
        if failure is None:
            try:
                parts = {name: [answer["parts"][name] for answer in answers] for name in self._engines}
                sealed = {
                    name: storage.complete(temporary / name, parts[name], self._companion_facts(name, facts))
                    for name in self._engines
                    if name
                }
                storage.publish(temporary, final, parts[""], {**facts, **({"companions": sealed} if sealed else {})})
            except OSError as error:
                failure = f"rank 0 could not publish {final}: {error.filename or temporary}: {error.strerror}"
            except CheckpointError as error:
                mistake = str(error)
        if failure or mistake:
            shutil.rmtree(temporary, ignore_errors=True)
        return {"failure": failure, "mistake": mistake}

    def _companion_facts(self, name: str, facts: dict[str, Any]) -> dict[str, Any]:
        """Returns the facts of a companion's manifest: those of the run, with its own model and optimizer state."""
        model = plain(self._engines[name].model_config)
        identity = {**facts.get("identity", {}), "model": model}
        config = {**facts.get("config", {}), "model": model}
        return {**facts, "identity": identity, "config": config, **self._facts[name]}

    def _report(self, step: int, final: Path, failure: str | None, seconds: float) -> None:
        if failure is not None:
            self.say(f"warning: no checkpoint of step {step}: {failure}; earlier ones are untouched, training goes on")
            return
        self.say(f"copied in {self._copy_seconds:.2f} s; saved {final} in {seconds:.1f} s")
        if not Path(self.run_dir, LOCK_FILE).exists():  # the run holds it as long as it lasts
            self.say(
                f"warning: {self.run_dir} was moved or removed in the middle of the run, and a folder without its "
                "other files was made there; once the run has ended, put the checkpoints in it with those files"
            )
        try:
            held = self._mirroring.held if self._mirroring else None
            pruning.prune(self.run_dir, step, self.config.keep, self.config.keep_every, held)
        except OSError as error:
            self.say(f"warning: old checkpoints of {self.run_dir} could not be removed: {error}")
        if self._mirroring:
            self._mirroring.notify()
