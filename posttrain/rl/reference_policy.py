"""The reference policy: the weights that a run began from, put into the engine for a moment.

A second copy of the model on the device would cost its whole memory. Here each rank keeps in host memory the part of
the reference's fp32 master weights that ZeRO gives it of the weights in training, and exchanges the two around an
evaluation. That costs two gathers of the weights for each rollout. Where new adapters are trained, the reference is the
model with its adapters off, and costs nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.loader import ConfigError
from pretrain.checkpoint import state, storage
from pretrain.checkpoint.lineage import Pin
from pretrain.checkpoint.storage import CheckpointError
from pretrain.checkpoint.whole_model import check_unchanged, separate_adapter
from pretrain.parallel.engine import Engine
from pretrain.run.initial_model import initial_weights


class ReferencePolicy:
    """The weights of a model, ready to be exchanged with an engine's. All ranks make one and use it together."""

    def __init__(self, engine: Engine, pin: Pin) -> None:
        self._engine = engine
        self._weights: state.Masters | None = None
        if engine.adapter is not None and (engine.adapter.merges or not _has_adapter(Path(pin.checkpoint))):
            return
        own = state.Masters.of(engine)
        with initial_weights(pin) as tensors:
            state.begin_from(engine, tensors)
        self._weights = state.Masters.of(engine)
        own.put(engine)

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Context manager in which the engine has the reference's weights; collective. It must not train in it."""
        if self._weights is None:
            with self._engine.without_adapters():
                yield
            return
        own = state.Masters.of(self._engine)
        self._weights.put(self._engine)
        try:
            yield
        finally:
            own.put(self._engine)


def _has_adapter(path: Path) -> bool:
    """Whether a model has adapters that are not merged into its weights, which a run then trains further."""
    is_checkpoint = (path / storage.MANIFEST).is_file()
    return is_checkpoint and separate_adapter(storage.read_manifest(path), path) is not None


def check_reference(pin: Pin) -> None:
    """Raises ConfigError if the model that a run began from, which is its reference, is not there as it was."""
    try:
        check_unchanged(pin)
    except CheckpointError as error:
        raise ConfigError(
            f"rl.kl measures the divergence from {pin.checkpoint}, with which the run began: {error}; restore what "
            "was there, or set rl.kl=none"
        ) from None
