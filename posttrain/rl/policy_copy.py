"""The weights that completions are sampled with: those of the model in training, in a decoder that can continue texts.

Where a rank's training module holds whole weights (no tensor, expert or pipeline parallel, ZeRO below 3, no adapters
that are merged into a copy), the decoder uses the same memory, and nothing is copied. Else there are two ways:

whole:  every rank gathers a whole copy, one tensor at a time, and samples its own share of the completions. The model
        must fit on one device beside its training state.
split:  ranks of tensor and expert parallel keep their slices, whose memory the decoder uses, adapters too, and sample
        the same completions together; nothing is gathered. There is no pipeline or context parallel in it.

With vLLM every rank has a whole copy, too, from which it gives the weights to the process in which vLLM samples.
"""

from collections.abc import Iterator

import torch

from configs.method_layout import Way
from posttrain.rl.text_sampler import DecoderSampler, TextSampler
from posttrain.rl.vllm_sampler import VLLMSampler
from pretrain.checkpoint.state import gathered_weights
from pretrain.generation.sampling import SampledModel
from pretrain.model import Decoder, LayerContext
from pretrain.model.adapters import add_adapters
from pretrain.parallel import zero
from pretrain.parallel.engine import Engine
from pretrain.parallel.groups import Mesh
from pretrain.parallel.split_decoder import SplitDecoder


class PolicyCopy:
    """A decoder with the engine's weights as of the last `refresh`, in their precision, on their device.

    Completions are divided among groups of ranks that sample together, of which there are `samplers`; this rank is in
    group number `sampler`, and speaks for it if `leads` is True.
    """

    def __init__(self, way: Way = "whole", vllm: VLLMSampler | None = None) -> None:
        """Lets `vllm`, if it is given, take the weights at each refresh and sample with them; copies are then whole."""
        self.way, self._vllm = way, vllm
        self._decoder: SampledModel | None = None
        self._mesh: Mesh | None = None

    @property
    def mesh(self) -> Mesh:
        """The mesh of the engine's ranks, after the first `refresh`."""
        assert self._mesh is not None, "call refresh first"
        return self._mesh

    @property
    def samplers(self) -> int:
        layout = self.mesh.layout
        return layout.world_size // (layout.tp * layout.ep if self.way == "split" else 1)

    @property
    def sampler(self) -> int:
        layout = self.mesh.layout
        return self.mesh.dp_rank // layout.ep if self.way == "split" else self.mesh.rank

    @property
    def leads(self) -> bool:
        return self.way == "whole" or (self.mesh.tp_rank == 0 and self.mesh.ep_rank == 0)

    def share(self, count: int) -> range:
        """Returns which of `count` completions this rank samples: consecutive ones, an equal share or one more."""
        return range(count * self.sampler // self.samplers, count * (self.sampler + 1) // self.samplers)

    @property
    def decoder(self) -> SampledModel:
        """The decoder, after the first `refresh`."""
        assert self._decoder is not None, "call refresh first"
        return self._decoder

    @property
    def text_sampler(self) -> TextSampler:
        """The sampler that continues prompts with the weights of the last `refresh`."""
        return self._vllm or DecoderSampler(self.decoder)

    def refresh(self, engine: Engine) -> None:
        """Takes the engine's current weights. Collective: all ranks call it."""
        self._refresh_decoder(engine)
        if self._vllm is not None:
            assert isinstance(self._decoder, Decoder), "vLLM takes whole copies"
            self._vllm.take(self._decoder, self.mesh)

    @torch.no_grad()
    def _refresh_decoder(self, engine: Engine) -> None:
        self._mesh, layout = engine.mesh, engine.mesh.layout
        zero.wait_for_weights(engine.zero)
        if self.way == "split":
            if not isinstance(self._decoder, SplitDecoder):
                self._decoder = SplitDecoder(engine.model_config, None, self.mesh, _dtype(engine), engine.adapter)
            _use_memory(self._decoder.decoder, engine)
            return
        if not isinstance(self._decoder, Decoder):
            context = LayerContext(dtype=_dtype(engine), device=self.mesh.device)
            self._decoder = Decoder(engine.model_config, context=context).eval()
            if engine.separate_adapter is not None:
                add_adapters(self._decoder, engine.separate_adapter, context)
        is_merged = engine.adapter is not None and engine.adapter.merges
        if layout.tp == layout.ep == layout.pp == 1 and layout.zero < 3 and not is_merged:
            _use_memory(self._decoder, engine)
        else:
            _copy(self._decoder, gathered_weights(engine))


def _dtype(engine: Engine) -> torch.dtype:
    return next(engine.module.parameters()).dtype  # the balance of experts, also a weight, is fp32


def _use_memory(decoder: Decoder, engine: Engine) -> None:
    """Lets the decoder's parameters use the memory of the engine's, which are the same slices."""
    own = dict(engine.module.named_global_parameters())
    for name, parameter in decoder.named_global_parameters():
        parameter.data = own[name].data
    balance = engine.module.named_balance()
    for name, tensor in decoder.named_balance().items():
        tensor.copy_(balance[name])


def _copy(decoder: Decoder, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    own: dict[str, torch.Tensor] = {**dict(decoder.named_global_parameters()), **decoder.named_balance()}
    for name, tensor in weights:
        own.pop(name).copy_(tensor)
    assert not own, f"no weights came for {sorted(own)[:3]}"
