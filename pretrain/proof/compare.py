"""Compares the tensors that a layout computed with those of one rank, each with the bound that rounding sets."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from configs.train import PretrainConfig
from pretrain.proof.bounds import UNIT_ROUNDOFF, Bounds, adam_step_bound
from pretrain.proof.verdict import RelativeError, Verdict


class RecordedStep:
    """The recorded tensors of one layout's step, whole and by global name; they are read one at a time."""

    def __init__(self, directory: Path):
        self.facts: dict[str, Any] = json.loads((directory / "step.json").read_text())
        self._slices: dict[str, list[tuple[Any, list[int], list[int]]]] = {}  # key: (file, offset, whole shape)
        for path in sorted(directory.glob("rank_*.safetensors")):
            file = safe_open(path, framework="pt").__enter__()
            for key, own in (file.metadata() or {}).items():
                self._slices.setdefault(key, []).append((file, *json.loads(own)))

    @property
    def keys(self) -> set[str]:
        return set(self._slices)

    def copies(self, key: str) -> list[torch.Tensor]:
        """Returns the whole tensor, once for each tensor-parallel rank that holds the same slices of it."""
        wholes: list[torch.Tensor] = []
        seen = Counter[tuple[int, ...]]()
        for file, offset, shape in self._slices[key]:
            part, copy = file.get_tensor(key).double(), seen[tuple(offset)]
            seen[tuple(offset)] += 1
            if copy == len(wholes):
                wholes.append(torch.full(shape, math.nan, dtype=torch.float64))  # NaN shows a slice that no rank wrote
            wholes[copy][tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))] = part
        return wholes


def compare(one: Path, other: Path, name: str, ranks: int, config: PretrainConfig, seconds: float) -> Verdict:
    """Compares the step that the layout `name` recorded in folder `other` with the reference in folder `one`."""
    reference, found = RecordedStep(one), RecordedStep(other)
    bounds = Bounds.of(config, reference.facts["precision"])
    verdict = Verdict(name, ranks, seconds)
    for number, allowed in (("loss", bounds.loss()), ("grad_norm", bounds.gradient(0))):
        verdict.add(number, RelativeError(number, abs(found.facts[number] / reference.facts[number] - 1), allowed))
    missing = _without_copies(reference.keys) ^ _without_copies(found.keys)
    if missing:
        verdict.fail(f"only one of the two has {sorted(missing)[:3]}")
    errors = []
    for key in in_order(reference.keys & found.keys, config.model.num_layers):
        (expected,) = reference.copies(key)
        scale = float(expected.norm()) or 1.0
        error = max(float((copy - expected).norm()) for copy in found.copies(key)) / scale
        errors.append(RelativeError(key, error, _allowed(key, expected, reference, bounds, config)))
    verdict.add_tensors(errors)
    return verdict


def _without_copies(keys: set[str]) -> set[str]:
    """Leaves out the tied output head: only a last pipeline stage has this copy of the embedding."""
    return {key for key in keys if not key.endswith("/lm_head.weight")}


def _allowed(
    key: str, expected: torch.Tensor, reference: RecordedStep, bounds: Bounds, config: PretrainConfig
) -> float:
    """Returns the relative error of tensor `key` that rounding explains."""
    kind, _, name = key.partition("/")
    layer = _layer(name, config.model.num_layers)
    if kind == "forward":
        return bounds.forward(layer)
    if kind == "backward":
        return bounds.backward(layer)
    error = bounds.gradient(max(layer, 0))
    if kind == "grad":
        return error
    (gradient,) = reference.copies(f"grad/{name}")
    clip = config.optimizer.clip_grad
    clipped = gradient * min(1.0, clip / reference.facts["grad_norm"]) if clip else gradient
    step = adam_step_bound(clipped, error, config.optimizer, config.optimizer.lr)
    master = min(UNIT_ROUNDOFF["fp32"], UNIT_ROUNDOFF[bounds.precision])  # master weights are fp32 under bf16
    return 2 * master + float(step.norm() / expected.norm())


def _layer(name: str, num_layers: int) -> int:
    """Returns the layer that a tensor belongs to: -1 for the embedding, the last layer for what follows the layers."""
    if name.startswith("layers."):
        return int(re.split(r"[./]", name)[1])
    return -1 if name.startswith("embedding") else num_layers - 1


def in_order(keys: set[str], num_layers: int) -> Iterator[str]:
    """Sorts tensors as a step computes them: forward, backward, gradients in backward order, then weights."""

    def order(key: str) -> tuple[int, float, int, str]:
        kind, _, name = key.partition("/")
        layer: float = _layer(name, num_layers) + (0.5 if not name.startswith(("layers.", "embedding")) else 0.0)
        inside = 0 if ".attention" in name else 1 if ".mlp" in name or ".moe" in name else 2
        passes = ("forward", "backward", "grad", "weight").index(kind)
        return (passes, layer, inside, name) if kind in ("forward", "weight") else (passes, -layer, -inside, name)

    return iter(sorted(keys, key=order))
