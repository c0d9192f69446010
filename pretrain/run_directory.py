"""The folder of a training run: its lock, the facts of the run, and its spans of steps with the same data and settings.

One run at a time trains in it, by a lock that the main rank holds. The lock is the kernel's (flock): it goes when the
process does, however that was. What it leaves out: file systems on which two machines can both hold it.
"""

import contextlib
import fcntl
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch

from configs import files, loader, signals
from configs.loader import ConfigError
from configs.run_lock import locked
from configs.train import ModelConfig, TrainerConfig
from launch.environment import ClusterEnvironment
from pretrain import history
from pretrain.batch_source import BatchSource
from pretrain.checkpoint.lineage import Lineage
from pretrain.parallel.groups import Mesh

ENDING = "ending"  # in the lock file of a run that was told to stop
PACKAGES = ("torch", "megatron-core", "deepspeed", "numpy")


class RunDirectory:
    """What a run's folder says of it beside checkpoints and metrics. All ranks have one; the main rank writes."""

    def __init__(
        self, config: TrainerConfig, model_config: ModelConfig, source: BatchSource, lineage: Lineage, mesh: Mesh
    ):
        self.path = Path(config.run.dir)
        self.data_spans: list[history.DataSpan] = []
        self._config, self._model_config = config, model_config
        self._source, self._lineage, self._mesh = source, lineage, mesh

    @property
    def full_config(self) -> dict[str, Any]:
        """The resolved config; that of a run which begins from another's checkpoint has the model in it too."""
        return {**loader.plain(self._config), "model": loader.plain(self._model_config)}

    @contextmanager
    def hold(self, watch: signals.Watch) -> Iterator[None]:
        """Holds the run directory's lock; a second run in it is refused on all ranks.

        It waits for one that was told to stop and is saving, as one whose launcher was killed may be when it is started
        again.
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
        """Takes over the data spans of the checkpoint that the run goes on from."""
        self.data_spans = manifest.get("stretches", [])
        if self.data_spans:  # of the last one at least, settings are known in any version
            config = self.data_spans[-1].get("config", manifest["config"])
            self.data_spans[-1] = {**self.data_spans[-1], "config": history.completed(type(self._config), config)}

    def begin_data_span(self, step: int, samples: int, say: Callable[[str], None]) -> None:
        """Notes from which step on the run has these data and settings, and says what has changed."""
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
            for line in history.news(self.data_spans[-1], self._config, now):
                say(line)
        self.data_spans = history.go_on(self.data_spans, now)

    def write_facts(self, identity: dict[str, Any]) -> None:
        """Writes config, environment and history, the tokenizer, and into the plan that this run needs it."""
        self._lineage.keep(self.path, identity)
        files.write_atomic(self.path / "config.toml", loader.toml(self.full_config))
        device = self._mesh.device
        facts = {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
            "packages": {name: version(name) for name in PACKAGES},
            "layout": str(self._mesh.layout),
            "launcher": ClusterEnvironment.read().as_dict(),
            "parameters": self._model_config.num_parameters(),
        }
        files.write_atomic(self.path / "env.json", json.dumps(facts, indent=1).encode())
        history.write(self.path, self.data_spans)
        try:
            self._source.note_use(self.path)
        except OSError as error:
            print(f"warning: {error}; a later data run there cannot know what this run needs", flush=True)


def _take(lock: IO[str], run_dir: Path) -> bool:
    """Takes the lock, from a run that ends if need be. Returns whether it is ours."""
    deadline = time.monotonic() + signals.ORPHAN_SECONDS
    said = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            lock.seek(0)
            if lock.read() != ENDING or time.monotonic() > deadline:
                return False
        if not said:
            print(f"waiting for the run in {run_dir} that was told to stop and is saving", flush=True)
            said = True
        time.sleep(0.2)


def _write(lock: IO[str], text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a full disk; a run that has ended meanwhile
        lock.truncate(0)
        lock.write(text)
        lock.flush()
