"""Every published model in a tiny size: the parts of a preset are its own, and only the sizes are small.

Sizes differ from each other, so that no dimension can be taken for another, and halves of them are odd, so that kernels
which want aligned rows get none. Presets that differ in sizes alone become the same model, and count once.
"""

import tomllib
from typing import Any

from configs import presets
from configs.loader import plain, validate
from configs.model import ModelConfig

LAYERS, HEADS, HEAD_DIM = 4, 8, 6
SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "num_layers": LAYERS,
    "hidden_size": 42,
    "ffn_hidden_size": 46,
    "num_heads": HEADS,
    "init_std": 0.1,
}
LATENT = {"q_rank": 14, "kv_rank": 10, "nope_head_dim": 6, "rope_head_dim": 4, "v_head_dim": 7}
DELTA = {"num_key_heads": 2, "num_value_heads": 6, "key_head_dim": 6, "value_head_dim": 10}
SCALING: dict[str, Any] = {"original_length": 8, "short_factor": [1.0, 1.5, 2.0], "long_factor": [1.0, 2.0, 4.0]}


def shrunk(name: str) -> dict[str, Any]:
    """Returns the `[model]` section of preset `name` with small sizes."""
    model = tomllib.loads((presets.FOLDER / f"{name}.toml").read_text(encoding="utf-8"))["model"]
    heads, kv_heads = model["num_heads"], model["num_kv_heads"]
    model |= SMALL
    model["num_kv_heads"] = HEADS if heads == kv_heads else 1 if kv_heads == 1 else 2
    attention, position = model.get("attention", {}), model.get("position", {})
    if "latent" in attention:
        attention["latent"] |= {key: LATENT[key] for key in LATENT if key in attention["latent"]}
    else:
        model["head_dim"] = HEAD_DIM
    if "fraction" in position:
        position["fraction"] = 2 / 3
    if "theta" in position:
        position["theta"] = 100.0
    model.get("norm", {}).pop("eps", None)
    if "delta" in attention:
        attention["delta"] |= DELTA
        model["norm"]["eps"] = 0.01  # the reason is beside the model "delta" of `part_models`
    if "scale" in attention:
        attention["scale"] = 0.6
    for section in (attention, *model.get("kinds", {}).values()):
        if "window" in section:
            section["window"] = 5
    if "temperature" in attention:
        attention["temperature"]["floor"] = 3
    if "max_positions" in position:
        position["max_positions"] = 27
    if "scaling" in position:
        position["scaling"] |= {key: SCALING[key] for key in SCALING if key in position["scaling"]}
    if "layer_pattern" in model:  # as many of the last kind as there is room for, but one of each
        pattern = model["layer_pattern"]
        model["layer_pattern"] = [*dict.fromkeys(pattern)] if len(pattern) > LAYERS else pattern
    if "moe" in model:
        model["moe"] = _small_experts(model["moe"])
    return model


def _small_experts(moe: dict[str, Any]) -> dict[str, Any]:
    grouped = moe.get("num_groups", 1) > 1
    small = moe | {"num_experts": 8 if grouped else 6, "top_k": min(2, moe.get("top_k", 2)), "ffn_hidden_size": 14}
    if grouped:
        small |= {"num_groups": 4, "top_groups": 2}
    if "first_layer" in moe:
        small["first_layer"] = 1
    if "shared_ffn_hidden_size" in moe:
        small["shared_ffn_hidden_size"] = 22
    if "dense_layers" in moe:
        small["dense_layers"] = [0]
    return small


def families() -> dict[str, dict[str, Any]]:
    """Returns every distinct shrunk model, under the name of the first preset that becomes it."""
    found: dict[str, dict[str, Any]] = {}
    for name in presets.names():
        model = plain(validate(ModelConfig, shrunk(name)))  # with defaults, so that like models are equal
        if model not in found.values():
            found[name] = model
    return found


FAMILIES = families()
