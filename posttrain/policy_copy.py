"""A whole copy of the model in training, for sampling: gathered from tensor and pipeline ranks into one
decoder.

Leaves out models too large for one device: those need an inference engine of their own.
"""

from pretrain.checkpoint.state import gather_weights
from pretrain.model import Decoder, build_single, load_weights
from pretrain.parallel.engine import Engine
from pretrain.parallel.groups import Mesh


class PolicyCopy:
    """The engine's weights as of the last `refresh`, in its precision, on its device."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._decoder: Decoder | None = None

    @property
    def mesh(self) -> Mesh:
        return self._engine.mesh

    @property
    def samples_here(self) -> bool:
        """True on the one rank of each data-parallel replica that holds a copy and samples."""
        return self.mesh.leads_replica

    @property
    def decoder(self) -> Decoder:
        assert self._decoder is not None, "refresh first, and sample on the rank that holds the copy"
        return self._decoder

    def refresh(self) -> None:
        """Takes the current weights. Collective: all ranks call it."""
        weights = gather_weights(self._engine)
        if not self.samples_here:
            return
        if self._decoder is None:
            dtype = next(iter(weights.values())).dtype
            self._decoder = build_single(self._engine.model_config, weights, dtype).to(self.mesh.device)
        else:
            load_weights(self._decoder, weights)
