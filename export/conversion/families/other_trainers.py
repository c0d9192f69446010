"""Names of LLaMA shapes in checkpoints of other trainers: torchtitan's, which are Meta's own, and megatron-core's GPT.

Such checkpoints say nothing of the model but shapes; the keys of its config.json come from a family of transformers.
"""

from export.conversion.families.llama import BOTH, HALVES, OURS
from export.conversion.operations import ByGroup, Join, Rotary, chain
from export.conversion.table import Family, Rule

_TITAN = "layers.{layer}."
_PAIRS = Rotary("pairs")

TORCHTITAN = Family(
    architecture="torchtitan's LLaMA",
    model_type="",
    rules=(
        Rule("embedding.weight", "tok_embeddings.weight"),
        Rule("final_norm.weight", "norm.weight"),
        Rule("lm_head.weight", "output.weight"),
        Rule(f"{OURS}attention_norm.weight", f"{_TITAN}attention_norm.weight"),
        Rule(f"{OURS}mlp_norm.weight", f"{_TITAN}ffn_norm.weight"),
        Rule(f"{OURS}attention.q_proj.weight", f"{_TITAN}attention.wq.weight", _PAIRS),
        Rule(f"{OURS}attention.k_proj.weight", f"{_TITAN}attention.wk.weight", _PAIRS),
        Rule(f"{OURS}attention.v_proj.weight", f"{_TITAN}attention.wv.weight"),
        Rule(f"{OURS}attention.o_proj.weight", f"{_TITAN}attention.wo.weight"),
        Rule(f"{OURS}mlp.gate_proj.weight", f"{_TITAN}feed_forward.w1.weight"),
        Rule(f"{OURS}mlp.down_proj.weight", f"{_TITAN}feed_forward.w2.weight"),
        Rule(f"{OURS}mlp.up_proj.weight", f"{_TITAN}feed_forward.w3.weight"),
    ),
    keys=(),
    ignored=(r"freqs_cis|rope\.cache",),
    prefix="",
)

_MEGATRON = "decoder.layers.{layer}."
_QKV = tuple(f"{OURS}attention.{name}_proj" for name in "qkv")

_GATE_AND_UP = tuple(
    Rule((f"{OURS}mlp.gate_proj.{kind}", f"{OURS}mlp.up_proj.{kind}"), f"{_MEGATRON}mlp.linear_fc1.{kind}", Join())
    for kind in BOTH
)
# With `singleton_local_shards` the gate and the other half have names of their own.
_GATE, _UP = (
    tuple(Rule(f"{OURS}mlp.{ours}_proj.{kind}", f"{_MEGATRON}mlp.linear_fc1.{kind}_{half}") for kind in BOTH)
    for ours, half in (("gate", "w"), ("up", "v"))
)


def _megatron(gate_and_up: tuple[Rule, ...]) -> Family:
    return Family(
        architecture="megatron-core's GPTModel",
        model_type="",
        rules=(
            Rule("embedding.weight", "embedding.word_embeddings.weight"),
            Rule("final_norm.weight", "decoder.final_layernorm.weight"),
            Rule("lm_head.weight", "output_layer.weight"),
            Rule(f"{OURS}attention_norm.weight", f"{_MEGATRON}self_attention.linear_qkv.layer_norm_weight"),
            Rule(f"{OURS}mlp_norm.weight", f"{_MEGATRON}mlp.linear_fc1.layer_norm_weight"),
            Rule(f"{OURS}attention.q_norm.weight", f"{_MEGATRON}self_attention.q_layernorm.weight", HALVES),
            Rule(f"{OURS}attention.k_norm.weight", f"{_MEGATRON}self_attention.k_layernorm.weight", HALVES),
            *(
                Rule(
                    tuple(f"{part}.{kind}" for part in _QKV),
                    f"{_MEGATRON}self_attention.linear_qkv.{kind}",
                    chain(Rotary("halves", first=2), ByGroup()),
                )
                for kind in BOTH
            ),
            *(Rule(f"{OURS}attention.o_proj.{kind}", f"{_MEGATRON}self_attention.linear_proj.{kind}") for kind in BOTH),
            *gate_and_up,
            *(Rule(f"{OURS}mlp.down_proj.{kind}", f"{_MEGATRON}mlp.linear_fc2.{kind}") for kind in BOTH),
        ),
        keys=(),
        ignored=(r".*_extra_state.*", r"rotary_pos_emb\..*"),
        prefix="",
    )


MEGATRON, MEGATRON_SPLIT = _megatron(_GATE_AND_UP), _megatron((*_GATE, *_UP))
