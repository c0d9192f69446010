"""Adds the adapters of a config to the layers of a decoder, before its weights are drawn."""

from collections.abc import Callable

from configs.adapters import AdapterConfig
from pretrain.model.adapters.adalora import SVDLowRank
from pretrain.model.adapters.bottleneck import Bottleneck
from pretrain.model.adapters.low_rank import ExpertLowRank, LowRank
from pretrain.model.adapters.prefix import Prefix, PrefixEncoder
from pretrain.model.adapters.prompt import PromptVectors
from pretrain.model.adapters.quantized_base import quantize, save_codes
from pretrain.model.attention import GroupedAttention
from pretrain.model.context import VirtualTokens
from pretrain.model.decoder import Decoder
from pretrain.model.layer_context import LayerContext
from pretrain.model.moe.experts import Experts
from pretrain.model.tensor_parallel import ColumnLinear, RowLinear, WholeLinear


def add_adapters(decoder: Decoder, config: AdapterConfig, context: LayerContext, std: float = 0.0) -> None:
    """Adds the adapters that the config names to the layers of a model, with parameters that are drawn later.

    They train or evaluate as the model does, so that one which samples has no dropout in its adapters.

    If the config has a `std` above 0, the model with adapters differs from the base from the start. Raises ConfigError
    if the model lacks such layers.
    """
    _ADD[config.kind](decoder, config, context, std)
    decoder.train(decoder.training)


def _add_low_rank(decoder: Decoder, config: AdapterConfig, context: LayerContext, std: float) -> None:
    targets = config.targets_in(decoder.model_config)
    for index, block in decoder.blocks.items():
        for name, module in list(block.named_modules(prefix=f"layers.{index}")):
            if isinstance(module, Experts) and "experts" in targets:
                matrices = [each for each in ("gate_proj", "up_proj", "down_proj") if hasattr(module, each)]
                for each in matrices:
                    module.adapter[each] = ExpertLowRank(getattr(module, each), config, std)
            elif isinstance(module, ColumnLinear | RowLinear | WholeLinear) and name.rpartition(".")[2] in targets:
                form = SVDLowRank if config.kind == "adalora" else LowRank
                adapter = form(module, name, config, context, std)
                module.adapter = adapter
                block.adapter_dropouts.append(adapter.dropout)
                if config.base == "nf4":
                    quantize(module)
        if config.base == "nf4":
            save_codes(block)


def _add_bottlenecks(decoder: Decoder, config: AdapterConfig, context: LayerContext, std: float) -> None:
    for block in decoder.blocks.values():
        for part in config.after:
            block.adapter[part] = Bottleneck(decoder.model_config.hidden_size, config, context, std)


def _add_prompt(decoder: Decoder, config: AdapterConfig, context: LayerContext, _: float) -> None:
    decoder.virtual = VirtualTokens(config.virtual_tokens, in_rows=True)
    if decoder.stage.is_first:
        decoder.adapter["prompt"] = PromptVectors(decoder.model_config.hidden_size, config, context)


def _add_prefixes(decoder: Decoder, config: AdapterConfig, context: LayerContext, _: float) -> None:
    decoder.virtual, model = VirtualTokens(config.virtual_tokens), decoder.model_config
    encoder = None
    if config.kind == "prefix":
        encoder = PrefixEncoder(model.num_kv_heads * model.dim_per_head, config, context)
        decoder.adapter["prefix"] = encoder
    for block in decoder.blocks.values():
        attention = block.attention
        assert isinstance(attention, GroupedAttention)
        attention.adapter["prefix"] = Prefix(attention, block.config.num_kv_heads, config, context, encoder)


_ADD: dict[str, Callable[[Decoder, AdapterConfig, LayerContext, float], None]] = {
    "lora": _add_low_rank,
    "dora": _add_low_rank,
    "adalora": _add_low_rank,
    "bottleneck": _add_bottlenecks,
    "prompt": _add_prompt,
    "p_tuning": _add_prompt,
    "prefix": _add_prefixes,
    "p_tuning_v2": _add_prefixes,
}
