"""A run that goes from stage to stage of a mixture: the documents it is trained on, its layouts, and refusals."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from configs.loader import validate
from configs.mixture import MixtureConfig
from configs.train import ScheduleConfig
from data_pipeline.mixture.plan_files import build_stages
from data_pipeline.mixture.rows import Plan
from data_pipeline.provenance import replan
from data_pipeline.tokens.store import SourceStores
from pretrain import inspection
from pretrain.checkpoint import storage
from pretrain.schedule import learning_rate
from tests.parallel.harness import RanksOf
from tests.parallel.matrix import MODELS
from tests.parallel.runs import metrics, trained_on
from tests.small_data import VOCAB, make_tokens
from tests.training_configs import training_config

MIXTURE: dict[str, Any] = {
    "seq_length": 32,
    "weights": {"code": 0.5, "prose": 0.5},
    "max_epochs": 9,
    "stages": {
        "general": {"samples": 24},
        "annealing": {"samples": 12, "packing": "concat", "weights": {"code": 1.0}},
        "long_context": {"samples": 8, "seq_length": 64},
    },
}
# By stage: (step at which it ends, global batch size, other keys of its model).
STAGES = {"general": (3, 8, {}), "annealing": (6, 4, {}), "long_context": (8, 4, {"position": {"theta": 50_000.0}})}
SCHEDULE = {"kind": "cosine", "warmup_steps": 2, "steps": 9}  # it ends after the last stage
ONE: tuple[int, dict[str, Any]] = (1, {})


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_tokens(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def plans(tokens: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plans")
    build_stages(*tokens, out, validate(MixtureConfig, MIXTURE).plans())
    return out


def train(
    ranks: RanksOf,
    run_dir: Path,
    plan: Path,
    steps: int,
    batch: int,
    layout: tuple[int, dict[str, Any]] = ONE,
    **model: Any,
) -> dict[str, Any]:
    """Trains on a stage's plan; returns the ranks' answer and asserts that it is the same on all."""
    world, parallel = layout
    tree = training_config(
        run_dir,
        steps,
        (batch, 2),
        Plan.open(plan).seq_length,
        run={"seed": 3},
        model={**MODELS["dense"], "vocab_size": VOCAB, **model},
        data={"plan": str(plan)},
        optimizer={"lr": 0.001, "eps": 1e-6},
        schedule=SCHEDULE,
        parallel=parallel,
        checkpoint={"every": 1, "keep": 9},
    )
    (answer, *others) = ranks(world).run("tests.parallel.workers.plans:train_on_plan", process_group=False, tree=tree)
    assert others == [answer] * (world - 1)
    return answer


def assert_exactly_once(tokens: Path, segments: list[dict[str, Any]]) -> None:
    """Asserts that no token of a source was trained on more than once more often than another."""
    for source in ("code", "prose"):
        used = Counter(
            (segment["document"], segment["start"] + k)
            for segment in segments
            if segment["source"] == source
            for k in range(segment["length"])
        )
        (store,) = SourceStores.in_folder(tokens / "train" / source).stores
        counts = {used[document, k] for document in range(len(store)) for k in range(store.lengths[document])}
        assert max(counts) - min(counts) <= 1 <= max(counts)


def test_stages_are_one_run_in_any_layouts(
    ranks: RanksOf, plans: Path, tokens: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layouts = {"general": (2, {"pp": 2}), "annealing": (2, {"tp": 2, "sp": True}), "long_context": (2, {"cp": 2})}
    for name, (end, batch, model) in STAGES.items():
        assert train(ranks, tmp_path / "one", plans / name, end, batch, **model) == {"status": 0}
        assert train(ranks, tmp_path / "many", plans / name, end, batch, layouts[name], **model) == {"status": 0}
    one, many = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("one", "many"))
    assert len(one) == 8 and many == pytest.approx(one, rel=1e-5)  # fp32 sums in another order, over eight steps
    assert [line["tokens"] for line in metrics(tmp_path / "one")] == [256, 512, 768, 896, 1024, 1152, 1408, 1664]

    # The learning rate follows one schedule over all stages.
    rates = [line["lr"] for line in metrics(tmp_path / "many")]
    assert rates == [learning_rate(step, 9, 0.001, validate(ScheduleConfig, SCHEDULE)) for step in range(8)]
    assert rates[:2] == [0.0005, 0.001] and rates[2:] == sorted(rates[2:], reverse=True)

    assert inspection.main([str(tmp_path / "many")]) == 0
    said = capsys.readouterr().out
    assert f"from step 0, sample 0: 8 rows a step of {plans / 'general'}" in said
    assert f"from step 6, sample 36: 4 rows a step of {plans / 'long_context'}" in said

    segments = trained_on(tmp_path / "many")
    assert segments == trained_on(tmp_path / "one")
    assert_exactly_once(tokens[0], segments)
    assert {s["source"] for s in segments if 3 <= s["step"] < 6} == {"code"}
    # The checkpoint's ledger counts the labels that were trained on, by source.
    ledger = storage.read_manifest(storage.directory(tmp_path / "many", 8))["ledger"]
    expected = Counter[str]()
    for name in STAGES:
        plan = Plan.open(plans / name)
        for i in range(plan.num_samples):
            row = plan.row(i)
            expected[plan.sources[row.source]] += int(row.loss_mask.sum())
    assert ledger == dict(expected)


def test_weights_change_in_mid_run(ranks: RanksOf, plans: Path, tokens: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(ranks, run, plans / "general", 2, 8, (2, {})) == {"status": 0}
    checkpoint = storage.directory(run, 2)
    config = tmp_path / "data.toml"
    (tmp_path / "data").mkdir()
    for folder in tokens:
        (tmp_path / "data" / folder.name).symlink_to(folder)
    config.write_text(
        f'[run]\ndir="{tmp_path / "data"}"\n[sources.code]\nfiles=["x"]\nformat="jsonl"\nrules={{any="r"}}\n'
        '[sources.prose]\nfiles=["x"]\nformat="jsonl"\nrules={any="r"}\n[rules.r]\n'
        "[mixture]\nseq_length=32\nsamples=40\nmax_epochs=9\nweights={code=0.9,prose=0.1}\n"
    )
    assert replan.main([str(config), "--after", str(checkpoint), "--out", str(tmp_path / "more_code")]) == 0
    plan = Plan.open(tmp_path / "more_code")
    assert (plan.first_sample, plan.num_samples) == (16, 24)
    assert train(ranks, run, plan.path, 5, 8, (2, {"tp": 2})) == {"status": 0}
    segments = trained_on(run)
    assert_exactly_once(tokens[0], segments)
    assert segments[: sum(s["step"] < 2 for s in segments)] == [
        {"sample": i, **segment, "step": i // 8}
        for i in range(16)
        for segment in Plan.open(plans / "general").provenance(i)
    ]
    # The same again, from a checkpoint in the middle of the new plan.
    again = [str(config), "mixture.packing=concat", "--after", str(storage.directory(run, 4)), "--out"]
    assert replan.main([*again, str(tmp_path / "last")]) == 0
    assert Plan.open(tmp_path / "last").first_sample == 32
    branch = tmp_path / "branch"
    (branch / "checkpoints").mkdir(parents=True)
    storage.directory(run, 4).rename(storage.directory(branch, 4))
    assert train(ranks, branch, tmp_path / "last", 5, 8) == {"status": 0}
    assert_exactly_once(tokens[0], trained_on(branch))


def test_a_plan_that_does_not_follow_is_refused(ranks: RanksOf, plans: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "this run is new" in train(ranks, run, plans / "annealing", 6, 4)["error"]
    assert train(ranks, run, plans / "general", 2, 8) == {"status": 0}
    said = train(ranks, run, plans / "annealing", 6, 4)["error"]
    assert "has used 16 samples" in said and "goes on after 24" in said and "trivium data replan CONFIG --after" in said
    assert "train to there first, on the plan before, with train.steps=4, or make a plan" in said
    said = train(ranks, run, plans / "annealing", 6, 6)["error"]
    assert "goes on after 24, where no step of 6 samples ends; make a plan that goes on from it" in said
    assert "goes on after another plan than" in train(ranks, run, plans / "long_context", 6, 4)["error"]
    assert train(ranks, run, plans / "general", 3, 8) == {"status": 0}
    said = train(ranks, run, plans / "annealing", 6, 4, tie_embeddings=True)["error"]
    assert "with other settings than this config: model.tie_embeddings false -> true; set it back" in said
    said = train(ranks, run, plans / "annealing", 7, 4)["error"]
    assert "4 samples more than" in said and "which are 12; set train.steps=6, or raise" in said
