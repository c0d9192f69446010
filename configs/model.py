"""Config of a decoder: its sizes, and a section for each of its parts.

The defaults are LLaMA's: norms before attention and MLP, no biases, rotary positions, SwiGLU, a head of its own. Every
other family is a choice of parts. Where layers differ from each other, `layer_pattern` names the kind of each layer,
and `kinds` says what a kind changes; `ModelConfig.layer` gives everything that one block has to know.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

from pydantic import Field, model_validator

from configs.model_parts import (
    ROUNDING,
    WITHOUT_WINDOW,
    AttentionConfig,
    AttentionPattern,
    HeadConfig,
    LatentConfig,
    LayerKind,
    MLPConfig,
    NormConfig,
    PositionConfig,
    ResidualConfig,
    share_of,
)
from configs.moe import MoEConfig
from configs.remedies import could_be, divisors
from configs.section import Section


@dataclass(frozen=True)
class LayerConfig:
    """Everything that block number `index` of `num_layers` has to know; see the sections for what the parts mean.

    `kind` is the name in `layer_pattern`, and "" where there is none. `moe` is None for a block with a plain MLP.
    """

    index: int
    num_layers: int
    kind: str
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    attention: AttentionConfig
    position: PositionConfig
    mlp: MLPConfig
    norm: NormConfig
    residual: ResidualConfig
    moe: MoEConfig | None

    @property
    def inner_std_factor(self) -> float:
        """The factor on init_std of the values' and the MLP's weights: DeepNorm's beta (Wang et al. 2022), else one."""
        return (2 * self.num_layers) ** -0.5 if self.residual.kind == "deepnorm" else 1.0

    @property
    def output_std_factor(self) -> float:
        """The factor on init_std of weights whose outputs are added to the hidden states (GPT-2)."""
        return 1 / math.sqrt(2 * self.num_layers)

    @property
    def expert_size(self) -> int:
        """The inner size of one routed expert's MLP."""
        return (self.moe and self.moe.ffn_hidden_size) or self.ffn_hidden_size

    @property
    def shared_size(self) -> int:
        """The inner size of the MLP that the shared experts are; 0 without them."""
        if self.moe is None:
            return 0
        return self.moe.shared_ffn_hidden_size or self.moe.num_shared_experts * self.expert_size


class ModelConfig(Section):
    """Config of a decoder: its sizes here, its parts in their sections; the defaults make a LLaMA."""

    vocab_size: int = Field(ge=8)
    """The number of tokens of the tokenizer, and of rows of the embedding."""
    num_layers: int = Field(ge=1)
    """The number of decoder blocks."""
    hidden_size: int = Field(ge=8)
    """The width of the hidden states."""
    ffn_hidden_size: int = Field(ge=8)
    """The inner size of a block's MLP."""
    num_heads: int = Field(ge=1)
    """The number of query heads in attention."""
    num_kv_heads: int = Field(ge=1)
    """The number of key-value heads, a divisor of num_heads; equal to it for multi-head attention."""
    head_dim: int | None = Field(default=None, ge=2)
    """The width of one head, an even number; left out, it is hidden_size / num_heads."""
    tie_embeddings: bool = False
    """Whether the output head and the embedding are one matrix."""
    scale_embedding: bool = False
    """Whether embeddings are multiplied by sqrt(hidden_size) (Gemma)."""
    init_std: float = Field(default=0.02, gt=0)
    """The standard deviation of initial weights; output projections of blocks get it / sqrt(2 * num_layers)."""
    attention: AttentionConfig = AttentionConfig()
    """Attention of query heads to keys and values."""
    position: PositionConfig = PositionConfig()
    """The way in which the model knows positions."""
    mlp: MLPConfig = MLPConfig()
    """The feed-forward part of a block, also of each expert."""
    norm: NormConfig = NormConfig()
    """The norms of hidden states."""
    residual: ResidualConfig = ResidualConfig()
    """The placement of norms and residual connections in a block."""
    head: HeadConfig = HeadConfig()
    """The output head, from hidden states to logits."""
    moe: MoEConfig | None = None
    """The mixture of experts in place of MLPs; left out, the model is dense."""
    layer_pattern: tuple[str, ...] = ()
    """The kinds of the first layers, names of `kinds`, repeated over the others; left out, all are of no kind."""
    kinds: dict[str, LayerKind] = Field(default_factory=dict)
    """What each kind of layer in layer_pattern changes."""

    @model_validator(mode="after")
    def _parts_fit(self) -> "ModelConfig":
        if problem := self._problem():
            raise ValueError(problem)
        return self

    def _problem(self) -> str:
        """Returns a sentence on keys that do not fit together and how to correct them; "" if all fit."""
        return self._heads_problem() or self._kinds_problem() or self._head_problem() or self._parts_problem()

    def _heads_problem(self) -> str:
        heads, width, delta = self.num_heads, self.hidden_size, self.attention.delta
        if delta and delta.num_value_heads % delta.num_key_heads:
            nearest = max(1, round(delta.num_value_heads / delta.num_key_heads)) * delta.num_key_heads
            return (
                f"model.attention.delta.num_value_heads = {delta.num_value_heads} is not a multiple of num_key_heads = "
                f"{delta.num_key_heads}, and every key head serves the same number of value heads; set model.attention."
                f"delta.num_value_heads={nearest}"
            )
        if latent := self.attention.latent:
            return self._latent_problem(latent)
        if heads % self.num_kv_heads:
            kv_heads = could_be("model.num_kv_heads", self.num_kv_heads, divisors(heads), lambda _: True)
            return (
                f"model.num_heads = {heads} is not a multiple of model.num_kv_heads = {self.num_kv_heads}, and every "
                f"key-value head serves the same number of query heads; {kv_heads}"
            )
        if self.head_dim is None and width % heads:
            even = max(2, round(width / heads / 2) * 2)
            return (
                f"model.hidden_size = {width} is not a multiple of model.num_heads = {heads}; set model.head_dim={even}"
                f" or another even number, or set model.hidden_size={even * heads}"
            )
        if self.position.kind == "rotary" and self.dim_per_head % 2:
            odd = self.dim_per_head
            said = f"model.head_dim = {odd}" if self.head_dim else f"model.hidden_size / model.num_heads = {odd}"
            return f"{said} is odd, and rotary embedding turns pairs; set model.head_dim={odd + 1}"
        turned, size = self.dim_per_head * self.position.fraction, self.dim_per_head
        if self.position.kind == "rotary" and (turned < 1 or turned % 2 > ROUNDING):
            return (
                f"model.position.fraction = {self.position.fraction} rotates {turned:g} of {size} elements of a head, "
                f"and rotary embedding turns pairs; set model.position.fraction="
                f"{share_of(max(1, round(turned / 2)) * 2, size)}"
            )
        return ""

    def _latent_problem(self, latent: LatentConfig) -> str:
        if self.num_kv_heads != self.num_heads:
            return (
                f"model.num_kv_heads = {self.num_kv_heads}, and latent attention makes keys and values for every head; "
                f"set model.num_kv_heads={self.num_heads}"
            )
        if self.head_dim is not None:
            return "model.head_dim follows from model.attention.latent; leave model.head_dim out"
        if latent.rope_head_dim % 2:
            return (
                f"model.attention.latent.rope_head_dim = {latent.rope_head_dim} is odd, and rotary embedding turns "
                f"pairs; set model.attention.latent.rope_head_dim={latent.rope_head_dim + 1}"
            )
        attention, position = self.attention, self.position
        absent = attention.qkv_bias, attention.qk_norm != "none", attention.sinks, attention.temperature
        if any(absent) or attention.output_gate:
            return (
                "model.attention.latent has no qkv_bias, qk_norm, sinks, temperature or output_gate; leave those keys "
                "of model.attention out"
            )
        if position.kind != "rotary" or position.fraction != 1:
            return "model.attention.latent rotates its own elements; set model.position.kind=rotary and fraction=1"
        return ""

    def _kinds_problem(self) -> str:
        unknown = [name for name in self.layer_pattern if name not in self.kinds]
        if unknown:
            return (
                f"model.layer_pattern names {unknown[0]!r}, and model.kinds has {list(self.kinds) or 'nothing'}; add "
                f"a section [model.kinds.{unknown[0]}]"
            )
        if unused := [name for name in self.kinds if name not in self.layer_pattern]:
            return f"model.kinds.{unused[0]} is not in model.layer_pattern; name it there or remove it"
        for kind in ("", *self.kinds):
            if kind == "" and self.layer_pattern:
                continue
            key = f"model.kinds.{kind}" if kind else "model.attention"
            pattern, window = self._pattern(kind)
            if pattern not in WITHOUT_WINDOW and window is None:
                return f"{key}.pattern = {pattern!r} needs a length; set {key}.window, for example to 4096"
            position = self.kinds[kind].position if kind else None
            if position not in (None, self.position.kind) and (position, self.position.kind) != ("none", "rotary"):
                none = f"set {key}.position=none, or " if self.position.kind == "rotary" else ""
                return (
                    f"{key}.position = {position!r} and model.position.kind = {self.position.kind!r}, and layers can "
                    f"only do without a rotation that the others have; {none}leave {key}.position out"
                )
        return ""

    def _head_problem(self) -> str:
        head = self.head
        if head.mtp_depth and head.kind != "language_model":
            return (
                f"model.head.mtp_depth = {head.mtp_depth} predicts tokens, which a scalar head does not; leave it out"
            )
        kinds = sorted({kind for kind in self.layer_pattern or [""] if self._pattern(kind)[0] == "prefix"})
        if head.mtp_depth and kinds:
            causal = [
                f"model.kinds.{kind}.pattern=causal" if kind else "model.attention.pattern=causal" for kind in kinds
            ]
            return (
                f"model.head.mtp_depth = {head.mtp_depth} with the attention pattern 'prefix', where the context sees "
                f"tokens ahead that are to be predicted; set model.head.mtp_depth=0, or set {' and '.join(causal)}"
            )
        if head.kind == "language_model":
            if head.outputs != 1:
                return f"model.head.outputs = {head.outputs} is for model.head.kind = 'scalar'; leave it out"
            return ""
        if self.tie_embeddings:
            return "model.head.kind = 'scalar' has no logits to tie; set model.tie_embeddings=false"
        if head.softcap is not None or head.normalized:
            return "model.head.kind = 'scalar' has no logits; leave model.head.softcap and model.head.normalized out"
        return ""

    def _parts_problem(self) -> str:
        position = self.position
        if (position.kind == "learned") != (position.max_positions is not None):
            if position.kind == "learned":
                return "model.position.kind = 'learned' needs a table; set model.position.max_positions, e.g. to 1024"
            return f"model.position.max_positions is for learned positions, not {position.kind}; leave it out"
        if position.scaling and position.kind != "rotary":
            return f"model.position.scaling is for rotary positions, not {position.kind}; leave it out"
        latent = self.attention.latent
        pairs = (latent.rope_head_dim if latent else round(self.dim_per_head * position.fraction)) // 2
        if position.scaling and position.scaling.kind == "dynamic" and pairs == 1:
            return (
                "model.position.scaling.kind = 'dynamic' slows all pairs of rotated elements of a head but the first, "
                "and there is one; set model.position.scaling.kind=linear, or give heads 4 rotated elements or more"
            )
        if position.scaling and position.scaling.kind == "longrope":
            for name in ("short_factor", "long_factor"):
                factors = getattr(position.scaling, name) or ()
                if len(factors) != pairs:
                    return (
                        f"model.position.scaling.{name} has {len(factors)} numbers, and longrope divides each of a "
                        f"head's {pairs} frequencies by its own ({2 * pairs} elements rotate); give it {pairs} numbers"
                    )
        if self.moe:
            for layer in self.moe.dense_layers:
                if layer not in range(self.num_layers):
                    return f"model.moe.dense_layers names layer {layer}, and layers are 0 to {self.num_layers - 1}"
            if not any(self._is_moe(layer) for layer in range(self.num_layers)):
                return (
                    "no layer has a mixture of experts by model.moe.first_layer, every and dense_layers; leave out "
                    "model.moe, or set model.moe.first_layer=0 and dense_layers=[]"
                )
        return ""

    def _pattern(self, kind: str) -> tuple[AttentionPattern, int | None]:
        own = self.kinds[kind] if kind else LayerKind()
        return own.pattern or self.attention.pattern, own.window or self.attention.window

    def _is_moe(self, index: int) -> bool:
        moe = self.moe
        if moe is None or index < moe.first_layer or index in moe.dense_layers:
            return False
        return (index - moe.first_layer) % moe.every == 0

    @cached_property
    def layers(self) -> tuple[LayerConfig, ...]:
        """The configs of all layers, by number."""
        return tuple(self._layer(index) for index in range(self.num_layers))

    @cached_property
    def mtp_layers(self) -> tuple[LayerConfig, ...]:
        """The configs of the blocks of multi-token prediction: the last layer's, with the numbers that follow it."""
        last = self.layers[-1]
        return tuple(replace(last, index=self.num_layers + i) for i in range(self.head.mtp_depth))

    def __copy__(self) -> "ModelConfig":
        copied = super().__copy__()
        for name in ("layers", "mtp_layers"):
            vars(copied).pop(name, None)  # a copy may get other values
        return copied

    def layer(self, index: int) -> LayerConfig:
        """Returns everything that block number `index` has to know."""
        return self.layers[index]

    def _layer(self, index: int) -> LayerConfig:
        kind = self.layer_pattern[index % len(self.layer_pattern)] if self.layer_pattern else ""
        own = self.kinds[kind] if kind else LayerKind()
        attention, position = self._mixing(kind, own)
        return LayerConfig(
            index=index,
            num_layers=self.num_layers,
            kind=kind,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.dim_per_head,
            attention=attention,
            position=position,
            mlp=self.mlp,
            norm=self.norm,
            residual=self.residual,
            moe=self.moe if self._is_moe(index) else None,
        )

    def _mixing(self, kind: str, own: LayerKind) -> tuple[AttentionConfig, PositionConfig]:
        """Returns how a layer of this kind mixes tokens; a gated delta net has no other keys of attention."""
        if self.attention.delta and own.delta:
            return AttentionConfig(delta=self.attention.delta), PositionConfig(kind="none")
        pattern, window = self._pattern(kind)
        attention = {
            "pattern": pattern,
            "window": None if pattern in WITHOUT_WINDOW else window,
            "qk_norm": self.attention.qk_norm if own.qk_norm else "none",
            "temperature": self.attention.temperature if own.temperature else None,
            "delta": None,
        }
        position = {
            "kind": own.position or self.position.kind,
            "theta": own.theta or self.position.theta,
            "scaling": self.position.scaling if own.scaled else None,
        }
        return self.attention.model_copy(update=attention), self.position.model_copy(update=position)

    @property
    def dim_per_head(self) -> int:
        """The width of one head's query and key."""
        if latent := self.attention.latent:
            return latent.nope_head_dim + latent.rope_head_dim
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def has_logits(self) -> bool:
        """Whether the output head gives logits of the vocabulary, and not a few values of each token."""
        return self.head.kind == "language_model"

    @property
    def has_contexts(self) -> bool:
        """True if some layers see a context both ways, the tokens in front of those to predict."""
        return any(layer.attention.pattern == "prefix" for layer in self.layers)

    @property
    def has_deltas(self) -> bool:
        """Whether some layers are gated delta nets."""
        return any(layer.attention.delta for layer in self.layers)

    @property
    def head_size(self) -> int:
        """The number of outputs of the head, which are rows of its weight."""
        return self.vocab_size if self.has_logits else self.head.outputs

    def with_values(self, outputs: int = 1) -> "ModelConfig":
        """Returns the same model with an output head that gives `outputs` values a token in place of logits."""
        head = HeadConfig(kind="scalar", outputs=outputs)
        return self.model_copy(update={"head": head, "tie_embeddings": False})

    def without_mtp(self) -> "ModelConfig":
        """Returns the same model without modules of multi-token prediction."""
        return self.model_copy(update={"head": self.head.model_copy(update={"mtp_depth": 0})})

    @property
    def expert_size(self) -> int:
        """The inner size of one expert's MLP."""
        return (self.moe and self.moe.ffn_hidden_size) or self.ffn_hidden_size

    def num_parameters(self, active: bool = False) -> int:
        """Number of parameters; with `active`, only those that one token uses when the model writes.

        The whole embedding is among them, and modules of multi-token prediction are not.
        """
        from configs.model_size import num_parameters

        return num_parameters(self, active)
