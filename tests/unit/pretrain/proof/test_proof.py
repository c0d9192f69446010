"""Bounds, verdicts and the page of a proof; tests/parallel tests that a proof finds planted bugs."""

import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import save_file

from configs.loader import ConfigError, load, plain, validate
from configs.model import ModelConfig
from configs.moe import MoEConfig
from configs.train import PretrainConfig
from pretrain.proof import proof_page, prove
from pretrain.proof.bounds import MARGIN, Bounds
from pretrain.proof.candidate import DEGREES
from pretrain.proof.compare import _allowed, allowed_weight
from pretrain.proof.fuzz import Draw, command_of, draw, shrink
from pretrain.proof.step_reader import RecordedStep
from pretrain.proof.verdict import COLUMNS, FIRST_FAILED, KEPT, RelativeError, Verdict
from tests.remedies import RANKS, remedies

MODEL = ModelConfig(vocab_size=64, num_layers=2, hidden_size=32, ffn_hidden_size=48, num_heads=4, num_kv_heads=2)
FACTS = {
    "date": "2026-01-01T00:00:00+00:00",
    "config": "a<b>.toml",
    "model": MODEL.model_dump(mode="json", exclude_none=True),
    "parameters": MODEL.num_parameters(),
    "batch": {"global_batch_size": 8, "micro_batch_size": 2, "seq_length": 16},
    "seed": 7,
    "precision": "fp64",
    "inject": None,
    "device": "cpu",
    "versions": {"torch": "2.13.0"},
    "bounds": Bounds(MODEL, 16, 128, "fp64").derivation(),
}


def verdict(errors: list[RelativeError]) -> Verdict:
    made = Verdict("tp2", 2, 1.5, "fp64")
    made.add("loss", RelativeError("loss", 0.0, 1e-14))
    made.add("grad_norm", RelativeError("grad_norm", 2e-16, 1e-14))
    made.add_tensors(errors)
    return made


def passes(*, bad: dict[str, float]) -> list[RelativeError]:
    """Returns two errors for each pass of a step, all within bounds except those in `bad`."""
    names = (f"{kind}/{name}" for kind in ("forward", "backward", "grad", "state") for name in ("a", "b"))
    return [RelativeError(name, bad.get(name, 1e-16), 1e-14) for name in names]


def test_fp64_is_held_to_what_fp32_is_by_its_own_unit_roundoff() -> None:
    fp64, fp32 = (Bounds(MODEL, 16, 128, precision) for precision in ("fp64", "fp32"))
    assert fp64.loss() == pytest.approx(fp32.loss() * 2.0**-29, rel=1e-12)
    for layer in range(2):
        for of in ("forward", "backward", "gradient"):
            assert getattr(fp64, of)(layer) == pytest.approx(getattr(fp32, of)(layer) * 2.0**-29, rel=1e-12)


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
def test_a_derivation_has_the_numbers_that_its_bounds_are_made_of(precision: str) -> None:
    bounds = Bounds(MODEL, 16, 128, precision)
    sentence = bounds.derivation()
    power = re.search(r"u = 2\^(-\d+)", sentence)
    depths = re.search(r"path: ([\d,]+) to the loss, ([\d,]+) to layer 0's gradients", sentence)
    assert power and depths and precision in sentence
    to_loss, to_gradient = (int(depth.replace(",", "")) for depth in depths.groups())
    assert bounds.loss() == pytest.approx(2 * 2.0 ** int(power[1]) * math.sqrt(to_loss), rel=1e-12)
    assert bounds.gradient(0) == pytest.approx(2 * 2.0 ** int(power[1]) * math.sqrt(to_gradient), rel=1e-12)


def test_a_verdict_keeps_the_first_that_failed_and_those_nearest_to_their_bounds() -> None:
    errors = [RelativeError(f"grad/{i}", 1e-16 * (i + 1), 1e-10) for i in range(1000)]
    errors[100:130] = [RelativeError(f"grad/{i}", 2e-10, 1e-10) for i in range(100, 130)]  # a little out of bounds
    errors[600:900] = [RelativeError(f"grad/{i}", 1e-5 * i, 1e-10) for i in range(600, 900)]
    found = verdict(errors)
    assert not found.passed and found.num_tensors == 1000 and found.num_failed == 330
    assert found.first == "grad/100" and len(found.failed) == FIRST_FAILED
    assert found.worst["grad"] == errors[899]
    first, worst = range(100, 100 + FIRST_FAILED), range(900 - KEPT, 900)
    assert found.errors == [(index, errors[index]) for index in (*first, *worst)]


def test_what_is_not_a_number_is_out_of_bounds_and_json_can_say_it() -> None:
    found = verdict(passes(bad={"forward/b": math.nan, "grad/a": math.inf}))
    assert found.num_failed == 2 and found.first == "forward/b"
    assert found.worst["forward"].name == "forward/b"
    text = json.dumps(found.as_json(), allow_nan=False)
    assert json.loads(text)["worst"]["forward"]["found"] == "nan"
    assert len(_dots(proof_page.chart(found), "fail")) == 2


def test_a_chart_has_a_dot_for_every_error_and_the_bound_as_a_line() -> None:
    found = verdict(passes(bad={"backward/a": 1e-3, "grad/b": 0.0}))
    drawing = proof_page.chart(found)
    assert len(_dots(drawing)) == 8 and len(_dots(drawing, "fail")) == 1 and len(_dots(drawing, "low")) == 1
    (failed,) = _dots(drawing, "fail")
    assert failed[0].text == "backward/a: 1.0e-03, allowed 1.0e-14"
    heights = {dot[0].text.split(":")[0]: float(dot.attrib["cy"]) for dot in _dots(drawing)}
    bounds = [path.attrib["d"] for path in ElementTree.fromstring(drawing).iter("path")]
    assert len(bounds) == 4  # one per pass
    height = float(re.split("[ L]", bounds[0])[1])
    assert heights["backward/a"] < height < heights["forward/a"] < heights["grad/b"]  # SVG's y grows downwards


def test_the_page_stands_alone_and_names_the_first_tensor() -> None:
    right, wrong = verdict(passes(bad={})), verdict(passes(bad={"backward/b": 1.0}))
    drawn = proof_page.draw(FACTS, [right, wrong])
    assert not re.search(r"https?:|<script|<link|src=|url\(", drawn)
    assert "1 of 2 layouts FAIL" in drawn and "all layouts pass" in proof_page.draw(FACTS, [right])
    assert '<p class="first">First on the way: <code>backward/b</code></p>' in drawn
    assert "a&lt;b&gt;.toml" in drawn and "<b>" not in drawn
    assert FACTS["bounds"].replace("'", "&#x27;") in drawn
    assert all(f">{title}</th>" in drawn for title in COLUMNS.values())
    assert drawn.count("<small>≤ 1.0e-14</small>") == 2 * len(COLUMNS)


def _dots(drawing: str, css: str | None = None) -> list[ElementTree.Element]:
    circles = ElementTree.fromstring(drawing).iter("circle")
    return [circle for circle in circles if css is None or circle.attrib.get("class") == css]


def test_every_copy_of_a_slice_is_looked_at(tmp_path: Path) -> None:
    """Compares all copies of a slice; under cp without sp two tensor-parallel ranks hold each half of a row."""
    (tmp_path / "step.json").write_text("{}")
    halves = [torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3), torch.ones(2, 3)]
    halves[2][1, 1] = 7.0  # one copy is wrong, and not the last one
    for rank, half in enumerate(halves):
        metadata = {"forward/x": json.dumps([(2 * (rank // 2), 0), (4, 3)])}
        save_file({"forward/x": half}, str(tmp_path / f"rank_{rank:05d}.safetensors"), metadata)
    wrong, right = RecordedStep(tmp_path).copies("forward/x")
    assert wrong[3, 1] == 7.0 and torch.equal(right, torch.cat((halves[0], halves[3])).double())
    (tmp_path / "rank_00000.safetensors").unlink()
    assert RecordedStep(tmp_path).copies("forward/x")[1].isnan().any(), "a slice that nobody wrote is no number"


def test_a_weight_that_stays_zero_has_a_bound(tmp_path: Path) -> None:
    """Bounds a bias of keys whose gradient rounds to zero in bf16, so that it stays what it was drawn as: zero."""
    (tmp_path / "step.json").write_text(json.dumps({"grad_norm": 1.0, "clip_grad": 1.0, "norm_terms": {}}))
    name = "layers.0.attention.bias"
    names = [f"grad/{name}", f"state/{name}"]
    metadata = dict.fromkeys(names, json.dumps([(0,), (3,)]))
    save_file({each: torch.zeros(3) for each in names}, str(tmp_path / "rank_00000.safetensors"), metadata)
    step, config = RecordedStep(tmp_path), load(PretrainConfig, Path("configs/pretrain/demo.toml"), [])
    assert 0 <= allowed_weight(name, step, step, Bounds(MODEL, 16, 128, "bf16"), config) < math.inf


def recorded_steps(folder: Path, exact: float, exact_norm: float = 1.0) -> list[RecordedStep]:
    """Writes a step and its companion, whose one gradient is 1 and `exact`; the norms of all are 1 and `exact_norm`."""
    steps = []
    for precision, gradient, norm in (("own", 1.0, 1.0), ("companion", exact, exact_norm)):
        (folder / precision).mkdir(parents=True)
        facts = {"grad_norm": norm, "clip_grad": 1.0, "norm_terms": {}}
        (folder / precision / "step.json").write_text(json.dumps(facts))
        metadata = {"grad/layers.0.attention.bias": json.dumps([(0,), (3,)])}
        file = folder / precision / "rank_00000.safetensors"
        save_file({"grad/layers.0.attention.bias": torch.full((3,), gradient)}, str(file), metadata)
        steps.append(RecordedStep(folder / precision))
    return steps


def test_a_second_moment_may_differ_by_the_square_of_what_its_gradient_may(tmp_path: Path) -> None:
    """Bounds the second moment of a gradient that is zero in exact arithmetic, whose errors are larger than itself."""
    name, steps = "layers.0.attention.bias", recorded_steps(tmp_path, -9.0)
    config, bounds = load(PretrainConfig, Path("configs/pretrain/demo.toml"), []), Bounds(MODEL, 16, 128, "bf16")
    one = torch.ones(3)
    error, square = (_allowed(f"{kind}/{name}", one, *steps, bounds, config) for kind in ("grad", "state.exp_avg_sq"))
    assert error == pytest.approx(MARGIN**2 * 10)  # MARGIN once more, since it has no correct digit
    assert (1 + error) ** 2 - 1 <= square < 1.1 * ((1 + error) ** 2 - 1)


def test_a_moment_may_differ_as_much_as_the_norm_by_which_its_gradient_is_clipped(tmp_path: Path) -> None:
    config, bounds = load(PretrainConfig, Path("configs/pretrain/demo.toml"), []), Bounds(MODEL, 16, 128, "fp32")
    name, one = "state.exp_avg/layers.0.attention.bias", torch.ones(3)
    exact, off = (
        _allowed(name, one, *recorded_steps(tmp_path / str(norm), 1.0, norm), bounds, config) for norm in (1.0, 1.001)
    )
    assert exact < 1e-4 and MARGIN * 0.001 < off < MARGIN * 0.001 + exact


def test_a_layout_that_is_refused_is_mended_as_the_message_says() -> None:
    """Follows each remedy in the layout's name: `parallel.tp` is its `tp`, and the ranks follow from its `dp`."""
    draw, followed = random.Random(4), 0

    def said(degrees: dict[str, int], precision: str = "fp32", *overrides: str) -> str:
        config = load(PretrainConfig, "configs/pretrain/demo_moe.toml", overrides)
        name = "".join(f"{key}{degree}" for key, degree in degrees.items())
        try:
            prove._check(prove.Candidate.parse(name), config, [precision])
        except ConfigError as error:
            return str(error)
        return ""

    for _ in range(60):
        degrees = {key: draw.choice([1, 1, 2, 3, 4, 5]) for key in ("tp", "pp", "cp", "ep")} | {"dp": 4}
        for key, value in remedies(said(degrees)):
            changed, overrides = dict(degrees), []
            if key == RANKS:
                dp, left = divmod(int(value), degrees["tp"] * degrees["pp"] * degrees["cp"])
                changed["dp"] = dp
                assert dp and not left
            elif key.startswith("parallel."):
                changed[key.partition(".")[2]] = int(value or 1)
            else:
                overrides = [f"{key}={value}"]
            after = said(changed, "fp32", *overrides)
            assert key not in dict(remedies(after)), (degrees, key, value, after)
            followed += 1
    assert followed > 20
    assert "compare it in fp32" in said({"tp": 2, "zero": 2}, "fp64") and not said({"tp": 2, "zero": 2})


def test_what_cannot_be_proven_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    demo = "configs/pretrain/demo.toml"
    (tmp_path / "broken.toml").write_text("[model\n")
    (tmp_path / "file").touch()
    kept = tmp_path / "kept/checkpoints/step_3"
    kept.mkdir(parents=True)
    new = [demo, f"run.dir={tmp_path}/new", "--layouts"]
    (kept / "manifest.json").write_text(json.dumps({"config": {"model": plain(load(PretrainConfig, demo).model)}}))
    asked = [
        ([demo, "--layouts", "qq2"], "'qq2' is not a layout"),
        ([demo], "give either CONFIG and --layouts, or --fuzz N"),
        ([demo, "--fuzz", "3"], "give either CONFIG and --layouts, or --fuzz N"),
        (["--fuzz", "0"], "--fuzz 0 draws nothing"),
        (["--fuzz", "3", "--against", "cpu"], "--against cpu or --record FOLDER without CONFIG"),
        ([demo, "--against", "cpu"], "--against cpu or --record FOLDER without CONFIG"),
        (["--record", str(tmp_path)], "it exists; name a new folder, or remove this one"),
        (["--against", str(tmp_path / "none")], "it has no reference.json that can be read"),
        (["--against", "cpu", "--precision", "fp8"], "--precision: 'fp8' is none of"),
        ([demo, "--layouts", "tp2", "--precision", "fp32,fp8"], "--precision: 'fp8' is none of fp64, fp32, bf16"),
        ([demo, "--layouts", "tp2,tp7"], "--layouts: tp7: model.num_heads = 4 is not a multiple"),
        ([demo, "--layouts", "pp2zero3"], "--layouts: pp2zero3: "),
        ([demo, "--layouts", "tp2zero2", "--precision", "fp64"], "fp64 is built for ZeRO stage 1"),
        ([demo, "--layouts", "tp2", "--inject", "gremlins"], "'gremlins' is no known bug; there are norm_grad"),
        ([demo, "--layouts", "tp2", "train.stpes=3"], "did you mean 'steps'"),
        ([str(tmp_path / "none.toml"), "--layouts", "tp2"], "does not exist"),
        ([str(tmp_path / "broken.toml"), "--layouts", "tp2"], "is not valid TOML"),
        ([demo, "--layouts", "tp2", "--out", str(tmp_path / "file/out")], "file is a file; name a folder"),
        ([*new, "tp2", f"init.run={tmp_path}/none"], "none' does not exist; name the folder of a run"),
        ([*new, "tp2", f"init.checkpoint={kept.parent}/step_4"], "are step_3: set init.checkpoint="),
        ([*new, "tp2", f"init.run={kept}"], f"not a run; set init.checkpoint={kept}"),
        ([*new, "tp2", f"init.hf={tmp_path}/none"], "none' does not exist; name a Hugging Face model"),
        ([*new, "tp7", f"init.run={tmp_path}/kept"], "--layouts: tp7: model.num_heads = 4 is not"),
    ]
    if not torch.cuda.is_available():
        asked.append((["--against", "cpu"], "finds no GPU"))
    script = (
        "import json, sys\nfrom configs.loader import ConfigError\nfrom pretrain.proof import prove\n"
        "for argv, words in json.loads(sys.argv[1]):\n"
        "    try: prove.main(argv)\n"
        "    except ConfigError as error: assert words in str(error), error\n"
        "    else: sys.exit(f'{argv} was not refused')\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script, json.dumps(asked)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_draws_are_the_same_for_the_same_seed_and_cover_what_the_config_allows() -> None:
    draws = [draw(5, index) for index in range(200)]
    assert draws == [draw(5, index) for index in range(200)] != [draw(6, index) for index in range(200)]
    for key in DEGREES:
        assert len({drawn.degrees[key] for drawn in draws}) > 1, key
    assert {drawn.precision for drawn in draws} == {"fp32", "bf16", "fp64"}
    assert {drawn.train["recompute"] for drawn in draws} == {"none", "selective", "full"}
    for key in MoEConfig.model_fields:
        assert len({repr(drawn.model["moe"].get(key)) for drawn in draws if "moe" in drawn.model}) > 1, key


def test_a_failure_is_shrunk_to_what_it_needs() -> None:
    """Shrinks a made-up failure of two features; every draw that is tried is one that training accepts."""
    tried = []

    def failures(drawn: Draw) -> list[str]:
        tried.append(drawn.is_legal)
        return ["wrong"] * (drawn.degrees["tp"] > 1 and drawn.model.get("moe", {}).get("gating") == "sigmoid")

    drawn = next(d for d in (draw(1, i) for i in range(500)) if failures(d) and d.degrees["dp"] > 1)
    smallest, sentences = shrink(drawn, failures)
    assert sentences == ["wrong"] and smallest.candidate.name == "tp2_dp1" and all(tried)
    assert smallest.model["num_layers"] == 1 and smallest.model["hidden_size"] == 8 and smallest.accum == 1
    assert smallest.model["moe"].keys() == {"num_experts", "top_k", "gating"} and smallest.precision == "fp32"
    config, command = command_of(smallest, Path("small.toml"))
    assert command == "trivium prove small.toml --layouts tp2_dp1 --precision fp32"
    assert validate(PretrainConfig, config).model.moe is not None
