"""ChatGLM2, ChatGLM3 and GLM-4 (GlmForCausalLM), GLM-4-0414 (glm4), GLM-4.5 (glm4_moe)."""

from export.conversion.config_keys import MappedKey
from export.conversion.families.deepseek import (
    CHOOSING_BIAS,
    FURTHER_LAYERS,
    MODULES,
    MOE,
    SIGMOID_ROUTER,
    mixture,
    sigmoid_router,
)
from export.conversion.families.llama import (
    ATTENTION,
    BOTH,
    ENDS,
    FFN,
    MLP,
    NORMS,
    OURS,
    QK_NORM,
    THEIRS,
    head_dim,
    named,
    sizes,
)
from export.conversion.operations import Join, Rotary
from export.conversion.rope_keys import Rope
from export.conversion.table import Family, Rule

PAIRS = Rotary("pairs")
FUSED_MLP = (
    Rule((f"{OURS}mlp.gate_proj.weight", f"{OURS}mlp.up_proj.weight"), f"{THEIRS}mlp.gate_up_proj.weight", Join()),
    *named("mlp.down_proj", "mlp.down_proj"),
)
PAIRS_ATTENTION = (
    *named("attention.q_proj", "self_attn.q_proj", BOTH, operation=PAIRS),
    *named("attention.k_proj", "self_attn.k_proj", BOTH, operation=PAIRS),
    *named("attention.v_proj", "self_attn.v_proj", BOTH),
    *named("attention.o_proj", "self_attn.o_proj"),
)
KEYS = (
    *sizes(kv_heads=2, eps=1.5625e-07),
    FFN,
    head_dim(absent=128),
    MappedKey("attention_bias", "attention.qkv_bias", absent=True),
    Rope(fraction=0.5, whole=False, positions=131072),
)
POSITIONS = ("max_position_embeddings", 131072)

GLM = Family(
    architecture="GlmForCausalLM",
    model_type="glm",
    rules=(*ENDS, *NORMS, *PAIRS_ATTENTION, *FUSED_MLP),
    keys=KEYS,
    fixed={"position.layout": "pairs"},
    converted=("position.layout",),
    positions=POSITIONS,
)

GLM_4_0414 = Family(
    architecture="Glm4ForCausalLM",
    model_type="glm4",
    rules=(
        *ENDS,
        *NORMS,
        *named("attention_output_norm", "post_self_attn_layernorm"),
        *named("mlp_output_norm", "post_mlp_layernorm"),
        *PAIRS_ATTENTION,
        *FUSED_MLP,
    ),
    keys=KEYS,
    fixed={"position.layout": "pairs", "residual.kind": "sandwich"},
    converted=("position.layout",),
    positions=POSITIONS,
)

GLM_4_5 = Family(
    architecture="Glm4MoeForCausalLM",
    model_type="glm4_moe",
    rules=(*ENDS, *NORMS, *ATTENTION, *QK_NORM, *MLP, *MOE, CHOOSING_BIAS, *MODULES),
    keys=(
        *sizes(kv_heads=8, eps=1e-5),
        FFN,
        head_dim(),
        MappedKey("attention_bias", "attention.qkv_bias", absent=False),
        MappedKey("use_qk_norm", "attention.qk_norm", absent=False, values={False: "none", True: "head"}),
        *mixture(count=128, top_k=8, size=1408, shared=1, scaling=1.0, dense=1),
        *sigmoid_router(groups=1, top_groups=1),
        Rope(fraction=0.5, whole=False, positions=131072),
    ),
    fixed=SIGMOID_ROUTER,
    further_layers=THEIRS,
    kept_keys=FURTHER_LAYERS,
    converted=("position.layout",),
    positions=POSITIONS,
    moe=True,
)

FAMILIES = (GLM, GLM_4_0414, GLM_4_5)
