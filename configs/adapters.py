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
    "beta_proj",
    "decay_proj",
    "output_gate_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "experts",
]
TARGETS: tuple[str, ...] = get_args(Target)


Kind = Literal["lora", "dora", "adalora", "bottleneck", "prompt", "p_tuning", "prefix", "p_tuning_v2"]
# The keys that say something for each kind; the others must be left out.
_LOW_RANK = ("rank", "alpha", "rank_stabilized", "dropout", "targets")
KEYS: dict[Kind, tuple[str, ...]] = {
    "lora": (*_LOW_RANK, "base"),
    "dora": _LOW_RANK,
    "adalora": (*_LOW_RANK, "target_rank", "warmup_steps", "budget_steps", "prune_every", "orthogonality", "beta"),
    "bottleneck": ("bottleneck_size", "activation", "after"),
    "prompt": ("virtual_tokens",),
    "p_tuning": ("virtual_tokens", "encoder", "encoder_size"),
    "prefix": ("virtual_tokens", "encoder_size"),
    "p_tuning_v2": ("virtual_tokens",),
}


class AdapterConfig(Section):
    """Small trained modules beside the model's own weights, which stay as they are."""

    kind: Kind = "lora"
    """The method, by its name in the table of docs/posttraining.md, under Adapters."""
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
    base: Literal["full", "nf4"] = "full"
    """The form in which adapted weights are kept: in the model's precision, or in 4 bits (QLoRA)."""
    target_rank: int = Field(default=4, ge=1)
    """The mean rank that AdaLoRA leaves at the end, of `rank` at the beginning."""
    warmup_steps: int = Field(default=0, ge=0)
    """The number of steps before AdaLoRA begins to lower the mean rank."""
    budget_steps: int = Field(default=0, ge=0)
    """The step at which AdaLoRA has lowered it to target_rank; steps after that train what is left."""
    prune_every: int = Field(default=10, ge=1)
    """The number of steps from one choice of AdaLoRA's most important triplets to the next."""
    orthogonality: float = Field(default=0.1, ge=0)
    """The factor on AdaLoRA's penalty for singular vectors that are not orthonormal."""
    beta: float = Field(default=0.85, ge=0, lt=1)
    """The share of the earlier steps in AdaLoRA's smoothed sensitivity and uncertainty."""
    bottleneck_size: int = Field(default=64, ge=1)
    """The inner size of a bottleneck adapter."""
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    """The activation within a bottleneck adapter."""
    after: tuple[Literal["attention", "mlp"], ...] = ("attention", "mlp")
    """The parts of a block that bottleneck adapters follow: both (Houlsby), or the MLP alone (Pfeiffer)."""
    virtual_tokens: int = Field(default=20, ge=1)
    """The number of virtual tokens before every document, whose vectors, or keys and values, are trained."""
    encoder: Literal["mlp", "lstm"] = "lstm"
    """The network that makes the vectors of virtual tokens in P-tuning."""
    encoder_size: int = Field(default=128, ge=1)
    """The inner size of that network, and of the MLP of prefix tuning."""

    @model_validator(mode="after")
    def _keys_of_the_kind(self) -> "AdapterConfig":
        """Refuses keys that have no meaning for the adapter's kind, unless they have their default values."""
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
    def _each_position_once(cls, after: tuple[str, ...]) -> tuple[str, ...]:
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

    @model_validator(mode="after")
    def _budget_falls(self) -> "AdapterConfig":
        if self.kind != "adalora":
            return self
        if self.budget_steps <= self.warmup_steps:
            raise ValueError(
                f"adapter.budget_steps = {self.budget_steps} is not after adapter.warmup_steps = {self.warmup_steps}, "
                f"and there is no step to lower ranks in; set adapter.budget_steps={self.warmup_steps + 1} or more"
            )
        if self.target_rank > self.rank:
            raise ValueError(
                f"adapter.target_rank = {self.target_rank} is more than adapter.rank = {self.rank}, with which AdaLoRA "
                f"begins; set adapter.target_rank={self.rank} or less, or adapter.rank={self.target_rank} or more"
            )
        return self

    def check_steps(self, steps: int) -> None:
        """Raises ValueError if the run ends before AdaLoRA's budget has brought the ranks down to `target_rank`."""
        if self.kind == "adalora" and self.budget_steps > steps:
            warmup = f" and adapter.warmup_steps={steps - 1}" if self.warmup_steps >= steps else ""
            raise ValueError(
                f"adapter.budget_steps = {self.budget_steps} is after the run's last step {steps}, and ranks would not "
                f"fall to adapter.target_rank; set adapter.budget_steps={steps}{warmup} or less"
            )

    @property
    def merges(self) -> bool:
        """Whether a trained adapter can be merged into the weights, which leaves a model without adapters."""
        return self.kind in ("lora", "dora", "adalora")

    @property
    def prepends(self) -> bool:
        """Tells whether virtual tokens pass through the layers like others, in front of them."""
        return self.kind in ("prompt", "p_tuning")

    @property
    def num_virtual_tokens(self) -> int:
        """The number of virtual tokens, 0 for methods that have none."""
        return self.virtual_tokens if "virtual_tokens" in KEYS[self.kind] else 0

    def check_layout(self, cp: int, sp: bool) -> None:
        """Raises ValueError if context or sequence parallel would split sequences that begin with virtual tokens."""
        if self.num_virtual_tokens and cp > 1:
            raise ValueError(
                f"parallel.cp = {cp} splits sequences, which the virtual tokens of adapter.kind = "
                f"{self.kind!r} do not support; set parallel.cp=1"
            )
        if self.prepends and sp:
            raise ValueError(
                f"parallel.sp = true splits sequences, which the virtual tokens of adapter.kind = {self.kind!r} do not "
                "support; set parallel.sp=false"
            )

    def check_model(self, model: ModelConfig, seq_length: int) -> None:
        """Raises ConfigError if the model cannot take this method's virtual tokens in front of rows of this length."""
        if not (count := self.num_virtual_tokens):
            return
        if model.has_contexts or model.head.mtp_depth:
            modules = model.head.mtp_depth > 0
            what = "modules of multi-token prediction" if modules else "contexts (the attention pattern 'prefix')"
            raise ConfigError(
                f"adapter.kind = {self.kind!r} puts virtual tokens before each document, and the model has {what}, "
                f"which do not go with them; set {'model.head.mtp_depth=0 or ' * modules}adapter.kind=lora"
            )
        if model.has_deltas:
            raise ConfigError(
                f"adapter.kind = {self.kind!r} puts virtual tokens before each document, which layers that are gated "
                "delta nets (model.attention.delta) do not support; set adapter.kind=lora"
            )
        if self.prepends and any(layer.moe for layer in model.layers):
            raise ConfigError(
                f"adapter.kind = {self.kind!r} is for dense models: virtual tokens would take part in the balance of "
                "experts; set adapter.kind="
                + ("lora" if model.attention.latent else "prefix, whose virtual tokens are keys and values alone")
            )
        if not self.prepends and model.attention.latent:
            prompt = "" if any(layer.moe for layer in model.layers) else "prompt or "
            raise ConfigError(
                f"adapter.kind = {self.kind!r} has keys and values of its own, and the model makes both from latent "
                f"vectors (model.attention.latent); set adapter.kind={prompt}lora"
            )
        most = model.position.max_positions
        if most and seq_length + count > most:
            fewer = f"adapter.virtual_tokens={most - seq_length}" if seq_length < most else ""
            raise ConfigError(
                f"adapter.virtual_tokens = {count} and train.seq_length = {seq_length} exceed model.position."
                f"max_positions = {most}; set {fewer or f'train.seq_length={max(2, most - count)}'} or lower"
            )

    def check_init(self, is_trained: bool) -> None:
        """Raises ConfigError if the base is to be kept in 4 bits, but the run starts from random weights."""
        if self.base != "full" and not is_trained:
            raise ConfigError(
                f"adapter.base = {self.base!r} keeps the weights of a trained model in 4 bits, and this run begins "
                "with random ones; name a model in [init], or set adapter.base=full"
            )

    def longest_row(self, model: ModelConfig, context: int) -> int:
        """Returns the longest sequence, in tokens, that fits behind virtual tokens into a context of this length."""
        most = model.position.max_positions
        return min(context, most - self.num_virtual_tokens) if most else context

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
                f"choose among its linear layers, {', '.join(known)}"
            )
        chosen = self.targets or known
        if "experts" in chosen and (self.kind != "lora" or self.dropout or self.base != "full"):
            rest = [name for name in chosen if name != "experts"]
            key = f"adapter.base = {self.base!r}" if self.base != "full" else f"adapter.dropout = {self.dropout}"
            key = f"adapter.kind = {self.kind!r}" if self.kind != "lora" else key
            mend = "set adapter.kind=lora, adapter.base=full and adapter.dropout=0"
            remedy = f"set adapter.targets={rest}" if rest else mend
            raise ConfigError(
                f"{key} does not serve experts, which adapter.targets {'names' if self.targets else 'left out means'}; "
                f"{remedy}"
            )
        return chosen


def linear_layers(model: ModelConfig) -> tuple[str, ...]:
    """Returns the names of the linear layers in a model's blocks, in the order of TARGETS."""
    found: set[str] = set()
    for layer in model.layers:
        latent, delta = layer.attention.latent, layer.attention.delta
        if delta or layer.attention.output_gate:
            found.add("output_gate_proj")
        if delta:
            found |= {"q_proj", "k_proj", "v_proj", "beta_proj", "decay_proj"}
        elif latent is None:
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
