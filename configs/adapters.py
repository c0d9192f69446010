"""Config of parameter-efficient tuning: small trained parts beside frozen weights, in any training config."""

from typing import Literal, get_args

from pydantic import Field, field_validator, model_validator

from configs.loader import ConfigError
from configs.model import ModelConfig
from configs.model_size import is_gated
from configs.section import Section

Target = Literal[
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "q_down_proj",
    "q_up_proj",
    "kv_down_proj",
    "kv_up_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "experts",
]
TARGETS: tuple[str, ...] = get_args(Target)


Kind = Literal["lora", "dora", "bottleneck"]
# The keys that say something for each kind; the others must be left out.
_LOW_RANK = ("rank", "alpha", "rank_stabilized", "dropout", "targets")
KEYS: dict[Kind, tuple[str, ...]] = {
    "lora": _LOW_RANK,
    "dora": _LOW_RANK,
    "bottleneck": ("bottleneck_size", "activation", "after"),
}


class AdapterConfig(Section):
    """Small trained modules beside the model's own weights, which stay as they are."""

    kind: Kind = "lora"
    """The form of the adapter: LoRA; DoRA, which also trains the length of each row of a weight; bottleneck."""
    rank: int = Field(default=8, ge=1)
    """The rank of the product that is added to each weight."""
    alpha: float = Field(default=16.0, gt=0)
    """The factor on that product, divided by rank, or by its square root if rank_stabilized."""
    rank_stabilized: bool = False
    """Whether alpha is divided by the square root of rank in place of rank (rsLoRA), which suits high ranks."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """The dropout rate of the inputs of LoRA's product; the masks are the same in every layout."""
    targets: tuple[Target, ...] = ()
    """The linear layers that get an adapter, in every block; left out, all, with those of experts."""
    bottleneck_size: int = Field(default=64, ge=1)
    """The inner size of a bottleneck adapter."""
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    """The activation within a bottleneck adapter."""
    after: tuple[Literal["attention", "mlp"], ...] = ("attention", "mlp")
    """The parts of a block that bottleneck adapters follow: both (Houlsby), or the MLP alone (Pfeiffer)."""

    @model_validator(mode="after")
    def _keys_of_the_kind(self) -> "AdapterConfig":
        """Refuses keys that have no meaning for the kind; one with its default is as if it were left out."""
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if value != field.default and name not in ("kind", *KEYS[self.kind]):
                raise ValueError(
                    f"adapter.{name} = {value!r} has no meaning for adapter.kind = {self.kind!r}, whose keys are "
                    f"{', '.join(KEYS[self.kind])}; leave adapter.{name} out"
                )
        return self

    @field_validator("targets")
    @classmethod
    def _each_once(cls, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        if len(set(targets)) < len(targets):
            raise ValueError(f"{list(targets)} names a layer twice; name each once")
        return targets

    @field_validator("after")
    @classmethod
    def _some_place(cls, after: tuple[str, ...]) -> tuple[str, ...]:
        if not after or len(set(after)) < len(after):
            raise ValueError(f"{list(after)} must name attention, mlp, or each of them once")
        return after

    @model_validator(mode="after")
    def _dora_without_dropout(self) -> "AdapterConfig":
        if self.kind == "dora" and self.dropout:
            raise ValueError(
                f"adapter.dropout = {self.dropout} is for adapter.kind = 'lora': DoRA scales the whole output, which "
                "dropout would change too; set adapter.dropout=0"
            )
        return self

    @property
    def merges(self) -> bool:
        """Whether a trained adapter can be merged into the weights, after which the model is one without adapters."""
        return self.kind in ("lora", "dora")

    @property
    def scale(self) -> float:
        """The factor on the product of the two matrices (Hu et al. 2021; Kalajdzievski 2023)."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    def targets_in(self, model: ModelConfig) -> tuple[str, ...]:
        """Returns the names of the layers that get an adapter.

        Raises ConfigError if the model has no such layers, or if this kind of adapter cannot serve them.
        """
        known = linear_layers(model)
        if unknown := [name for name in self.targets if name not in known]:
            raise ConfigError(
                f"adapter.targets = {list(self.targets)} names {', '.join(unknown)}, which no block of the model has; "
                f"its linear layers are {', '.join(known)}"
            )
        chosen = self.targets or known
        if "experts" in chosen and (self.kind == "dora" or self.dropout):
            rest = [name for name in chosen if name != "experts"]
            key = "adapter.kind = 'dora'" if self.kind == "dora" else f"adapter.dropout = {self.dropout}"
            raise ConfigError(
                f"{key} does not serve experts, which adapter.targets {'names' if self.targets else 'left out means'}; "
                f"set adapter.targets={rest}"
            )
        return chosen


def linear_layers(model: ModelConfig) -> tuple[str, ...]:
    """Returns the names of the linear layers in a model's blocks, in the order of TARGETS."""
    found: set[str] = set()
    for layer in model.layers:
        latent = layer.attention.latent
        if latent is None:
            found |= {"q_proj", "k_proj", "v_proj"}
        else:
            found |= {"q_proj"} if latent.q_rank is None else {"q_down_proj", "q_up_proj"}
            found |= {"kv_down_proj", "kv_up_proj"}
        found.add("o_proj")
        if layer.moe:
            found.add("experts")
        if not layer.moe or layer.shared_size:
            found |= {"up_proj", "down_proj"} | ({"gate_proj"} if is_gated(layer.mlp.kind) else set())
    return tuple(name for name in TARGETS if name in found)
