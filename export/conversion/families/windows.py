"""Layers with a sliding window in turn with layers that see everything, as `layer_types` of config.json says it."""

from collections.abc import Callable
from typing import Any

from configs.model import ModelConfig
from export.conversion.config_keys import Custom, Draft, shortest_pattern

SLIDING, FULL = "sliding_attention", "full_attention"
Types = Callable[[int, int], bool]  # (index of a layer, distance between full ones): whether it has a window


def alternating(slides: Types, width: int, every: int = 2, local: dict[str, Any] | None = None) -> Custom:
    """Returns the keys of the kinds of layers, "sliding" and "full".

    `slides`, `width` and `every` are what transformers takes where layer_types, sliding_window and
    sliding_window_pattern are absent. `local` is what else layers with a window change in `[model.kinds]`.
    """

    def read(draft: Draft) -> None:
        raw, count = draft.raw, draft.raw.get("num_hidden_layers")
        if not isinstance(count, int):
            return
        apart = raw.get("sliding_window_pattern", raw.get("_sliding_window_pattern", every))
        types = raw.get("layer_types") or [SLIDING if slides(i, apart) else FULL for i in range(count)]
        if not isinstance(types, list) or len(types) != count or not set(types) <= {SLIDING, FULL}:
            return draft.refuse("layer_types", types, f"{count} values, each {FULL!r} or {SLIDING!r}")
        length = raw.get("sliding_window", width)
        if SLIDING not in types:
            return
        if not isinstance(length, int):
            return draft.refuse("sliding_window", length, f"a number of tokens, as layer_types has {SLIDING!r}")
        names = ["sliding" if kind == SLIDING else "full" for kind in types]
        sections = {"full": {}, "sliding": {"pattern": "sliding", "window": length, **(local or {})}}
        draft.put("layer_pattern", shortest_pattern(names))
        draft.put("kinds", {name: sections[name] for name in sections if name in names})

    def write(config: ModelConfig) -> dict[str, Any]:
        sliding = [layer.attention.pattern == "sliding" for layer in config.layers]
        return {
            "layer_types": [SLIDING if slides else FULL for slides in sliding],
            "sliding_window": config.layer(sliding.index(True)).attention.window if any(sliding) else width,
        }

    return Custom(read, write)
