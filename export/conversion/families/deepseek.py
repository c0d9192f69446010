"""DeepSeek-V2 and V3, and Kimi-K2, whose class is V3's: latent attention, groups of experts, shared experts."""

from typing import Any

from configs.model import ModelConfig
from export.conversion.config_keys import REQUIRED, ConfigKey, Custom, Draft, Fixed, MappedKey
from export.conversion.families.llama import (
    BOTH,
    ENDS,
    FFN,
    MLP,
    NORMS,
    OURS,
    THEIRS,
    even_heads,
    experts,
    heads,
    named,
    sizes,
)
from export.conversion.operations import Operation, Rotary
from export.conversion.rope_keys import Rope, rope_type
from export.conversion.table import COPY, Family, Rule

FURTHER_LAYERS = ("num_nextn_predict_layers",)
# transformers writes the number also where there are no such layers, so the tensors of a folder say it instead.
COUNT_OF_MODULES = Custom(lambda draft: None, lambda config: {FURTHER_LAYERS[0]: config.head.mtp_depth})
# The modules of multi-token prediction, as layers after the last one. They share embedding and head with the model.
MODULES = (
    *named("embedding_norm", "enorm"),
    *named("hidden_norm", "hnorm"),
    *named("joint_proj", "eh_proj"),
    *named("output_norm", "shared_head.norm"),
)


def latent(heads: Operation = COPY, shared: Operation = COPY) -> tuple[Rule, ...]:
    """Returns the rules of latent attention, with the operations on queries and on the key that all heads share."""
    return (
        *named("attention.q_proj", "self_attn.q_proj", operation=heads),
        *named("attention.q_down_proj", "self_attn.q_a_proj"),
        *named("attention.q_latent_norm", "self_attn.q_a_layernorm"),
        *named("attention.q_up_proj", "self_attn.q_b_proj", operation=heads),
        *named("attention.kv_down_proj", "self_attn.kv_a_proj_with_mqa", operation=shared),
        *named("attention.kv_latent_norm", "self_attn.kv_a_layernorm"),
        *named("attention.kv_up_proj", "self_attn.kv_b_proj"),
        *named("attention.o_proj", "self_attn.o_proj", BOTH),
    )


MOE = (
    *named("moe.router", "mlp.gate"),
    *experts("mlp"),
    *(
        rule
        for kind in ("gate", "up", "down")
        for rule in named(f"moe.shared.{kind}_proj", f"mlp.shared_experts.{kind}_proj")
    ),
)
# The bias that chooses experts; its steps are lost in bf16.
CHOOSING_BIAS = Rule(
    f"{OURS}moe.balance.bias", f"{THEIRS}mlp.gate.e_score_correction_bias", keep_fp32=True
)  # fmt: skip


def _refuse_other_scales(draft: Draft) -> None:
    """Refuses a factor on scores that belongs to yarn and that transformers takes with any kind of scaling."""
    rope = draft.raw.get("rope_scaling") or draft.raw.get("rope_parameters") or {}
    if rope.get("mscale_all_dim") and rope_type(rope) not in ("default", "yarn"):
        draft.refuse("mscale_all_dim", rope["mscale_all_dim"], "none where rope_type is not 'yarn'")


LATENT_KEYS = (
    MappedKey("q_lora_rank", "attention.latent.q_rank", absent=1536, null=None),
    MappedKey("kv_lora_rank", "attention.latent.kv_rank", absent=512),
    MappedKey("qk_nope_head_dim", "attention.latent.nope_head_dim", absent=128),
    MappedKey("qk_rope_head_dim", "attention.latent.rope_head_dim", absent=64),
    MappedKey("v_head_dim", "attention.latent.v_head_dim", absent=128),
    Fixed("attention_bias", False),
    Custom(_refuse_other_scales, lambda config: {}),
)


def dense_first(absent: int) -> Custom:
    """Returns the key of the number of layers before the first mixture of experts."""

    def read(draft: Draft) -> None:
        first, count = draft.value("first_k_dense_replace", absent), draft.raw.get("num_hidden_layers")
        if not isinstance(first, int) or first < 0 or (isinstance(count, int) and first >= count):
            return draft.refuse("first_k_dense_replace", first, f"a whole number below num_hidden_layers = {count}")
        draft.put("moe.first_layer", first)

    def write(config: ModelConfig) -> dict[str, Any]:
        return {"first_k_dense_replace": next(layer.index for layer in config.layers if layer.moe)}

    return Custom(read, write)


def shared_experts(absent: int) -> Custom:
    """Returns the key of the number of shared experts, each as large as a routed one."""

    def read(draft: Draft) -> None:
        count = draft.value("n_shared_experts", absent)
        if not isinstance(count, int) or count < 1:
            return draft.refuse("n_shared_experts", count, "a whole number from 1 on")
        draft.put("moe.num_shared_experts", count)

    def write(config: ModelConfig) -> dict[str, Any]:
        layer = next(layer for layer in config.layers if layer.moe)
        return {"n_shared_experts": max(1, layer.shared_size // layer.expert_size)}

    return Custom(read, write)


def mixture(count: int, top_k: Any, size: int, shared: int, scaling: float, dense: int) -> tuple[ConfigKey, ...]:
    """Returns the keys of a mixture of experts but for its groups.

    The arguments are what transformers takes where the keys are absent.
    """
    return (
        MappedKey("n_routed_experts", "moe.num_experts", absent=count),
        MappedKey("num_experts_per_tok", "moe.top_k", absent=top_k),
        MappedKey("moe_intermediate_size", "moe.ffn_hidden_size", absent=size, get=lambda config: config.expert_size),
        shared_experts(shared),
        MappedKey("routed_scaling_factor", "moe.routed_scaling", absent=scaling, number=float),
        dense_first(dense),
        Fixed("moe_layer_freq", 1),
        Fixed("output_router_logits", False, free=True),
    )


def sigmoid_router(groups: int, top_groups: int) -> tuple[ConfigKey, ...]:
    """Returns the keys of V3's router; the arguments are what transformers takes where they are absent.

    transformers has one router and reads neither scoring_func nor topk_method; DeepSeek's own code and vLLM do.
    """
    return (
        MappedKey("n_group", "moe.num_groups", absent=groups),
        MappedKey("topk_group", "moe.top_groups", absent=top_groups),
        MappedKey("norm_topk_prob", "moe.renormalize", absent=True),
        Fixed("scoring_func", "sigmoid"),
        Fixed("topk_method", "noaux_tc"),
        COUNT_OF_MODULES,
    )


SIGMOID_ROUTER = {
    **{"moe.gating": "sigmoid", "moe.group_score": "top2"},
    **{"moe.bias_update_rate": 0.001, "moe.aux_loss_coef": 0.0001},
}


def _read_groups(draft: Draft) -> None:
    """Reads V2's two ways to choose: among all experts, or among those of the groups with the best experts."""
    method = draft.value("topk_method", "greedy")
    if method == "group_limited_greedy":
        for theirs, ours in (("n_group", "moe.num_groups"), ("topk_group", "moe.top_groups")):
            if (value := draft.raw.get(theirs)) is None:
                draft.lack(theirs, "topk_method = 'group_limited_greedy' needs it")
            draft.put(ours, value)
    elif method != "greedy":
        draft.refuse("topk_method", method, "'greedy' or 'group_limited_greedy'")


def _write_groups(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    assert moe is not None
    if moe.num_groups == 1:
        return {"topk_method": "greedy", "n_group": None, "topk_group": None}
    return {"topk_method": "group_limited_greedy", "n_group": moe.num_groups, "topk_group": moe.top_groups}


DEEPSEEK_V2 = Family(
    architecture="DeepseekV2ForCausalLM",
    model_type="deepseek_v2",
    rules=(*ENDS, *NORMS, *latent(Rotary("pairs"), Rotary("pairs", shared=True)), *MLP, *MOE),
    keys=(
        *sizes(kv_heads=heads),
        FFN,
        Custom(even_heads, lambda config: {}),
        *LATENT_KEYS,
        *mixture(count=64, top_k=REQUIRED, size=1407, shared=2, scaling=1.0, dense=0),
        Custom(_read_groups, _write_groups),
        MappedKey("aux_loss_alpha", "moe.aux_loss_coef", absent=0.001, number=float),
        Fixed("norm_topk_prob", False),
        Fixed("scoring_func", "softmax"),
        Fixed("mlp_bias", False),
        Rope(),
    ),
    fixed={"position.layout": "pairs", "moe.renormalize": False},
    converted=("position.layout",),
    moe=True,
)

DEEPSEEK_V3 = Family(
    architecture="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    other_types=("kimi_k2",),
    rules=(*ENDS, *NORMS, *latent(), *MLP, *MOE, CHOOSING_BIAS, *MODULES),
    keys=(
        *sizes(kv_heads=heads),
        FFN,
        *LATENT_KEYS,
        MappedKey("rope_interleave", "position.layout", absent=True, values={True: "pairs", False: "halves"}),
        *mixture(count=256, top_k=8, size=2048, shared=1, scaling=2.5, dense=3),
        *sigmoid_router(groups=8, top_groups=4),
        Rope(positions=4096),
    ),
    fixed=SIGMOID_ROUTER,
    further_layers=THEIRS,
    kept_keys=FURTHER_LAYERS,
    positions=("max_position_embeddings", 4096),
    moe=True,
)

FAMILIES = (DEEPSEEK_V2, DEEPSEEK_V3)
