"""Reads the tensors that the ranks of a layout recorded, as whole tensors."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


class RecordedStep:
    """The recorded tensors of one layout's step, whole and by global name; they are read one at a time."""

    def __init__(self, directory: Path):
        facts = directory / "step.json"  # written last
        self.facts: dict[str, Any] = json.loads(facts.read_text())
        self._slices: dict[str, list[tuple[Any, list[int], list[int]]]] = {}  # key: (file, offset, whole shape)
        for path in sorted(directory.glob("rank_*.safetensors")):
            file = safe_open(path, framework="pt").__enter__()
            for key, own in (file.metadata() or {}).items():
                self._slices.setdefault(key, []).append((file, *json.loads(own)))

    @property
    def keys(self) -> set[str]:
        """Names of the tensors to compare; choices of experts are left out."""
        return {key for key in self._slices if not key.startswith("choice/")}

    def copies(self, key: str) -> list[torch.Tensor]:
        """Returns every copy of a tensor that the ranks hold, each put together from its slices."""
        wholes: list[torch.Tensor] = []
        seen = Counter[tuple[int, ...]]()
        for file, offset, shape in self._slices[key]:
            part, copy = file.get_tensor(key).double(), seen[tuple(offset)]
            seen[tuple(offset)] += 1
            if copy == len(wholes):
                wholes.append(torch.full(shape, math.nan, dtype=torch.float64))  # NaN shows a slice that no rank wrote
            wholes[copy][tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))] = part
        return wholes
