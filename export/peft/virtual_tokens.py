"""Prompt tuning, P-tuning, prefix tuning and P-tuning v2 in PEFT's format.

A file of PEFT holds one trained row for each virtual token, and not the encoder that made it: a vector in place of an
embedding, or the keys and values of all layers. So an adapter that is read again trains these rows directly.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from configs.adapters import AdapterConfig
from configs.loader import ConfigError
from configs.model import ModelConfig
from export.peft.adapter import Base, OwnAdapter, PeftAdapter, PeftError
from pretrain.model import LayerContext
from pretrain.model.adapters.prompt import PromptVectors

TENSOR = "prompt_embeddings"
PROMPT, PREFIX = "adapter.prompt.", "adapter.prefix."
LAYER = "layers.{}.attention.adapter.prefix."


@dataclass(frozen=True)
class VirtualTokenForm:
    """A method that trains virtual tokens; a file that several kinds could have written is read as the first."""

    kinds: tuple[str, ...]
    peft_type: str

    def check(self, adapter: AdapterConfig, model: ModelConfig) -> None:
        """Raises PeftError for vectors in place of embeddings that are scaled (see `Form.check`)."""
        if model.scale_embedding and adapter.prepends:
            raise PeftError(
                "the model scales embeddings, and versions of transformers differ in whether they scale what PEFT puts "
                "before them; train with adapter.kind=prefix or lora, which can be written"
            )

    def write(self, adapter: OwnAdapter, base: Base) -> PeftAdapter:
        """Returns a run's virtual tokens in PEFT's format (see `Form.write`)."""
        config, model = adapter.config, base.model
        rows = _vectors(adapter, model) if config.prepends else _keys_and_values(adapter, model)
        written: dict[str, Any] = {
            "peft_type": self.peft_type,
            "task_type": "CAUSAL_LM" if model.has_logits else "SEQ_CLS",
            "inference_mode": True,
            "num_virtual_tokens": config.virtual_tokens,
            "num_transformer_submodules": 1,
            "num_layers": model.num_layers,
            "num_attention_heads": model.num_heads if config.prepends else model.num_kv_heads,
            "token_dim": model.hidden_size if config.prepends else model.num_kv_heads * model.dim_per_head,
        }
        if config.kind == "p_tuning":
            written |= {"encoder_reparameterization_type": config.encoder.upper()}
            written |= {"encoder_hidden_size": config.encoder_size}
        return PeftAdapter(written, {TENSOR: rows.contiguous()})

    def read(self, adapter: PeftAdapter, base: Base) -> OwnAdapter:
        """Returns PEFT's virtual tokens in Trivium's form (see `Form.read`)."""
        if sorted(adapter.tensors) != [TENSOR]:
            raise PeftError(
                f"adapter_model.safetensors has the tensors {', '.join(sorted(adapter.tensors)[:4]) or 'none'}, where "
                f"peft_type = {self.peft_type!r} has {TENSOR} alone"
            )
        rows, model = adapter.tensors[TENSOR].float(), base.model
        prepends = self.peft_type != "PREFIX_TUNING"
        width = model.num_kv_heads * model.dim_per_head
        wanted = model.hidden_size if prepends else model.num_layers * 2 * width
        if rows.ndim != 2 or rows.shape[1] != wanted:
            raise PeftError(
                f"{TENSOR} is {list(rows.shape)}, and rows of {wanted} numbers belong to the base model; it is an "
                "adapter of another base"
            )
        config = AdapterConfig(kind="prompt" if prepends else "p_tuning_v2", virtual_tokens=len(rows))
        try:
            config.check_model(model, seq_length=1)
        except ConfigError as error:
            raise PeftError(str(error)) from None
        if prepends:
            return OwnAdapter(config, {f"{PROMPT}embedding": rows})
        parts = rows.split(width, 1)
        names = [LAYER.format(i) + part for i in range(model.num_layers) for part in ("keys", "values")]
        return OwnAdapter(config, {name: part.contiguous() for name, part in zip(names, parts, strict=True)})


@torch.no_grad()
def _vectors(adapter: OwnAdapter, model: ModelConfig) -> torch.Tensor:
    """Returns the vectors [n, H] that stand in place of embeddings."""
    made = PromptVectors(model.hidden_size, adapter.config, LayerContext())
    made.load_state_dict({name.removeprefix(PROMPT): tensor.float() for name, tensor in adapter.tensors.items()})
    return made.vectors()


def _keys_and_values(adapter: OwnAdapter, model: ModelConfig) -> torch.Tensor:
    """Returns the keys and the values of all layers, one layer after another, [n, L * 2 * K * D]."""
    tensors = {name: tensor.float() for name, tensor in adapter.tensors.items()}
    rows = []
    for layer in range(model.num_layers):
        own = LAYER.format(layer)
        if adapter.config.kind == "p_tuning_v2":
            rows += [tensors[f"{own}keys"], tensors[f"{own}values"]]
            continue
        weight, bias = tensors[f"{PREFIX}hidden.weight"], tensors[f"{PREFIX}hidden.bias"]
        features = torch.tanh(F.linear(tensors[f"{PREFIX}embedding"], weight, bias))
        rows += [F.linear(features, tensors[f"{own}{x}_weight"], tensors[f"{own}{x}_bias"]) for x in ("key", "value")]
    return torch.cat(rows, 1)
