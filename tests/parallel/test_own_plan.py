"""A run whose plan was replaced by a new data run finds its own one again, or goes on with a longer one."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from configs import run_history
from data_pipeline.provenance import replan
from pretrain.checkpoint import storage
from tests.parallel.harness import RanksOf
from tests.parallel.matrix import MODELS
from tests.parallel.runs import metrics, trained_on
from tests.published_plans import publish, without_plan
from tests.small_data import VOCAB, make_tokens
from tests.training_configs import training_config

BATCH = 4
TRAIN = "tests.parallel.workers.plans:train_on_plan"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_tokens(folder)
    return folder


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Path:
    """Folder of a data run that has tokens and a tokenizer, but no plan yet."""
    return without_plan(made, tmp_path / "data")


def tree_of(run: Path, plan: Path, steps: int, seed: int = 3, seq_length: int = 32) -> dict[str, Any]:
    return training_config(
        run,
        steps,
        (BATCH, 2),
        seq_length,
        run={"seed": seed},
        model={**MODELS["dense"], "vocab_size": VOCAB},
        data={"plan": str(plan)},
        optimizer={"lr": 0.001, "eps": 1e-6},
        checkpoint={"every": 1, "keep": 9},
    )


def train(ranks: RanksOf, run: Path, plan: Path, steps: int, **more: int) -> dict[str, Any]:
    tree = tree_of(run, plan, steps, **more)
    (answer,) = ranks(1).run(
        "tests.parallel.workers.plans:train_and_listen", process_group=False, tree=tree, first_bytes=10**9
    )
    return answer


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run) if "loss" in line]


def test_a_longer_plan_goes_on_as_the_same_data(ranks: RanksOf, data: Path, tmp_path: Path) -> None:
    run, first = tmp_path / "run", publish(data)
    assert train(ranks, run, data / "plan", 2)["status"] == 0
    said = train(ranks, run, data / "plan", 5)["error"]
    assert "needs 8 samples more than" in said and "which are 12" in said
    # The message's remedies: fewer steps, or a new data run with more samples.
    assert train(ranks, run, data / "plan", int(re.findall(r"train\.steps=(\d+)", said)[0]))["status"] == 0
    assert storage.steps(run)[-1] == 3
    more = re.findall(r"raise mixture\.samples in the data config .* by (\d+) and run `trivium data run` again", said)
    longer = publish(data, samples=12 + int(more[0]))
    assert train(ranks, run, data / "plan", 5)["status"] == 0
    assert list(dict.fromkeys(one["data"] for one in run_history.read(run))) == [first, longer]
    assert train(ranks, tmp_path / "straight", data / "plan", 5)["status"] == 0
    assert losses(run) == losses(tmp_path / "straight")
    # Steps before the change are traced in the earlier plan.
    assert [s["document_id"] for s in trained_on(run)] == [s["document_id"] for s in trained_on(tmp_path / "straight")]


def test_each_stage_of_a_mixture_may_grow(ranks: RanksOf, data: Path, tmp_path: Path) -> None:
    run, general, late = tmp_path / "run", data / "plan/general", data / "plan/late"
    publish(data, stages={"general": {}, "late": {}})
    said = train(ranks, run, general, 5)["error"]
    assert "set train.steps=3, or raise mixture.samples in the data config (of its mixture stage general, if" in said
    assert f"by 8 and run `trivium data run` again, or train to step 3 and then go on with data.plan={late}" in said
    assert train(ranks, run, general, 3)["status"] == train(ranks, run, late, 4)["status"] == 0
    run = tmp_path / "longer"
    assert train(ranks, run, general, 2)["status"] == 0
    publish(data, stages={"general": {"samples": 12 + 8}, "late": {}})
    assert train(ranks, run, general, 5)["status"] == train(ranks, run, late, 6)["status"] == 0
    said = train(ranks, run, late, 9)["error"]
    assert "set train.steps=8, or raise mixture.samples in the data config (of its last mixture stage, if" in said
    publish(data, stages={"general": {"samples": 20}, "late": {"samples": 12 + 4}})
    assert train(ranks, run, late, 9)["status"] == 0
    assert train(ranks, tmp_path / "straight", general, 5)["status"] == 0
    assert train(ranks, tmp_path / "straight", late, 9)["status"] == 0
    assert losses(run) == losses(tmp_path / "straight")


def test_ranks_that_saw_different_plans_do_not_train(ranks: RanksOf, data: Path, tmp_path: Path) -> None:
    """Publishes a new plan, as a data run may, after one rank has read the plan and before another does."""
    publish(data)
    shutil.copytree(data / "plan", tmp_path / "data" / "before")
    publish(data, weights={"code": 0.5, "prose": 0.5})
    seen = [str(data / "before"), str(data / "plan")]
    answers = ranks(2).run(TRAIN, process_group=False, tree=tree_of(tmp_path / "run", data / "plan", 3), seen=seen)
    assert answers[0] == answers[1]
    assert answers[0]["error"].startswith("the ranks do not have the same data of the run: ")
    assert not (tmp_path / "run").exists()
    (answer, other) = ranks(2).run(TRAIN, process_group=False, tree=tree_of(tmp_path / "run", data / "plan", 3))
    assert answer["status"] == other["status"] == 0, "started again, it trains"


def test_ranks_that_differ_train_when_what_the_message_names_is_the_same(ranks: RanksOf, tmp_path: Path) -> None:
    tree = tree_of(tmp_path / "run", tmp_path, 3)
    pins = [{"checkpoint": f"{tmp_path}/step_{step}", "step": step, "sha256": str(step)} for step in (1, 2)]

    def told(precisions: tuple[str, str], seeds: tuple[int, int] = (1, 1), begun: tuple[int, int] | None = None) -> str:
        settings = [{"train": {"precision": one}} for one in precisions]
        identities = [{"seed": seed} | ({"init": pins[begun[n]]} if begun else {}) for n, seed in enumerate(seeds)]
        pin = pins[begun[0]] if begun else None
        options = {"tree": tree, "settings": settings, "identities": identities, "pin": pin}
        answers = ranks(2).run("tests.parallel.workers.plans:settings_of_ranks", process_group=False, **options)
        assert answers[0].replace("step_2", "step_1") == answers[1].replace("step_2", "step_1")
        return str(answers[0])

    said = told(("bf16", "fp32"))
    for precision in re.findall(r"chooses (\w+) on some ranks and (\w+) on others; set one of them", said)[0]:
        assert not told((precision, precision))
    assert "make them the same everywhere and start again" in told(("fp32", "fp32"), (1, 2))
    said = told(("fp32", "fp32"), begun=(0, 1))
    assert "set init.checkpoint to one of them" in said and pins[0]["checkpoint"] in said
    assert not told(("fp32", "fp32"), begun=(0, 0))


def test_a_run_goes_on_with_its_own_plan(
    ranks: RanksOf, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, first = tmp_path / "run", publish(data)
    assert train(ranks, tmp_path / "straight", data / "plan", 3)["status"] == 0
    assert train(ranks, run, data / "plan", 1)["status"] == 0
    # Other plans replace it: with other weights, with other row lengths, with stages.
    for changes in ({"weights": {"code": 1.0}}, {"seq_length": 64}, {"stages": {"general": {}, "late": {}}}):
        publish(data, **changes)
    assert train(ranks, run, data / "plan", 3)["status"] == 0
    assert losses(run) == losses(tmp_path / "straight")
    assert {one["data"] for one in run_history.read(run)} == {first}
    # Its own plan has no more samples. The remedies are a plan that continues from the checkpoint, and a longer plan.
    publish(data, weights={"code": 1.0}, samples=40)
    said = train(ranks, run, data / "plan", 5)["error"]
    checkpoint = re.findall(r"trivium data replan CONFIG --after (\S+) --out", said)[0]
    config = tmp_path / "data.toml"
    config.write_text(
        f'[run]\ndir="{data}"\n[sources.code]\nfiles=["x"]\nformat="jsonl"\nrules={{any="r"}}\n'
        '[sources.prose]\nfiles=["x"]\nformat="jsonl"\nrules={any="r"}\n[rules.r]\n'
        "[mixture]\nseq_length=32\nsamples=20\nmax_epochs=9\nweights={code=1.0}\n"
    )
    capsys.readouterr()
    assert replan.main([str(config), "--after", checkpoint, "--out", str(tmp_path / "rest")]) == 0
    assert f" of the run: train with data.plan={tmp_path / 'rest'}\n" in capsys.readouterr().out
    shutil.copytree(run, tmp_path / "other")
    new = tmp_path / "new"
    said = train(ranks, new, tmp_path / "rest", 5)["error"]
    assert "train on that plan first, or name a checkpoint of such a run with --resume" in said
    tree = tree_of(new, tmp_path / "rest", 5)
    assert ranks(1).run(TRAIN, process_group=False, tree=tree, resume=checkpoint) == [{"status": 0}]
    assert train(ranks, run, tmp_path / "rest", 5)["status"] == 0
    publish(data, samples=20)
    assert train(ranks, tmp_path / "other", data / "plan", 5)["status"] == 0


def test_what_differs_is_said_in_words(ranks: RanksOf, data: Path, tmp_path: Path) -> None:
    run, first = tmp_path / "run", publish(data)
    assert train(ranks, run, data / "plan", 1)["status"] == 0
    publish(data, weights={"code": 0.9, "prose": 0.1}, seed=7)
    kept = next(data.glob("plan.*"))
    kept.rename(tmp_path / "elsewhere")
    said = train(ranks, run, data / "plan", 3)["error"]
    assert "its data differ: seed 0 -> 7; weights.code 0.6 -> 0.9; weights.prose 0.4 -> 0.1" in said
    assert first not in said
    # The remedies are data.plan set back to the run's own plan, or a new run in another folder. A mistake in another
    # key is reported in the same message.
    (tmp_path / "elsewhere").rename(kept)
    assert train(ranks, run, kept, 2)["status"] == 0
    assert train(ranks, tmp_path / "anew", data / "plan", 1)["status"] == 0
    said = train(ranks, run, data / "plan", 3, seed=4)["error"]
    assert "than this config: run.seed 3 -> 4; set it back" in said
    # The plan of another stage is not taken for the run's own plan, although it is kept beside it.
    publish(data, stages={"general": {}, "late": {}})
    said = train(ranks, run, data / "plan/late", 3)["error"]
    assert "goes on after another plan" in said
    publish(data, stages={"general": {}})
    assert train(ranks, run, data / "plan/general", 3)["status"] == 0, "it begins with the same samples"
