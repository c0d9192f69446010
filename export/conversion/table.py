"""A family: rules for its tensors and keys for its config.json, in one table that is read both ways."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from configs.loader import ConfigError, validate
from configs.model import ModelConfig
from export.conversion.config_keys import ConfigKey, Draft, Watched
from export.conversion.operations import Copy, Operation

COPY = Copy()


@dataclass(frozen=True)
class Rule:
    """Names of Trivium's tensors (`ours`) and of the file's (`theirs`), and the operation between them.

    Names may have `{layer}`, and theirs `{expert}` where experts are single. A rule serves every layer that has all
    tensors of `ours`, and the tensor `beside` if one is named, so one table is enough for layers and models of
    different parts; of several rules the first is taken. With `keep_fp32` the tensor is written in fp32 whatever dtype
    the rest has.
    """

    ours: str | tuple[str, ...]
    theirs: str | tuple[str, ...]
    operation: Operation = COPY
    keep_fp32: bool = False
    beside: str = ""

    @property
    def our_names(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @property
    def their_names(self) -> tuple[str, ...]:
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs


@dataclass(frozen=True)
class Family:
    """An architecture of transformers, as a table.

    `fixed` holds keys of `[model]` that every model of the family has. `ignored` and `kept` are regular expressions of
    names in files: ignored tensors follow from others, and kept ones are no part of what Trivium computes, but an
    import keeps them so that an export gives them back. `prefix` is a beginning of names that files may leave out.
    `converted` are keys of `[model]` that the operations of the rules bring into the family's own form. `positions` is
    the key of the longest row, with what transformers takes where it is absent; "" if there is none. `kept_keys` are
    keys of config.json that an import keeps, too: they say what the kept tensors are, or are of training alone. With
    `further_layers` a file may have modules of multi-token prediction: it is what names of their blocks begin with,
    in place of what those of other layers do.
    """

    architecture: str
    model_type: str
    rules: tuple[Rule, ...]
    keys: tuple[ConfigKey, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    kept_keys: tuple[str, ...] = ()
    further_layers: str = ""
    prefix: str = "model."
    converted: tuple[str, ...] = ()
    positions: tuple[str, int] = ("max_position_embeddings", 2048)
    other_types: tuple[str, ...] = ()
    moe: bool = False

    def write(self, config: ModelConfig, context: int) -> dict[str, Any]:
        """Returns the keys of config.json that describe the model, as near as the family comes to it."""
        key, _ = self.positions
        result: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        result |= {key: longest_row(config, context)} if key else {}
        for entry in self.keys:
            result |= entry.write(config)
        return result

    def read(self, raw: Mapping[str, Any]) -> tuple[ModelConfig | None, list[str]]:
        """Returns the model that config.json describes, None if that is unclear, and everything that is wrong."""
        watched = Watched(raw)
        draft = Draft(watched, self.architecture)
        if raw.get("quantization_config") is not None:
            draft.problems.append(
                f"config.json: quantization_config = {raw['quantization_config']!r} is not supported; import the "
                "weights in full precision, without that key"
            )
        for key, value in self.fixed.items():
            draft.put(key, value)
        key = self.positions[0]
        if key and raw.get(key) is not None and not (isinstance(raw[key], int) and raw[key] > 0):
            draft.refuse(key, raw[key], "a whole number from 1 on")
            draft.incomplete = True
        for entry in self.keys:
            try:
                entry.read(draft)
            except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError):
                draft.refuse(watched.last, raw.get(watched.last), "a value as transformers writes it")
                draft.incomplete = True
        if draft.incomplete:
            return None, draft.problems
        try:
            return validate(ModelConfig, draft.fields, origin="config.json"), draft.problems
        except ConfigError as error:
            return None, [*draft.problems, str(error)]

    def longest_row(self, raw: Mapping[str, Any]) -> int:
        """Returns the number of tokens of the longest row that config.json states, or what transformers takes."""
        key, absent = self.positions
        return int(raw.get(key) or absent)


def longest_row(config: ModelConfig, context: int) -> int:
    """Returns the longest row to state in config.json for a model that was trained on rows of `context` tokens.

    Learned positions have a vector for each, and a dynamic scaling starts from its original length. That of longrope is
    what it was made for: several readers compute from it how attention is scaled.
    """
    scaling = config.position.scaling
    if config.position.max_positions:
        return config.position.max_positions
    if scaling and scaling.kind == "dynamic" and scaling.original_length:
        return scaling.original_length
    if scaling and scaling.kind == "longrope" and scaling.original_length and scaling.attention_factor is None:
        return round(scaling.factor * scaling.original_length)
    return context
