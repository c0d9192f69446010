"""Models and layouts of the parallel tests, and the pairs of them that `make test` and `make test-full` run."""

from typing import Any

from tests.parallel.part_models import MORE_PART_PAIRS, PART_MODELS, PART_PAIRS

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_heads": 8,
    "num_kv_heads": 4,
    "init_std": 0.1,
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": BASE,
    "dense_tied": {**BASE, "tie_embeddings": True},
    # A coefficient this large makes the auxiliary loss a visible part of every gradient.
    "moe": {**BASE, "moe": {"num_experts": 4, "top_k": 2, "aux_loss_coef": 0.5}},
    "moe_tied": {**BASE, "tie_embeddings": True, "moe": {"num_experts": 4, "top_k": 2, "aux_loss_coef": 0.5}},
    # DeepSeek-V3's router, with QK-norm and every loss; its rates are large, so that they show.
    "deepseek": {
        **BASE,
        "tie_embeddings": True,
        "attention": {"qk_norm": "head"},
        "moe": {
            "num_experts": 8,
            "top_k": 2,
            "ffn_hidden_size": 24,
            "num_shared_experts": 1,
            "gating": "sigmoid",
            "routed_scaling": 2.0,
            "num_groups": 4,
            "top_groups": 2,
            "group_score": "top2",
            "aux_loss": "global_batch",
            "aux_loss_coef": 0.5,
            "z_loss_coef": 0.1,
            "bias_update_rate": 0.05,
        },
    },
    # Tokens are dropped, and weights do not sum to one. Half an expert has an odd size.
    "capacity": {
        **BASE,
        "moe": {
            "num_experts": 4,
            "ffn_hidden_size": 22,
            "renormalize": False,
            "aux_loss": "micro_batch",
            "aux_loss_coef": 0.5,
            "capacity_factor": 0.75,
        },
    },
    # tp divides no odd vocabulary, and splits no single key-value head.
    "one_kv_head": {
        **BASE,
        "vocab_size": 61,
        "num_kv_heads": 1,
        "tie_embeddings": True,
        "attention": {"qk_norm": "head"},
    },
    # At tp=4 two ranks hold the same key-value head, and the last rank's part of the vocabulary is padding alone.
    "two_kv_heads": {**BASE, "vocab_size": 9, "num_kv_heads": 2, "moe": {"num_experts": 4, "top_k": 2}},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tp": 2}),
    "tp4": (4, {"tp": 4}),
    "tp4sp": (4, {"tp": 4, "sp": True}),
    "pp2": (2, {"pp": 2}),
    "tp2pp2": (4, {"tp": 2, "pp": 2}),
    "tp2dp2": (4, {"tp": 2}),
    "pp2dp2": (4, {"pp": 2}),
    "pp4": (4, {"pp": 4}),
    "pp2_uneven": (2, {"pp": 2, "layers_per_stage": [3, 1]}),
    "pp2vpp2": (2, {"pp": 2, "vpp": 2}),
    "tp2sp": (2, {"tp": 2, "sp": True}),
    "tp2sp_dp2": (4, {"tp": 2, "sp": True}),
    "tp2sp_pp2vpp2": (4, {"tp": 2, "sp": True, "pp": 2, "vpp": 2}),
    "cp2": (2, {"cp": 2}),
    "cp2dp2": (4, {"cp": 2}),
    "tp2sp_cp2": (4, {"tp": 2, "sp": True, "cp": 2}),
    "cp2_pp2vpp2": (4, {"cp": 2, "pp": 2, "vpp": 2}),
    "ep2": (2, {"ep": 2}),
    "ep2dp4": (4, {"ep": 2}),
    "ep4": (4, {"ep": 4}),
    "ep2pp2": (4, {"ep": 2, "pp": 2}),
    "tp2_ep2": (4, {"tp": 2, "ep": 2}),
    "tp2sp_ep2": (4, {"tp": 2, "sp": True, "ep": 2}),
    "cp2ep2": (2, {"cp": 2, "ep": 2}),
    "tp2sp_cp2ep2_pp2vpp2": (8, {"tp": 2, "sp": True, "cp": 2, "ep": 2, "pp": 2, "vpp": 2}),
    "zero1": (2, {}),
    "zero2": (2, {"zero": 2}),
    "zero3": (2, {"zero": 3}),
    "tp2zero2": (4, {"tp": 2, "zero": 2}),
    "tp2sp_zero3": (4, {"tp": 2, "sp": True, "zero": 3}),
    "zero1_offload": (2, {"offload_optimizer": True}),
    "zero2_offload": (2, {"zero": 2, "offload_optimizer": True}),
    "zero3_offload": (2, {"zero": 3, "offload_optimizer": True}),
    "pp2vpp2_offload": (2, {"pp": 2, "vpp": 2, "offload_optimizer": True}),
    "tp2sp_zero2_offload": (4, {"tp": 2, "sp": True, "zero": 2, "offload_optimizer": True}),
    "tp2sp_zero3_offload": (4, {"tp": 2, "sp": True, "zero": 3, "offload_optimizer": True}),
    "cp2zero3": (2, {"cp": 2, "zero": 3}),
    "ep2dp4_zero2": (4, {"ep": 2, "zero": 2}),
    "ep2zero2_offload": (2, {"ep": 2, "zero": 2, "offload_optimizer": True}),
    "ep2dp4_offload": (4, {"ep": 2, "offload_optimizer": True}),
}


def world_of(layout: str) -> tuple[int, dict[str, Any]]:
    """Returns the number of ranks and the `parallel` section of a layout; other names, such as "one", are one rank."""
    return LAYOUTS.get(layout, (1, {}))


def model_of(name: str, *layouts: str) -> dict[str, Any]:
    """Returns a model of two layers, or of as many as the longest pipeline of some layouts has parts."""
    parts = [parts_of(world_of(layout)[1]) for layout in layouts]
    return {**MODELS[name], "num_layers": max(MODELS[name]["num_layers"], *parts)}


def parts_of(parallel: dict[str, Any]) -> int:
    """Returns the least number of layers that a `parallel` section can divide into the parts of its pipeline."""
    return sum(parallel.get("layers_per_stage", [parallel.get("pp", 1) * parallel.get("vpp", 1)]))


def is_allowed(model: str, layout: str) -> bool:
    moe, degrees = MODELS[model].get("moe"), LAYOUTS[layout][1]
    if model in UNEVEN_MODELS or layout in UNEVEN_LAYOUTS:
        return False
    return bool(moe or "ep" not in degrees) and not ("cp" in degrees and moe and "capacity_factor" in moe)


# `make test` runs every layout with these models; `make test-full` also runs most layouts with the other models.
FIRST_MODELS = ("dense_tied", "deepseek")
FIRST_LAYOUTS = ("tp2", "pp2", "zero1", "tp2sp_pp2vpp2", "ep2dp4", "tp2sp_ep2")


# Models whose sizes do not divide by the layouts' degrees run the layouts where that matters alone.
UNEVEN_MODELS, UNEVEN_LAYOUTS = ("one_kv_head", "two_kv_heads"), ("tp4", "tp4sp")
UNEVEN_PAIRS = [
    ("one_kv_head", "tp2zero2"),
    ("two_kv_heads", "tp4sp"),
]
MORE_UNEVEN_PAIRS = [
    ("one_kv_head", "tp2sp_pp2vpp2"),
    ("one_kv_head", "tp2sp_zero3"),
    ("one_kv_head", "tp2sp_cp2"),
    ("one_kv_head", "tp2"),
    ("one_kv_head", "tp2sp_zero2_offload"),
    ("two_kv_heads", "tp4"),
    ("one_kv_head", "cp2"),
]


# Only with `make test-full`: each part of these models and layouts is in another pair that `make test` runs.
LONG_PAIRS = [
    ("deepseek", "tp2sp_zero3"),
    ("deepseek", "tp2sp_cp2"),
    ("deepseek", "tp2sp_dp2"),
    ("deepseek", "cp2zero3"),
    ("deepseek", "tp2_ep2"),
    ("deepseek", "ep2dp4_offload"),
    ("deepseek", "tp2zero2"),
    ("deepseek", "cp2_pp2vpp2"),
    ("deepseek", "tp2pp2"),
    ("deepseek", "zero2_offload"),
    ("deepseek", "pp2dp2"),
    ("dense_tied", "tp2sp_zero3_offload"),
    ("dense_tied", "tp2sp_zero2_offload"),
    ("dense_tied", "cp2dp2"),
    ("dense_tied", "pp4"),
    ("dense_tied", "tp2zero2"),
    ("dense_tied", "tp2sp_dp2"),
    ("dense", "tp2sp_pp2vpp2"),
    ("moe", "tp2"),
    ("moe_tied", "tp2sp_ep2"),
    ("moe_tied", "tp2sp_pp2vpp2"),
    ("moe_tied", "ep2dp4"),
    ("capacity", "tp2"),
    ("capacity", "tp2sp_pp2vpp2"),
    ("capacity", "ep2dp4"),
    ("deepseek", "tp2sp_zero3_offload"),
    ("deepseek", "tp2sp_zero2_offload"),
    ("deepseek", "zero3_offload"),
    ("deepseek", "tp2dp2"),
    ("deepseek", "cp2dp2"),
    ("moe", "ep2dp4"),
    ("moe", "tp2sp_ep2"),
    ("moe", "tp2sp_pp2vpp2"),
]


def is_first(model: str, layout: str) -> bool:
    first = model in FIRST_MODELS or layout in FIRST_LAYOUTS
    return first and LAYOUTS[layout][0] <= 4 and (model, layout) not in LONG_PAIRS


ALLOWED = [(model, layout) for model in MODELS for layout in LAYOUTS if is_allowed(model, layout)]
MODELS |= PART_MODELS
PAIRS = [pair for pair in ALLOWED if is_first(*pair)] + UNEVEN_PAIRS + PART_PAIRS
# With `make test-full`.
MORE_PAIRS = [pair for pair in ALLOWED if not is_first(*pair)] + MORE_UNEVEN_PAIRS + MORE_PART_PAIRS

# (model, layout that saves, layout that restores).
RESUMES = [
    ("dense", "one", "tp2"),
    ("dense", "tp2", "one"),
    ("dense_tied", "pp2vpp2", "tp2"),
    ("dense_tied", "pp2vpp2", "pp4"),
    ("moe_tied", "zero1", "one"),
    ("moe_tied", "zero1", "zero1"),
    ("moe_tied", "zero1", "tp2sp"),
    ("moe_tied", "zero1", "zero2"),
    ("moe_tied", "zero1", "zero3"),
    ("moe_tied", "zero1", "zero1_offload"),
    ("dense_tied", "zero3", "pp2"),
    ("one_kv_head", "tp2sp_zero3", "cp2"),
    ("deepseek", "ep2", "one"),
    ("deepseek", "ep2", "tp2sp_ep2"),
    ("two_kv_heads", "tp4", "one"),
]
# Only with `make test-full`.
MORE_RESUMES = [
    ("moe_tied", "zero1", "tp2pp2"),
    ("deepseek", "ep2", "cp2"),
    ("two_kv_heads", "tp4", "tp2_ep2"),
    ("dense", "tp2", "tp2sp_dp2"),
    ("moe", "tp2sp", "pp2vpp2"),
    ("one_kv_head", "cp2", "tp2zero2"),
    ("dense", "tp2", "zero1"),
    ("dense_tied", "pp2vpp2", "pp2_uneven"),
    ("moe", "tp2sp", "tp2dp2"),
    ("moe_tied", "zero1", "pp2_uneven"),
    ("moe_tied", "zero1", "pp2vpp2"),
    ("moe_tied", "zero1", "pp2dp2"),
    ("moe_tied", "tp2sp_pp2vpp2", "one"),
    ("moe_tied", "tp2sp_pp2vpp2", "zero1"),
    ("moe_tied", "zero1", "tp2sp_zero3_offload"),
    ("dense_tied", "zero3", "zero2_offload"),
    ("deepseek", "ep2", "ep2dp4_zero2"),
    ("deepseek", "ep2", "ep4"),
    ("deepseek", "cp2ep2", "zero3"),
]
