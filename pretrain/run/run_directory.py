"""The folder of a training run: its lock, its config and environment, and its history of data and settings.

The main rank holds a lock, so that only one run at a time trains in the folder. The lock is the kernel's (flock), which
releases it when the process ends, however that happens. File systems on which two machines can both get a flock are not
protected.
"""

import contextlib
import fcntl
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch

import pretrain.model
from configs import files, loader, signals
from configs.loader import ConfigError
from configs.model import ModelConfig
from configs.run_lock import locked
from configs.train import TrainerConfig
from pretrain.checkpoint import pruning
from pretrain.checkpoint.lineage import Lineage
from pretrain.checkpoint.local_disk import LocalDisk
from pretrain.data.batch_source import BatchSource
from pretrain.parallel.groups import Mesh
from pretrain.run import history

ENDING = "ending"  # content of the lock file of a run that has got a signal to stop
PACKAGES = ("torch", "megatron-core", "deepspeed", "numpy")


class RunDirectory:
    """The folder of a run, without its checkpoints and metrics. Every rank makes one; only the main rank writes."""

    def __init__(
        self, config: TrainerConfig, model_config: ModelConfig, source: BatchSource, lineage: Lineage, mesh: Mesh
    ):
        self.path = Path(config.run.dir)
        self.data_spans: list[history.DataSpan] = []
        self._config, self._model_config = config, model_config
        self._source, self._lineage, self._mesh = source, lineage, mesh
        local_dir = config.checkpoint.local_dir
        self.local = LocalDisk(mesh, self.path, local_dir) if local_dir else None

    @property
    def compiled(self) -> Path:
        """The folder of compiled code: one for each version of our model, of whose operators torch sees the names."""
        code = hashlib.sha256()
        for source in sorted(Path(pretrain.model.__file__).parent.rglob("*.py")):
            code.update(source.read_bytes())
        return Path(self.path, "compiled", code.hexdigest()[:16])

    @property
    def full_config(self) -> dict[str, Any]:
        """The resolved config with the model's keys, which SFT and RL configs take from a checkpoint."""
        return {**loader.plain(self._config), "model": loader.plain(self._model_config)}

    @contextmanager
    def hold(self, watch: signals.Watch) -> Iterator[None]:
        """Context that holds the folder's lock. Raises ConfigError on all ranks if another run holds it.

        If the other run has got a signal to stop and is saving, this one waits for it instead. That happens when a
        launcher was killed and the same command is run again.
        """
        with contextlib.ExitStack() as stack:
            lock = None
            if self._mesh.is_main:
                lock = stack.enter_context(locked(self.path, lambda file: _take(file, self.path)))
            if not self._mesh.gather_json(lock is not None)[0]:
                raise ConfigError(
                    f"another process is training in {self.path}; wait for it, stop it or choose another run.dir"
                )
            if lock is not None:
                held = lock
                _write(held, "")
                watch.on_first_signal(lambda: _write(held, ENDING))
            yield

    def take_data_spans(self, manifest: dict[str, Any]) -> None:
        """Takes over the data spans in the manifest of the checkpoint that the run continues from."""
        self.data_spans = manifest.get("data_spans", [])
        if self.data_spans:  # older spans may lack their config; that of the last is the manifest's
            config = self.data_spans[-1].get("config", manifest["config"])
            self.data_spans[-1] = {**self.data_spans[-1], "config": history.completed(type(self._config), config)}

    def begin_data_span(self, step: int, samples: int, say: Callable[[str], None]) -> None:
        """Begins a data span at `step` if data or settings have changed, and prints each change through `say`."""
        now: history.DataSpan = {
            "first_step": step,
            "first_sample": samples,
            "global_batch_size": self._config.train.global_batch_size,
            "data": self._source.fingerprint,
            "plan": self._source.location,
            "facts": self._source.facts,
            "config": self.full_config,
        }
        if self.data_spans and self._mesh.is_main:
            for line in history.describe_changes(self.data_spans[-1], self._config, now):
                say(line)
        self.data_spans = history.append_span(self.data_spans, now)

    def pass_over(self, step: int, samples: int, say: Callable[[str], None]) -> None:
        """Begins a data span at `step` and sample `samples`, after samples that are not trained on."""
        self.begin_data_span(step, samples, say)
        self.write_history()

    def write_history(self) -> None:
        """Writes history.json again, if this is the main rank."""
        if self._mesh.is_main:
            history.write(self.path, self.data_spans)

    def write_facts(self, identity: dict[str, Any]) -> None:
        """Writes the tokenizer, config.toml, env.json and history.json, and notes beside all that this run needs.

        A run needs its plan, and the checkpoints of other runs that it uses.
        """
        self._lineage.keep(self.path, identity)
        files.write_atomic(self.path / "config.toml", loader.toml(self.full_config))
        device = self._mesh.device
        facts = {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
            "packages": {name: version(name) for name in PACKAGES},
            "layout": str(self._mesh.layout),
            "launcher": self._mesh.environment.as_dict(),
            "parameters": self._model_config.num_parameters(),
        }
        files.write_atomic(self.path / "env.json", json.dumps(facts, indent=1).encode())
        history.write(self.path, self.data_spans)
        try:
            self._source.note_use(self.path)
        except OSError as error:
            print(
                f"warning: {error}; a later data run there cannot know that this run needs its tokens and tokenizer, "
                "and may replace them",
                flush=True,
            )
        for checkpoint in self._source.checkpoints:
            pruning.tell_use(Path(checkpoint), self.path, partial(print, flush=True))


def _take(lock: IO[str], run_dir: Path) -> bool:
    """Locks the file, after waiting for a run that is ending if there is one; returns whether it succeeded."""
    deadline = time.monotonic() + signals.ORPHAN_SECONDS
    announced = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            lock.seek(0)
            if lock.read() != ENDING or time.monotonic() > deadline:
                return False
        if not announced:
            print(f"waiting for the run in {run_dir}, which got a signal to stop and is saving", flush=True)
            announced = True
        time.sleep(0.2)


def _write(lock: IO[str], text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # OSError: the disk is full; ValueError: the file is closed already
        lock.seek(0)
        if lock.read() == text:  # a run that is refused leaves the file with its time
            return
        lock.truncate(0)
        lock.write(text)
        lock.flush()
