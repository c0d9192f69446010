"""`trivium prove` passes correct layouts, and finds every planted bug, naming the first tensor that is wrong."""

import functools
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.loader import ConfigError, load, toml, validate
from configs.section import Section, section_in
from configs.train import PretrainConfig
from pretrain.proof.candidate import Candidate
from pretrain.proof.compare import compare
from pretrain.proof.fuzz import NOT_DRAWN, Draw, draw
from pretrain.proof.injections import INJECTIONS
from pretrain.proof.prove import fuzz
from pretrain.proof.prove import main as prove_main
from pretrain.proof.verdict import Verdict
from tests.parallel.harness import RanksOf
from tests.parallel.matrix import BASE, MODELS, parts_of
from tests.parallel.runs import steps_recorded_on
from tests.parallel.workers.layouts import GLOBAL_BATCH, MICRO_BATCH, SEQ_LENGTH

Prove = Callable[..., Verdict]
KINDS: dict[str, dict[str, Any]] = {
    **MODELS,
    # The gradient of this balancing loss is zero in micro-batches that are not trained on and give experts even loads.
    "micro_2": {**BASE, "moe": {"num_experts": 2, "top_k": 2, "aux_loss": "global_batch", "aux_loss_coef": 0.5}},
    # A norm over two elements amplifies rounding.
    "small_heads": {
        **BASE,
        "num_heads": 6,
        "num_kv_heads": 6,
        "head_dim": 2,
        "attention": {"qk_norm": "head"},
        "vocab_size": 66,
    },
}


def config(model: str, run_dir: Path, parallel: dict[str, Any], layers: int = 2) -> dict[str, Any]:
    return {
        "run": {"dir": str(run_dir)},
        "data": {"plan": "not read"},
        "model": {**KINDS[model], "num_layers": layers},
        "train": {
            "steps": 10,
            "global_batch_size": GLOBAL_BATCH,
            "micro_batch_size": MICRO_BATCH,
            "seq_length": SEQ_LENGTH,
        },
        "optimizer": {"lr": 0.01, "clip_grad": 0.1},
        "parallel": parallel,
    }


@pytest.fixture(scope="module")
def prove(ranks: RanksOf, tmp_path_factory: pytest.TempPathFactory) -> Prove:
    """Runner of proofs, which returns the verdict on a layout; the reference of each model is run once."""
    ones: dict[tuple[str, str, int], Path] = {}

    def run(world: int, settings: dict[str, Any], precision: str, inject: str | None, reference: Path | None) -> Path:
        settings = {"config": settings, "precision": precision, "inject": inject, "reference": reference}
        ranks(world).run("tests.parallel.workers.proof:prove", process_group=False, **settings)
        return Path(settings["config"]["run"]["dir"])

    def prove(layout: str, model: str, inject: str | None = None, precision: str = "fp32") -> Verdict:
        candidate = Candidate.parse(layout)
        layers = max(2, parts_of(candidate.parallel))
        folder, of_one = tmp_path_factory.mktemp("proof"), (model, precision, layers)
        alone = config(model, folder / "one", {}, layers)
        if of_one not in ones:
            ones[of_one] = run(1, alone, precision, None, None)
        split = config(model, folder / "split", candidate.parallel, layers)
        out = run(candidate.world_size, split, precision, inject, ones[of_one])
        checked = validate(PretrainConfig, alone)
        return compare(ones[of_one], out, candidate.name, candidate.world_size, checked, 0.0)

    return prove


@pytest.mark.parametrize(
    ("layout", "model", "precision"),
    [
        ("tp2sp", "moe_tied", "fp32"),
        ("pp2vpp2", "moe_tied", "fp32"),
        ("dp2", "moe_tied", "fp32"),
        ("tp2", "dense", "fp32"),
        pytest.param("tp2pp2", "dense", "bf16", marks=pytest.mark.full),
        pytest.param("zero2", "moe_tied", "bf16", marks=pytest.mark.full),
        pytest.param("tp2sp_zero3", "moe_tied", "fp32", marks=pytest.mark.full),
        ("tp2sp_pp2vpp2", "dense_tied", "fp64"),
        pytest.param("dp2", "dense_tied", "fp64", marks=pytest.mark.full),
        pytest.param("tp2sp_ep2", "deepseek", "fp64", marks=pytest.mark.full),
        ("cp2ep2", "moe_tied", "fp64"),
        pytest.param("tp4", "two_kv_heads", "fp64", marks=pytest.mark.full),
        pytest.param("tp2sp_cp2", "one_kv_head", "fp64", marks=pytest.mark.full),
        ("tp2", "moe", "bf16"),  # where rounding changes the choice of some experts
        ("tp2", "micro_2", "fp32"),
        ("tp3sp", "small_heads", "fp32"),
        ("tp2sp_ep2", "deepseek", "bf16"),
        # Terms of the gradient of the keys' norm cancel, and it has four elements.
        pytest.param("tp2sp_cp2", "one_kv_head", "bf16", marks=pytest.mark.full),
    ],
)
def test_what_is_right_passes(prove: Prove, layout: str, model: str, precision: str) -> None:
    verdict = prove(layout, model, precision=precision)
    assert verdict.passed, verdict.failed[:5]
    assert verdict.worst.keys() == {"loss", "grad_norm", "forward", "backward", "grad", "state"}
    assert verdict.worst["grad"].allowed > 0
    # Rounding differs somewhere, so tensors were compared. Ranks that only differ by their rows compute the same
    # gradients in bf16, and the sum of a few bf16 numbers in fp32 is exact, or nearly.
    assert verdict.worst["grad"].found > 0 or (layout, precision) == ("zero2", "bf16")


def test_in_fp64_all_is_fp64(ranks: RanksOf, tmp_path: Path) -> None:
    """Looks for fp32 tensors in an fp64 proof: a rounding that both layouts share would not show otherwise."""
    settings = config("deepseek", tmp_path, {"tp": 2, "sp": True})
    meant = {
        *("batch_source.py:collate", "batch_source.py:stack"),  # the loss mask
        *("initial_weights.py:_draw", "initial_weights.py:_fill", "slices.py:cut"),
        *("rotary.py:rotary_angles", "rotary.py:rotary_frequencies"),
        "batch.py:weightless",  # the loss mask of an evaluation's batches that fill up a pipeline
        *("recorded_step.py:_unbalance", "activation_hooks.py:keep"),  # the balance of experts, which is fp32
        *("balance.py:__init__", "balance.py:finish"),  # the bias on the choice of experts
    }
    for functions in ranks(2).run(
        "tests.parallel.workers.proof:functions_in_fp32", process_group=False, config=settings
    ):
        assert "rotary.py:rotary_angles" in functions  # so the recording works
        assert set(functions) <= meant
    norm = json.loads((tmp_path / "step.json").read_text())["grad_norm"]
    assert norm != float(np.float32(norm))


BIAS, LOAD = (f"state.balance/layers.0.moe.balance.{name}" for name in ("bias", "load"))
# (injected bug, layout, model, precision, first wrong tensor, beginning of a sentence that must be among the failures)
CAUGHT = [
    ("expert_norm_not_summed_over_tp", "tp2_ep2", "moe", "bf16", None, "grad_norm of step 1: ranks report 2 values"),
    ("clip_factor_for_each_group", "dp2", "dense", "fp32", "state.exp_avg/embedding.weight", ""),
    (
        "experts_missing_from_norm",
        "tp2_ep2",
        "moe",
        "fp32",
        "state.exp_avg/embedding.weight",
        "grad_norm of step 1: the",
    ),
    ("norm_gradients_not_summed", "tp2sp", "dense", "fp32", "grad/final_norm.weight", "copies: "),
    ("partial_gradients_summed_twice", "pp2", "dense_tied", "fp32", "grad/embedding.weight", ""),
    (
        "replicated_weights_counted_tp_times",
        "tp2",
        "dense",
        "fp32",
        "state.exp_avg/embedding.weight",
        "grad_norm of step 1",
    ),
    ("mean_of_means", "dp2", "dense", "fp32", "backward/final_norm/0", ""),
    ("auxiliary_loss_times_micro_batches", "pp2", "moe", "fp32", "backward/layers.1.attention/0", ""),
    ("chunks_initialised_alike", "pp2", "dense", "fp32", "forward/layers.1.attention/0", ""),
    ("qk_norm_gradients_not_summed", "tp2", "deepseek", "fp32", "grad/layers.1.attention.k_norm.weight", "copies: "),
    (
        "key_value_gradients_not_summed",
        "tp2",
        "one_kv_head",
        "fp32",
        "grad/layers.1.attention.k_proj.weight",
        "copies: ",
    ),
    ("router_gradients_not_summed", "tp2", "moe", "fp32", "backward/layers.1.attention/0", "copies: "),
    ("expert_gradients_doubled", "ep2", "moe", "fp32", "grad/layers.1.moe.experts.down_proj", ""),
    ("document_mask_off_by_one", "cp2", "dense", "fp32", "forward/layers.0.attention/0", ""),
    ("router_counts_not_summed_over_tp", "tp2", "deepseek", "fp32", LOAD, ""),
    ("router_counts_not_summed_over_replicas", "ep2", "deepseek", "fp32", LOAD, ""),
    ("router_bias_multiplied_by_tp", "tp2", "deepseek", "fp32", BIAS, ""),
    ("replicated_bias_multiplied_by_tp", "tp2", "learned", "fp32", "forward/layers.0.attention/0", ""),
    ("uneven_vocabulary_cut_without_padding", "tp2", "one_kv_head", "fp32", "forward/embedding/0", ""),
    ("evaluation_moves_router_bias", "dp2", "deepseek", "fp32", BIAS, ""),
]


@pytest.mark.parametrize(("inject", "layout", "model", "precision", "first", "sentence"), CAUGHT)
def test_the_verdict_names_where_every_planted_bug_first_shows(
    prove: Prove, inject: str, layout: str, model: str, precision: str, first: str | None, sentence: str
) -> None:
    verdict = prove(layout, model, inject, precision)
    assert not verdict.passed
    assert verdict.first == first, verdict.failed[:5]
    assert any(failed.startswith(sentence) for failed in verdict.failed), verdict.failed[:5]


OF_OTHER_SYSTEMS = [
    *(("pytorch", 160285), ("Megatron-LM", 5916), ("Automodel", 3816)),
    *(("torchtitan", issue) for issue in (1136, 4148, 4154, 4245)),
]


def test_every_injection_is_tested() -> None:
    of_devices = {"products_in_tf32", "attention_across_documents"}  # in test_against.py
    assert set(INJECTIONS) == {inject for inject, *_ in CAUGHT} | of_devices


@pytest.mark.parametrize(
    ("name", "world", "parallel"),
    [
        ("tp2sp", 2, {"tp": 2, "sp": True}),
        ("tp2_pp2vpp2", 4, {"tp": 2, "pp": 2, "vpp": 2}),
        ("tp2pp2dp3", 12, {"tp": 2, "pp": 2}),
        ("zero2", 2, {"zero": 2}),
        ("zero2ep4", 4, {"zero": 2, "ep": 4}),
        ("cp2ep2", 2, {"cp": 2, "ep": 2}),
        ("tp2zero3", 4, {"tp": 2, "zero": 3}),
    ],
)
def test_layouts_have_names(name: str, world: int, parallel: dict[str, Any]) -> None:
    found = Candidate.parse(name)
    assert (found.name, found.world_size, found.parallel) == (name, world, parallel)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layouts", "tq2"], "'tq2' is not a layout"),
        (["--layouts", "tp"], "'tp' is not a layout"),
        (["--layouts", "tp2,ep2"], "--layouts: ep2: parallel.ep = 2 spreads experts, but the model has none"),
        (["--layouts", "tp2,zero2", "--precision", "fp64"], "--precision fp64: zero2 has parallel.zero = 2"),
        (["--layouts", "dp2", "--precision", "fp64", "parallel.offload_optimizer=true"], "offload_optimizer = true"),
        (["--layouts", "pp8"], "--layouts: pp8: parallel.pp"),
        (["--layouts", "zero3pp2"], "--layouts: zero3pp2: parallel.zero = 3 with parallel.pp = 2"),
        (["--layouts", "tp2", "--inject", "gremlin"], "--inject 'gremlin' is no known bug; there are norm_gradients"),
    ],
)
def test_what_cannot_be_proven_is_refused_before_anything_starts(
    tmp_path: Path, arguments: list[str], words: str
) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(toml(config("dense", tmp_path / "run", {})))
    with pytest.raises(ConfigError) as raised:
        prove_main([str(file), *arguments, "--out", str(tmp_path / "out")])
    assert words in str(raised.value) and not (tmp_path / "out").exists()


def test_the_command_starts_layouts_and_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "config.toml", tmp_path / "out"
    file.write_bytes(toml(config("dense", tmp_path / "run", {"tp": 4})))
    planted = ["--inject", "mean_of_means", "--precision", "fp64"]
    assert prove_main([str(file), "--layouts", "dp2", "--out", str(out), *planted]) == 1
    shown = capsys.readouterr().out
    assert "FAIL" in shown and "first on the way: backward/final_norm/0" in shown
    assert max(map(len, shown.splitlines())) <= 100
    record = json.loads((out / "prove.json").read_text())
    assert record["bounds"] in " ".join(shown.split()) and "u = 2^-53" in record["bounds"]
    assert record["precision"] == "fp64" and record["inject"] == "mean_of_means"
    (verdict,) = record["layouts"]
    assert verdict["layout"] == "dp2" and verdict["first"] == "backward/final_norm/0"
    assert verdict["worst"]["forward"]["found"] <= verdict["worst"]["forward"]["allowed"] < 1e-14
    assert "<code>backward/final_norm/0</code>" in (out / "prove.html").read_text()


def test_help_knows_every_bug_that_can_be_planted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prove_main(["--help"])
    shown = capsys.readouterr().out
    for name, bug in INJECTIONS.items():
        description = (bug.__doc__ or "").splitlines()[0].removeprefix("Plants a bug: ")
        assert re.search(rf"^  {name}\n    {re.escape(description)}$", shown, re.MULTILINE)
    for system, issue in OF_OTHER_SYSTEMS:
        assert re.search(rf"\b{system}\b( issue)? {issue}\b", shown), "the thread is named"


@pytest.mark.full
@pytest.mark.parametrize(("layout", "model"), [("tp2_ep2", "moe"), ("tp2_ep2", "deepseek"), ("cp2ep2", "moe")])
def test_copies_are_the_same_to_the_last_bit_after_twenty_steps_in_bf16(
    ranks: RanksOf, tmp_path: Path, layout: str, model: str
) -> None:
    candidate = Candidate.parse(layout)
    settings = config(model, tmp_path, candidate.parallel)

    def trained(**kwargs: Any) -> list[dict[str, Any]]:
        run = ranks(candidate.world_size).run
        return run("tests.parallel.workers.proof:train", process_group=False, config=settings, **kwargs)

    of_rank = trained(steps=20)
    assert of_rank[0]["differing"] == []
    assert all(rank["norms"] == of_rank[0]["norms"] for rank in of_rank)
    assert min(of_rank[0]["norms"]) > settings["optimizer"]["clip_grad"]  # clipping took part in every step
    if candidate.parallel.get("tp", 1) > 1:  # one step suffices to see a factor that differs
        assert trained(steps=1, inject="expert_norm_not_summed_over_tp")[0]["differing"]


@functools.cache
def many_draws() -> list[Draw]:
    return [draw(6, index) for index in range(500)]


def test_every_key_of_a_model_and_a_layout_is_drawn_or_has_a_reason_why_not() -> None:
    values: dict[str, set[str]] = {key: set() for key in keys_of(PretrainConfig)}
    for one in many_draws():
        drawn = validate(PretrainConfig, one.config(Path("run"), parallel=True))
        for key in values:
            values[key].add(repr(value_of(drawn, key)))
    varied = {key for key, seen in values.items() if len(seen) > 1}
    listed = {key for key in values if not {key, key.partition(".")[0]}.isdisjoint(NOT_DRAWN)}
    assert set(values) - varied - listed == set(), "neither drawn nor listed in NOT_DRAWN"
    assert varied & listed == set()
    assert {name for name in NOT_DRAWN if name not in values} <= set(PretrainConfig.model_fields)


def keys_of(section: type[Section], prefix: str = "") -> list[str]:
    """Lists the dotted keys of a section and of all sections within it."""
    keys = []
    for name, field in section.model_fields.items():
        inner, _ = section_in(field.annotation)
        keys += keys_of(inner, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return keys


def value_of(config: Any, key: str) -> Any:
    """Returns the value of a dotted key; None where a section on the way is left out, a list for several."""
    name, _, rest = key.partition(".")
    if isinstance(config, dict):
        return [value_of(section, key) for section in config.values()]
    value = None if config is None else getattr(config, name)
    return value_of(value, rest) if rest else value


# What two or more keys together make of a layout.
COMBINATIONS: dict[str, Callable[[Draw], bool]] = {
    "a vocabulary that tp does not divide": lambda d: d.model["vocab_size"] % d.degrees["tp"] > 0,
    "a rank with padding alone": lambda d: d.model["vocab_size"] == 9 and d.degrees["tp"] == 4,
    "one kv head on several ranks": lambda d: d.model["num_kv_heads"] == 1 and d.degrees["tp"] > 1,
    "fewer kv heads than tp * cp": lambda d: d.model["num_kv_heads"] < d.degrees["tp"] * d.degrees["cp"],
    "kv heads not exchanged over cp": lambda d: d.model["num_kv_heads"] % (d.degrees["tp"] * d.degrees["cp"]) > 0,
    "sequence parallel with cp": lambda d: d.sp and d.degrees["cp"] > 1,
    "tied embeddings over a pipeline": lambda d: d.model["tie_embeddings"] and d.degrees["pp"] > 1,
    "tied embeddings of an uneven vocabulary over a pipeline": lambda d: (
        d.model["tie_embeddings"] and d.degrees["pp"] > 1 and d.model["vocab_size"] % d.degrees["tp"] > 0
    ),
    "uneven stages, interleaved": lambda d: d.layers_per_stage is not None and d.degrees["vpp"] > 1,
    "experts over cp": lambda d: d.degrees["ep"] > 1 and d.degrees["cp"] > 1,
    "experts over dp and tp": lambda d: d.degrees["ep"] > 1 and d.degrees["tp"] > 1,
    "ZeRO-2 with experts spread": lambda d: d.degrees["zero"] == 2 and d.degrees["ep"] > 1,
    "ZeRO-3 with tp": lambda d: d.degrees["zero"] == 3 and d.degrees["tp"] > 1,
    "ZeRO-3, offloaded, in bf16": lambda d: d.degrees["zero"] == 3 and d.offload and d.precision == "bf16",
    "offloaded pipeline": lambda d: d.offload and d.degrees["pp"] > 1,
    "dropout that is recomputed": lambda d: d.train["dropout"] > 0 and d.train["recompute"] == "full",
    "capacity with experts spread": lambda d: "capacity_factor" in d.model.get("moe", {}) and d.degrees["ep"] > 1,
    "bias, shared experts and tp": lambda d: (
        "moe" in d.model
        and d.model["moe"]["bias_update_rate"] > 0
        and d.model["moe"]["num_shared_experts"] > 0
        and d.degrees["tp"] > 1
    ),
    "QK-norm in bf16 with tp": lambda d: (
        d.model["attention"].get("qk_norm") == "head" and d.precision == "bf16" and d.degrees["tp"] > 1
    ),
}


def test_the_fuzzer_draws_what_only_combinations_of_keys_make() -> None:
    assert [name for name, is_so in COMBINATIONS.items() if not any(map(is_so, many_draws()))] == []


def test_the_fuzzer_draws_legal_layouts_that_all_pass(ranks: RanksOf, tmp_path: Path) -> None:
    assert fuzz(6, 2794, tmp_path, steps_recorded_on(ranks)) == 0


@pytest.mark.full
def test_a_hundred_draws_pass(ranks: RanksOf, tmp_path: Path) -> None:
    assert fuzz(100, 1, tmp_path, steps_recorded_on(ranks)) == 0


@pytest.mark.full
def test_the_fuzzer_shrinks_a_failure_to_a_command_that_reproduces_it(
    ranks: RanksOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(1174, 0).candidate.name == "tp2_dp2_ep2" and draw(1174, 0).precision == "bf16"
    assert fuzz(1, 1174, tmp_path, steps_recorded_on(ranks), "qk_norm_gradients_not_summed") == 1
    _, command = capsys.readouterr().out.split("trivium prove ")
    arguments = shlex.split(command.splitlines()[0])
    assert arguments[1:5] == ["--layouts", "tp2_dp1", "--precision", "fp32"]
    model = load(PretrainConfig, arguments[0], []).model
    assert model.attention.qk_norm == "head" and model.moe is None and model.num_layers == 1
    assert prove_main([*arguments, "--out", str(tmp_path / "again")]) == 1
    assert ".q_norm.weight" in capsys.readouterr().out
