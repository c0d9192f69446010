"""Phi-3: LLaMA with queries, keys and values in one projection, gate and up in one, and longrope."""

from export.conversion.config_keys import Fixed, MappedKey
from export.conversion.families.llama import ENDS, FFN, NORMS, OURS, THEIRS, head_dim, named, sizes, window
from export.conversion.operations import Join, Rotary, chain
from export.conversion.rope_keys import Rope
from export.conversion.table import Family, Rule

PHI_3 = Family(
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    rules=(
        *ENDS,
        *NORMS,
        Rule(
            tuple(f"{OURS}attention.{name}_proj.weight" for name in ("q", "k", "v")),
            f"{THEIRS}self_attn.qkv_proj.weight",
            chain(Rotary("halves", first=2), Join()),
        ),
        *named("attention.o_proj", "self_attn.o_proj"),
        Rule(
            (f"{OURS}mlp.gate_proj.weight", f"{OURS}mlp.up_proj.weight"),
            f"{THEIRS}mlp.gate_up_proj.weight",
            Join(),
        ),
        *named("mlp.down_proj", "mlp.down_proj"),
    ),
    keys=(
        *sizes(eps=1e-5),
        FFN,
        head_dim(always=False),
        window(absent=None),
        Rope(whole=False, positions=4096),
        MappedKey(
            "original_max_position_embeddings",
            (),
            absent=4096,
            get=lambda config: (config.position.scaling and config.position.scaling.original_length) or 4096,
        ),
        Fixed("resid_pdrop", 0.0, free=True),
        Fixed("embd_pdrop", 0.0, free=True),
    ),
    converted=("position.layout",),
    positions=("max_position_embeddings", 4096),
)

FAMILIES = (PHI_3,)
