"""Names of layouts, such as `tp2sp_pp2`, and what they stand for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from configs.loader import ConfigError

DEGREES = ("tp", "pp", "vpp", "dp", "ep", "cp", "zero")


@dataclass(frozen=True)
class Candidate:
    """A layout to compare: its name, e.g. `tp2sp_pp2`, its number of ranks, and its keys of `parallel`."""

    name: str
    world_size: int
    parallel: dict[str, Any]

    @classmethod
    def parse(cls, name: str) -> "Candidate":
        """Parses a name that is made of degrees. Raises ConfigError for any other name."""
        parts = re.findall(r"sp|[a-z]+\d+", name)
        degrees = {p.rstrip("0123456789"): int(p.lstrip("abcdefghijklmnopqrstuvwxyz")) for p in parts if p != "sp"}
        if "".join(parts) != re.sub("[_x]", "", name) or not parts or set(degrees) - set(DEGREES):
            raise ConfigError(
                f"--layouts: {name!r} is not a layout; write degrees one after another, e.g. tp2, tp2sp, tp2pp2dp2 "
                f"(of {', '.join(DEGREES)}, and sp)"
            )
        cp = degrees.get("cp", 1)
        dp = degrees.pop("dp", max(2 if "zero" in degrees else 1, -(-degrees.get("ep", 1) // cp)))
        world = degrees.get("tp", 1) * degrees.get("pp", 1) * cp * dp
        return cls(name, world, {**degrees, "sp": True} if "sp" in parts else dict(degrees))

    def with_layers(self, per_stage: Sequence[int] | None) -> "Candidate":
        """Returns the layout with `per_stage` layers in its pipeline's stages, or unchanged if it has not as many."""
        stages = self.parallel.get("pp", 1) * self.parallel.get("vpp", 1)
        if per_stage is None or stages == 1 or len(per_stage) != stages:
            return self
        return replace(self, parallel={**self.parallel, "layers_per_stage": list(per_stage)})

    @classmethod
    def named(cls, degrees: dict[str, int], sp: bool) -> "Candidate":
        """Returns the layout of these degrees, `dp` among them, with a name that leaves out degrees of 1."""
        shown = {key: degrees[key] for key in DEGREES if degrees.get(key, 1) > 1 or key == "dp"}
        words = (f"{key}{value}{'sp' if sp and key == 'tp' else ''}" for key, value in shown.items())
        return cls.parse("_".join(words))
