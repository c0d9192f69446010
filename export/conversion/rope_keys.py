"""Rotary positions in config.json: `rope_theta`, `rope_scaling`, `rope_parameters` and the share that is rotated.

transformers 5 keeps everything in `rope_parameters`; version 4, vLLM and llama.cpp read `rope_theta` and
`rope_scaling`. All are written, and all are read.
"""

from dataclasses import dataclass
from typing import Any

from configs.model import ModelConfig
from configs.model_parts import RopeScalingConfig
from export.conversion.config_keys import Draft

_NAMES = {"original_max_position_embeddings": "original_length"}
_ORIGINAL = "original_max_position_embeddings"
# The numbers of each kind of scaling, by transformers' names; the kinds' names are the same in Trivium.
SCALINGS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *("factor", _ORIGINAL, "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": ("factor", _ORIGINAL, "attention_factor", "short_factor", "long_factor"),
}


@dataclass(frozen=True)
class Rope:
    """The keys of rotary positions.

    `theta` and `fraction` are what transformers takes where they are absent. A family that rotates `whole` heads only
    reads no other fraction, and writes none.
    """

    theta: float = 10000.0
    fraction: float = 1.0
    whole: bool = True
    positions: int = 2048

    def read(self, draft: Draft) -> None:
        raw = draft.raw
        section = next((name for name in ("rope_scaling", "rope_parameters") if raw.get(name)), "rope_parameters")
        rope = raw.get(section) or {}
        other = raw.get("rope_parameters") or {}
        if not isinstance(rope, dict) or not isinstance(other, dict):
            return draft.refuse(section, rope if not isinstance(rope, dict) else other, "a section or null")
        if rope_type(rope) != rope_type(other) and section == "rope_scaling" and other:
            draft.problems.append(
                f"config.json: rope_scaling is of type {rope_type(rope)!r} and rope_parameters of {rope_type(other)!r};"
                " remove the one that is wrong"
            )
        theta = rope.get("rope_theta") or other.get("rope_theta") or raw.get("rope_theta") or self.theta
        if not isinstance(theta, (int, float)):
            return draft.refuse("rope_theta", theta, "a number")
        draft.put("position.theta", float(theta))
        fraction = next(
            (keys["partial_rotary_factor"] for keys in (rope, raw) if keys.get("partial_rotary_factor") is not None),
            self.fraction,
        )
        if self.whole and fraction != 1:
            draft.refuse("partial_rotary_factor", fraction, "1.0")
        elif fraction != 1:
            draft.put("position.fraction", float(fraction))
        read_scaling(draft, section, rope, "position.scaling", self.positions)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        position = config.position
        scaling = written_scaling(position.scaling)
        result: dict[str, Any] = {
            "rope_theta": position.theta,
            "rope_scaling": dict(scaling) if position.scaling else None,
            "rope_parameters": {**scaling, "rope_theta": position.theta},
        }
        if not self.whole:
            result["partial_rotary_factor"] = position.fraction
            result["rope_parameters"]["partial_rotary_factor"] = position.fraction
        return result


def rope_type(rope: dict[str, Any]) -> str:
    """Returns the type that a section of config.json names, "default" where it names none."""
    found = rope.get("rope_type") or rope.get("type") or "default"
    return {"su": "longrope"}.get(found, found)


def read_scaling(draft: Draft, section: str, rope: dict[str, Any], ours: str, positions: int) -> None:
    """Puts the scaling that a section of config.json describes into `ours`; refuses types that Trivium lacks."""
    kind = rope_type(rope)
    if kind == "default":
        return
    if kind not in SCALINGS:
        return draft.refuse(f"{section}.rope_type", kind, " or ".join(map(repr, ("default", *SCALINGS))))
    longest = draft.value("max_position_embeddings", positions)
    numbers = {name: rope[name] for name in SCALINGS[kind] if rope.get(name) is not None}
    if kind == "dynamic":
        # transformers scales rows that are longer than what config.json calls the maximum.
        numbers[_ORIGINAL] = longest
    if _ORIGINAL in SCALINGS[kind]:
        numbers[_ORIGINAL] = draft.raw.get(_ORIGINAL) or numbers.get(_ORIGINAL) or longest
    if "factor" not in numbers and kind in ("yarn", "longrope"):
        numbers["factor"] = max(1.0, longest / numbers[_ORIGINAL])
    lacking = [name for name in _needed(kind) if name not in numbers]
    for name in lacking:
        draft.lack(f"{section}.{name}", f"rope_type {kind!r} needs it")
    if not lacking:
        draft.put(ours, {"kind": kind, **{_NAMES.get(name, name): value for name, value in numbers.items()}})


def written_scaling(scaling: RopeScalingConfig | None) -> dict[str, Any]:
    """Returns the type and the numbers of a scaling as config.json has them."""
    if scaling is None:
        return {"rope_type": "default"}
    numbers = {name: getattr(scaling, _NAMES.get(name, name)) for name in SCALINGS[scaling.kind]}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in numbers.items()}
    return {"rope_type": scaling.kind, **{name: value for name, value in plain.items() if value is not None}}


def _needed(kind: str) -> tuple[str, ...]:
    optional = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
    return tuple(name for name in SCALINGS[kind] if name not in optional)
