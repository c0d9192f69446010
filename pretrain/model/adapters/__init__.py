"""Parameter-efficient tuning: small trained modules beside frozen weights, and their merging into whole weights."""

from pretrain.model.adapters.attaching import add_adapters
from pretrain.model.adapters.merging import is_adapter, is_state, merged
from pretrain.model.adapters.switching import adapters_off

__all__ = ["adapters_off", "add_adapters", "is_adapter", "is_state", "merged"]
