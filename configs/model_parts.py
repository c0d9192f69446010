"""Config sections of the parts that a decoder is made of, all but the mixture of experts."""

import math
from typing import Literal

from pydantic import Field

from configs.section import Section

AttentionPattern = Literal["causal", "prefix", "sliding", "chunked"]
WITHOUT_WINDOW = ("causal", "prefix")  # patterns that have no length
PositionKind = Literal["rotary", "learned", "alibi", "none"]
ROUNDING = 1e-6  # of a number of elements that is a float


class LatentConfig(Section):
    """Multi-head latent attention (DeepSeek-V2, 2024): keys and values are made from one small latent vector a token.

    A head's queries and keys have `nope_head_dim` elements without position and `rope_head_dim` rotated ones, of which
    all heads share the key's.
    """

    q_rank: int | None = Field(default=None, ge=1)
    """The width of the latent vector that queries are made from; left out, they are made from the hidden state."""
    kv_rank: int = Field(ge=1)
    """The width of the latent vector that keys and values are made from."""
    nope_head_dim: int = Field(ge=1)
    """The elements of a head's query and key that no position rotates."""
    rope_head_dim: int = Field(ge=2)
    """The elements of a head's query, and of the key that all heads share, that positions rotate; an even number."""
    v_head_dim: int = Field(ge=1)
    """The elements of a head's value."""
    norm_eps: float = Field(default=1e-6, gt=0)
    """The epsilon of the norms of the latent vectors."""


class DeltaConfig(Section):
    """Gated delta net (Yang et al. 2024, arXiv 2412.06464): each value head reads from and writes to a matrix.

    What a document has in it so far is in that state alone, which is of one size however long the document is.
    """

    num_key_heads: int = Field(ge=1)
    """The number of heads of queries and of keys, a multiple of parallel.tp * parallel.cp."""
    num_value_heads: int = Field(ge=1)
    """The number of heads of values, a multiple of num_key_heads; as many share the queries and keys of one head."""
    key_head_dim: int = Field(ge=1)
    """The elements of a head's query and key."""
    value_head_dim: int = Field(ge=1)
    """The elements of a head's value."""
    kernel_size: int = Field(default=4, ge=2)
    """The number of tokens, itself among them, that the convolution before the state sees of each token's document."""


class TemperatureConfig(Section):
    """Growth of queries with their position, in layers without positions (Llama 4)."""

    scale: float = Field(default=0.1, gt=0)
    """The factor of the logarithm."""
    floor: int = Field(default=8192, ge=1)
    """The number of positions after which the logarithm takes its next value."""


class AttentionConfig(Section):
    """Attention of query heads to keys and values."""

    qkv_bias: bool = False
    """Whether the projections to queries, keys and values add a bias."""
    output_bias: bool = False
    """Whether the output projection adds a bias."""
    qk_norm: Literal["none", "head", "projection", "unweighted"] = "none"
    """The norm of queries and keys: of each head, of all heads at once, or weightless of each rotated head."""
    scale: float | None = Field(default=None, gt=0)
    """The factor on the products of queries and keys; left out, it is 1 / sqrt(head dimension)."""
    scale_by_layer: bool = False
    """Whether that factor is divided by the number of the layer, counted from 1 (GPT-2)."""
    softcap: float | None = Field(default=None, gt=0)
    """The bound c of scores, which become c * tanh(score / c) (Gemma 2); left out, there is none."""
    sinks: bool = False
    """Whether each head has a learned score that takes a share of the softmax and adds nothing (gpt-oss)."""
    pattern: AttentionPattern = "causal"
    """The tokens of its document that a token sees: all earlier ones (causal), also all of the context in front of the
    tokens to predict (prefix, GLM-130B), or the earlier ones in a sliding window or in its chunk."""
    window: int | None = Field(default=None, ge=1)
    """The length of the sliding window, with the token itself, or of a chunk, in tokens."""
    temperature: TemperatureConfig | None = None
    """The growth of queries with their position; left out, there is none."""
    output_gate: bool = False
    """Whether the outputs of heads are multiplied by a learned sigmoid of the token (Qwen3-Next)."""
    latent: LatentConfig | None = None
    """Multi-head latent attention in place of grouped heads; left out, heads are grouped."""
    delta: DeltaConfig | None = None
    """Gated delta nets in place of attention, in all layers whose kind does not say otherwise; left out, none."""


class RopeScalingConfig(Section):
    """Change of the rotary frequencies for contexts longer than those that the model was first trained on.

    The kinds and their numbers are transformers'; numbers of other kinds are refused.
    """

    kind: Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
    """The way in which frequencies change with the factor."""
    factor: float = Field(default=1.0, ge=1)
    """The number of times that the context grows."""
    original_length: int | None = Field(default=None, ge=1)
    """The context that the model was first trained on, in tokens; linear scaling does not need it."""
    low_freq_factor: float | None = Field(default=None, gt=0)
    """llama3: wavelengths above original_length / low_freq_factor are scaled by the whole factor."""
    high_freq_factor: float | None = Field(default=None, gt=0)
    """llama3: wavelengths below original_length / high_freq_factor keep their frequency."""
    beta_fast: float | None = Field(default=None, gt=0)
    """yarn: dimensions with more rotations than this within original_length keep their frequency; 32 if left out."""
    beta_slow: float | None = Field(default=None, gt=0)
    """yarn: dimensions with fewer rotations than this are scaled by the whole factor; 1 if left out."""
    truncate: bool = True
    """yarn: whether the dimensions that beta_fast and beta_slow stand for are rounded to whole ones."""
    mscale: float | None = Field(default=None, ge=0)
    """yarn: the factor of the logarithm by which rotated vectors grow (DeepSeek)."""
    mscale_all_dim: float | None = Field(default=None, ge=0)
    """yarn: the same factor for latent attention: scores grow by its square, and rotated vectors are divided by it."""
    attention_factor: float | None = Field(default=None, gt=0)
    """yarn, longrope: the factor on cosines and sines; left out, it follows from factor."""
    short_factor: tuple[float, ...] | None = None
    """longrope: the divisor of each frequency in documents of up to original_length tokens."""
    long_factor: tuple[float, ...] | None = None
    """longrope: the divisor of each frequency in longer documents."""


def share_of(elements: int, width: int) -> float:
    """Returns the share of `width` that is `elements`, or the next number above it that also truncates to `elements`.

    A position's fraction is truncated in transformers, where 44 times 30 / 44 is 29.999999999999996 and becomes 29.
    """
    share = elements / width
    return share if int(width * share) == elements else math.nextafter(share, 1)


class PositionConfig(Section):
    """The way in which the model knows positions."""

    kind: PositionKind = "rotary"
    """Rotation of queries and keys, a learned vector added to the embedding, ALiBi's slopes on scores, or nothing."""
    theta: float = Field(default=10000.0, gt=0)
    """rotary: the base of the wavelengths; larger for longer contexts."""
    layout: Literal["halves", "pairs"] = "halves"
    """rotary: whether element i turns with element i + d/2 of the d rotated ones, or with its neighbour."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """rotary: the share of a head's elements that are rotated, the first ones."""
    scaling: RopeScalingConfig | None = None
    """rotary: the change of frequencies for longer contexts; left out, there is none."""
    max_positions: int | None = Field(default=None, ge=1)
    """learned: the number of positions that have a vector, an upper bound of train.seq_length."""


class MLPConfig(Section):
    """The feed-forward part of a block, also of each expert."""

    kind: Literal["swiglu", "geglu", "geglu_tanh", "clamped_swiglu", "gelu", "gelu_tanh", "relu"] = "swiglu"
    """The activation: with a gate (the first four), or without; `tanh` is the approximation of GELU."""
    bias: bool = False
    """Whether the projections add a bias."""


class NormConfig(Section):
    """The norms of hidden states."""

    kind: Literal["rms", "rms_plus_one", "layer"] = "rms"
    """RMSNorm, RMSNorm whose weight is added to one (Gemma), or LayerNorm with a bias."""
    eps: float = Field(default=1e-5, gt=0)
    """The epsilon of the norms, added to the mean square or the variance under the root."""
    final: bool = True
    """Whether there is a norm after the last block."""
    embedding: bool = False
    """Whether there is a norm after the embedding (BLOOM)."""


class ResidualConfig(Section):
    """The placement of norms and residual connections in a block."""

    kind: Literal["pre", "post", "sandwich", "outputs", "deepnorm", "parallel"] = "pre"
    """Norms before attention and MLP, after each sum, on both sides, on outputs only, DeepNorm, or both in parallel."""
    from_norm: bool = False
    """Whether the residual connection starts after the norm, and not before it (BLOOM's variant)."""


class HeadConfig(Section):
    """The output head, from hidden states to logits, or to a few values of each token."""

    kind: Literal["language_model", "scalar"] = "language_model"
    """Logits of the vocabulary, or a few values of each token: a reward, a value estimate, or logits of classes."""
    outputs: int = Field(default=1, ge=1)
    """scalar: the number of values of each token."""
    softcap: float | None = Field(default=None, gt=0)
    """The bound c of logits, which become c * tanh(logit / c) (Gemma 2); left out, there is none."""
    normalized: bool = False
    """Whether each row of the head's weight is divided by its length (Baichuan 2)."""
    mtp_depth: int = Field(default=0, ge=0)
    """The number of modules of multi-token prediction (DeepSeek-V3, section 2.2), each of which predicts one token
    further ahead; they train beside the model and are not used after it."""
    mtp_weight: float = Field(default=0.3, gt=0)
    """The factor on the mean of these modules' losses, which is added to the loss."""


class LayerKind(Section):
    """Values that layers of one kind have in place of the model's; a key that is left out keeps the model's value."""

    pattern: AttentionPattern | None = None
    """The attention pattern, in place of attention.pattern."""
    window: int | None = Field(default=None, ge=1)
    """The length of the window or chunk, in place of attention.window."""
    position: PositionKind | None = None
    """rotary or none, in place of position.kind."""
    theta: float | None = Field(default=None, gt=0)
    """The base of the rotary wavelengths, in place of position.theta."""
    scaled: bool = True
    """Whether position.scaling applies."""
    qk_norm: bool = True
    """Whether attention.qk_norm applies."""
    temperature: bool = True
    """Whether attention.temperature applies."""
    delta: bool = True
    """Whether attention.delta applies, so that the layer is a gated delta net and has nothing else of attention."""
