"""AdaLoRA in PEFT's format, as LoRA: the product of P diag(l) and Q, whose pruned triplets are zeros.

PEFT has an AdaLoRA of its own, which divides by its rank and a little more; LoRA computes exactly what was trained.
"""

import torch

from configs.adapters import AdapterConfig
from configs.model import ModelConfig
from export.peft.adapter import Base, OwnAdapter, PeftAdapter
from export.peft.low_rank import LowRankForm
from pretrain.model.adapters.merging import adapter_name, parts_by_target


class AdaLoraForm:
    """AdaLoRA, written as `peft_type` LORA; a file of that type is read as LoRA."""

    kinds: tuple[str, ...] = ("adalora",)
    peft_type = "LORA"

    def check(self, adapter: AdapterConfig, model: ModelConfig) -> None:
        """Accepts every AdaLoRA (see `Form.check`)."""

    def write(self, adapter: OwnAdapter, base: Base) -> PeftAdapter:
        """Returns a run's AdaLoRA in PEFT's format, as LoRA (see `Form.write`)."""
        tensors: dict[str, torch.Tensor] = {}
        for target, parts in parts_by_target(adapter.tensors).items():
            tensors[adapter_name(target, "a")] = parts["a"]
            tensors[adapter_name(target, "b")] = parts["b"] * parts["lambdas"]
        kept = {
            name: getattr(adapter.config, name) for name in ("rank", "alpha", "rank_stabilized", "dropout", "targets")
        }
        return LowRankForm().write(OwnAdapter(AdapterConfig(kind="lora", **kept), tensors), base)

    def read(self, adapter: PeftAdapter, base: Base) -> OwnAdapter:
        """Returns an adapter of PEFT in Trivium's form (see `Form.read`)."""
        return LowRankForm().read(adapter, base)
