"""Published models by name: each file in `configs/pretrain/models` is the `[model]` section of one, with its sources.

A config takes one by `model = "qwen3-8b"`, or by `preset = "qwen3-8b"` in `[model]`, whose other keys change it.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Any

from pydantic import Field

from configs.model import ModelConfig
from configs.section import Section

FOLDER = Path(__file__).parent / "pretrain" / "models"


class Preset(Section):
    """A published model, as its file describes it."""

    family: str = Field(min_length=1)
    """The family of models that it belongs to."""
    model: ModelConfig
    """The decoder: its sizes and parts."""


def names() -> list[str]:
    """Returns the names of all presets, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def with_preset_key(tree: dict[str, Any]) -> None:
    """Turns a name in place of `[model]` into the section that names it, so that overrides can change its keys."""
    if isinstance(tree.get("model"), str):
        tree["model"] = {"preset": tree["model"]}


def filled_in(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns a config whose `[model]` has the keys of the preset that it names, and its own in their place.

    Raises ValueError if there is no such preset.
    """
    model = tree.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return tree
    own = {key: value for key, value in model.items() if key != "preset"}
    published = _section(model["preset"])
    if "layer_pattern" in own:  # kinds that it no longer names would be a mistake
        kept = {kind: keys for kind, keys in published.get("kinds", {}).items() if kind in own["layer_pattern"]}
        published = {**published, "kinds": kept}
    return {**tree, "model": merged(published, own)}


def _section(name: Any) -> dict[str, Any]:
    known = names()
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"model = {name!r} is no published model; {hint}`trivium config --models` lists them")
    section: dict[str, Any] = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))["model"]
    return section


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merges two nested dicts; where both have a value, that of `above` is taken."""
    both = {
        key: merged(below[key], value)
        for key, value in above.items()
        if isinstance(value, dict) and isinstance(below.get(key), dict)
    }
    return below | above | both
