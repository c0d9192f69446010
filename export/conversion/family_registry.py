"""All families, and which of them a model or a config.json is of."""

from collections.abc import Iterator, Mapping
from typing import Any

from configs.model import LayerConfig, ModelConfig
from configs.model_parts import RopeScalingConfig
from export.conversion.families import (
    baichuan,
    deepseek,
    gemma,
    glm,
    gpt,
    gpt_oss,
    llama,
    llama4,
    olmo,
    phi,
    qwen,
    qwen3_next,
)
from export.conversion.table import Family
from export.conversion.values import WITH_CLASSIFIER, is_classifier, with_values

# The first family that can express a model is taken, so simple ones come first.
FAMILIES: tuple[Family, ...] = (
    *llama.FAMILIES,
    *qwen.FAMILIES,
    *qwen3_next.FAMILIES,
    *deepseek.FAMILIES,
    *glm.FAMILIES,
    *llama4.FAMILIES,
    *gemma.FAMILIES,
    *olmo.FAMILIES,
    *phi.FAMILIES,
    *gpt_oss.FAMILIES,
    *gpt.FAMILIES,
)
# The same with a scalar head in place of the output head, of reward models.
CLASSIFIERS: tuple[Family, ...] = tuple(with_values(one) for one in FAMILIES if one.model_type in WITH_CLASSIFIER)
# Families without a class in transformers: their files can be imported, and exported only as another family.
WITHOUT_CLASS: tuple[Family, ...] = (baichuan.BAICHUAN, qwen.QWEN1)

# Model types that people ask for, and what they have that no part of the decoder computes.
LACKING = {
    "kimi_linear": "its gated delta nets decay each element of a key by itself",
}


def family_of(config: ModelConfig, preferred: str | None = None) -> Family:
    """Returns the family that a model is exported as: the `preferred` architecture, or the first that can express it.

    Raises ValueError that says for the nearest family which keys it cannot express.
    """
    families = FAMILIES if config.has_logits else CLASSIFIERS
    first = [
        family for family in families if preferred and family.architecture.split("For")[0] == preferred.split("For")[0]
    ]
    lacking: list[tuple[int, Family, dict[str, tuple[str, str]]]] = []
    for family in (*first, *families):
        found = differences(config, family)
        if not found:
            return family
        # A config.json that cannot even be read back is far from the model, however many keys are right.
        far = family.moe != (config.moe is not None) or "model" in found
        lacking.append((len(found) + 100 * far, family, found))
    for family in WITHOUT_CLASS:
        if not differences(config, family):
            raise ValueError(
                f"the model cannot be exported: it computes what {family.architecture} does, for which transformers has"
                " no class; use it with trivium generate, chat or eval"
            )
    _, family, found = min(lacking, key=lambda entry: entry[0])
    said = " and ".join(f"{key} = {theirs}, not {ours}" for key, (ours, theirs) in found.items())
    raise ValueError(
        f"the model cannot be exported: {family.architecture}, the Hugging Face architecture that is nearest to it, "
        f"has {said}; train a model with {'that value' if len(found) == 1 else 'those values'} to export it"
    )


def family_of_config(raw: Mapping[str, Any]) -> Family:
    """Returns the family of a config.json by model_type, or by architectures where that is absent; else ValueError."""
    kind, names = raw.get("model_type"), raw.get("architectures")
    named = names[0] if isinstance(names, list) and names else None
    for family in CLASSIFIERS if is_classifier(raw) else (*FAMILIES, *WITHOUT_CLASS):
        if kind in (family.model_type, *family.other_types) or (kind is None and named == family.architecture):
            return family
    known = ", ".join(family.model_type for family in (*FAMILIES, *WITHOUT_CLASS))
    if is_classifier(raw):
        known = f"with the class {named} {', '.join(WITH_CLASSIFIER)}"
    why = f" ({LACKING[kind]})" if isinstance(kind, str) and kind in LACKING else ""
    raise ValueError(f"config.json: model_type = {kind!r} is not supported{why}; supported are {known}")


def differences(config: ModelConfig, family: Family) -> dict[str, tuple[str, str]]:
    """Returns what the family cannot express: by key the model's value and the nearest that the family has, as text.

    The model is written as config.json and read back; whatever comes back otherwise is not expressed.
    """
    if family.moe != (config.moe is not None):
        return {"model.moe": ("a section" if config.moe else "left out", "a section" if family.moe else "left out")}
    back, problems = family.read(family.write(config, context=4096))
    if back is None or problems:
        return {"model": ("the model's own", "; ".join(problems))}
    ours, theirs = computation(config), computation(back)
    found = {}
    for key in {**ours, **theirs}:
        mine, other = ours.get(key, ()), theirs.get(key, ())
        if mine != other and key not in family.converted:
            at = next((i for i, pair in enumerate(zip(mine, other, strict=False)) if pair[0] != pair[1]), 0)
            where = "" if len(set(mine)) <= 1 and len(set(other)) <= 1 else f" in layer {at}"
            said = [repr(side[at]) if side else "absent" for side in (mine, other)]
            found[f"model.{key}{where}"] = (said[0], said[1])
    return found


def computation(config: ModelConfig) -> dict[str, tuple[Any, ...]]:
    """Returns what the model computes, by key of `[model]` the values of all layers, or one value.

    Two configs that spell the same model in different ways give the same; keys of training alone are left out.
    """
    whole = {
        "vocab_size": config.vocab_size,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "tie_embeddings": config.tie_embeddings,
        "scale_embedding": config.scale_embedding,
        "position.max_positions": config.position.max_positions,
        **{f"norm.{key}": value for key, value in config.norm},
        # Modules of multi-token prediction change nothing that the model computes itself.
        **{f"head.{key}": value for key, value in config.head if not key.startswith("mtp_")},
    }
    result: dict[str, tuple[Any, ...]] = {key: (value,) for key, value in whole.items()}
    layers = [dict(_layer(layer)) for layer in config.layers]
    for key in dict.fromkeys(key for layer in layers for key in layer):
        result[key] = tuple(layer.get(key) for layer in layers)
    return result


def _layer(layer: LayerConfig) -> Iterator[tuple[str, Any]]:
    """Yields everything that one block computes with, by key of `[model]`."""
    attention = layer.attention
    for key, value in attention:
        if key in ("latent", "delta", "temperature"):
            yield f"attention.{key}", value and tuple(value)
        elif key != "scale":
            yield f"attention.{key}", value
    yield "attention.scale", round(attention.scale or layer.head_dim**-0.5, 9)
    yield "head_dim", layer.head_dim
    yield from _position(layer)
    yield from ((f"mlp.{key}", value) for key, value in layer.mlp)
    yield from ((f"residual.{key}", value) for key, value in layer.residual)
    yield from _mixture(layer) if layer.moe else [("ffn_hidden_size", layer.ffn_hidden_size)]


def _position(layer: LayerConfig) -> Iterator[tuple[str, Any]]:
    position = layer.position
    yield "position.kind", position.kind
    if position.kind == "rotary":
        yield "position.theta", position.theta
        yield "position.layout", position.layout
        yield "position.fraction", position.fraction
        yield "position.scaling", position.scaling and _scaling(position.scaling)


def _scaling(scaling: RopeScalingConfig) -> tuple[Any, ...]:
    if scaling.kind == "linear":
        return ("linear", scaling.factor)
    numbers = dict(scaling)
    if scaling.kind == "yarn":
        numbers |= {"beta_fast": scaling.beta_fast or 32, "beta_slow": scaling.beta_slow or 1}
    return tuple(numbers.items())


def _mixture(layer: LayerConfig) -> Iterator[tuple[str, Any]]:
    moe = layer.moe
    assert moe is not None
    yield "moe", "a mixture of experts"
    for key in ("num_experts", "top_k", "shared_gate", "router_bias", "weigh", "gating", "renormalize"):
        yield f"moe.{key}", getattr(moe, key)
    yield "moe.routed_scaling", moe.routed_scaling
    yield "moe.ffn_hidden_size", layer.expert_size
    yield "moe.shared_ffn_hidden_size", layer.shared_size
    yield "moe.bias_update_rate", "more than 0" if moe.bias_update_rate else 0.0
    yield "moe.num_groups", moe.num_groups
    if moe.num_groups > 1:
        yield "moe.top_groups", moe.top_groups
        yield "moe.group_score", moe.group_score
