"""A whole copy of the model in training, gathered from all ranks into one decoder for sampling.

The model must fit on one device; a larger one would need an inference engine.
"""

from pretrain.checkpoint.state import gather_weights
from pretrain.model import Decoder, build_single, load_weights
from pretrain.parallel.engine import Engine
from pretrain.parallel.groups import Mesh


class PolicyCopy:
    """A decoder with the engine's weights as of the last `refresh`, in its precision, on its device."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._decoder: Decoder | None = None

    @property
    def mesh(self) -> Mesh:
        """The mesh of the engine's ranks."""
        return self._engine.mesh

    @property
    def samples_here(self) -> bool:
        """Whether this is the rank of its data-parallel replica that holds the copy and samples."""
        return self.mesh.leads_replica

    @property
    def decoder(self) -> Decoder:
        """The copy, on ranks where `samples_here` is True, after the first `refresh`."""
        assert self._decoder is not None, "call refresh first, and sample on the rank that holds the copy"
        return self._decoder

    def refresh(self) -> None:
        """Copies the current weights. Collective: all ranks call it."""
        weights = gather_weights(self._engine)
        if not self.samples_here:
            return
        if self._decoder is None:
            dtype = next(self._engine.module.parameters()).dtype  # the balance of experts, also a weight, is fp32
            self._decoder = build_single(self._engine.model_config, weights, dtype).to(self.mesh.device)
        else:
            load_weights(self._decoder, weights)
