"""Baichuan 1 and 2, for which transformers has no class: LLaMA with queries, keys and values in one projection.

The models of 7B have rotary positions and state `max_position_embeddings`; those of 13B have ALiBi and state only
`model_max_length`. Baichuan 2 divides each row of its head by its length, and states a `z_loss_weight`.
"""

from collections.abc import Mapping
from typing import Any

from configs.model import ModelConfig
from export.conversion.config_keys import Custom, Draft, Fixed, MappedKey
from export.conversion.families.llama import ENDS, FFN, MLP, NORMS, OLD_ROTARY, OURS, THEIRS, named
from export.conversion.operations import Join, Rotary, chain
from export.conversion.table import Family, Rule

BAICHUAN2_TOKENS = 125696  # the vocabulary of Baichuan 2


def _read_positions(draft: Draft) -> None:
    rotary = "max_position_embeddings" in draft.raw or "BaiChuanForCausalLM" in (draft.raw.get("architectures") or ())
    draft.put("position.kind", "rotary" if rotary else "alibi")


def _read_head(draft: Draft) -> None:
    draft.put("head.normalized", "z_loss_weight" in draft.raw or draft.raw.get("vocab_size") == BAICHUAN2_TOKENS)


def _write(config: ModelConfig) -> dict[str, Any]:
    rotary = {"max_position_embeddings": 4096} if config.position.kind == "rotary" else {}
    return rotary | ({"z_loss_weight": 0.0} if config.head.normalized else {})


class _Baichuan(Family):
    def longest_row(self, raw: Mapping[str, Any]) -> int:
        return int(raw.get("model_max_length") or raw.get("max_position_embeddings") or 4096)


BAICHUAN = _Baichuan(
    architecture="BaichuanForCausalLM",
    model_type="baichuan",
    rules=(
        *ENDS,
        *NORMS,
        Rule(
            tuple(f"{OURS}attention.{name}_proj.weight" for name in "qkv"),
            f"{THEIRS}self_attn.W_pack.weight",
            chain(Rotary("halves", first=2), Join()),
        ),
        *named("attention.o_proj", "self_attn.o_proj"),
        *MLP,
    ),
    keys=(
        MappedKey("vocab_size", "vocab_size"),
        MappedKey("hidden_size", "hidden_size"),
        MappedKey("num_hidden_layers", "num_layers"),
        MappedKey("num_attention_heads", ("num_heads", "num_kv_heads")),
        FFN,
        MappedKey("hidden_act", "mlp.kind", absent="silu", values={"silu": "swiglu"}),
        MappedKey("rms_norm_eps", "norm.eps", absent=1e-6, number=float),
        MappedKey("tie_word_embeddings", "tie_embeddings", absent=False),
        MappedKey("initializer_range", "init_std", absent=0.02, number=float),
        Custom(_read_positions, _write),
        Custom(_read_head, lambda config: {}),
        Fixed("rope_scaling", None, written=False),
    ),
    ignored=OLD_ROTARY,
    converted=("position.layout",),
    positions=("model_max_length", 4096),
)
