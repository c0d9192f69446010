"""Every layout of a matrix resumes checkpoints of every other; and the checkpoint that a run starts from."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint import storage
from tests.parallel.harness import Ranks, RanksOf
from tests.parallel.matrix import MODELS, MORE_RESUMES, RESUMES, model_of, world_of
from tests.parallel.runs import assert_same_state, metrics, train
from tests.parallel.workers.layouts import GLOBAL_BATCH

STEP = 2  # number of steps in the checkpoints that the matrix restores

Saved = Callable[..., Path]


@pytest.fixture(scope="module")
def saved(ranks: RanksOf, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Runner of (model, layout), which trains each once for STEP + 1 steps, with a checkpoint of STEP.

    A third argument is the layout that restores it, for which the model must have layers enough.
    """
    done: dict[tuple[str, str, int], Path] = {}

    def saved(model: str, layout: str, restores: str = "one") -> Path:
        layers = model_of(model, layout, restores)["num_layers"]
        key = model, layout, layers
        if key not in done:
            world, parallel = world_of(layout)
            run_dir = tmp_path_factory.mktemp(f"{model}_{layout}")
            answers = train(ranks(world), run_dir, model, parallel, layers=layers, steps=STEP + 1)
            assert answers == [{"status": 0}] * world
            done[key] = run_dir
        return done[key]

    return saved


@pytest.mark.parametrize(
    ("model", "saves", "restores"),
    [*RESUMES, *(pytest.param(*names, marks=pytest.mark.full) for names in MORE_RESUMES)],
)
def test_any_layout_resumes_any_layout(
    ranks: RanksOf, saved: Saved, tmp_path: Path, model: str, saves: str, restores: str
) -> None:
    run = saved(model, saves, restores)
    checkpoint, (world, parallel) = storage.directory(run, STEP), world_of(restores)
    answers = ranks(world).run(
        "tests.parallel.workers.training:go_on",
        process_group=False,
        checkpoint=str(checkpoint),
        run_dir=str(tmp_path / "run"),
        out=str(tmp_path / "restored"),
        model=model_of(model, saves, restores),
        parallel=parallel,
    )
    restored = storage.directory(tmp_path / "restored", STEP)
    assert_same_state(checkpoint, restored)
    for key in ("optimizer_steps", "step"):
        assert storage.read_manifest(restored)[key] == STEP
    samples = sorted({sample for answer in answers for sample in answer["samples"]})
    assert samples == list(range(STEP * GLOBAL_BATCH, (STEP + 1) * GLOBAL_BATCH))
    assert [answer["status"] for answer in answers] == [0] * world
    # The bound on losses in test_layouts: fp32 sums in another order.
    expected, found = ({line["step"]: line["loss"] for line in metrics(r) if "loss" in line}
                       for r in (run, tmp_path / "run"))  # fmt: skip
    assert found == pytest.approx({STEP + 1: expected[STEP + 1]}, rel=2e-6)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        *(("moe_tied", layout) for layout in ("one", "tp2sp", "pp2_uneven", "pp2vpp2", "tp2pp2", "zero3")),
        *(("deepseek", layout) for layout in ("ep2pp2", "tp2sp_ep2")),
        ("two_kv_heads", "tp4"),
    ],
)
def test_gathered_weights_are_the_checkpoints(ranks: RanksOf, saved: Saved, model: str, layout: str) -> None:
    world, parallel = world_of(layout)
    saves = {"moe_tied": "zero1", "deepseek": "ep2", "two_kv_heads": "tp4"}[model]
    checkpoint = storage.directory(saved(model, saves, layout), STEP)
    options = {"model": model_of(model, saves, layout), "parallel": parallel, "checkpoint": str(checkpoint)}
    assert (
        ranks(world).run("tests.parallel.workers.training:gathered", process_group=False, **options) == [True] * world
    )


@pytest.fixture
def run(saved: Saved, tmp_path: Path) -> Path:
    """A finished run of STEP + 1 steps on one rank, which the test may change."""
    shutil.copytree(saved("dense", "one"), tmp_path / "run")
    return tmp_path / "run"


def contents(run_dir: Path) -> dict[str, bytes]:
    """Returns the content of every file of a run, which a refused start must not change."""
    files = (path for path in run_dir.rglob("*") if path.is_file())
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in files}


def refusal(ranks: Ranks, run_dir: Path, resume: str, steps: int = STEP + 2) -> str:
    """Returns the message of a refused start, and asserts that it has changed no file."""
    before = contents(run_dir)
    answers = train(ranks, run_dir, "dense", {}, steps=steps, resume=resume)
    assert {answer["kind"] for answer in answers} == {"ConfigError"}, answers
    assert len({answer["error"] for answer in answers}) == 1, "every rank says the same"
    assert {k: v for k, v in contents(run_dir).items() if k != ".lock"} == {
        k: v for k, v in before.items() if k != ".lock"
    }
    return str(answers[0]["error"])


def test_resume_no_refuses_a_run_with_checkpoints(ranks: RanksOf, run: Path, tmp_path: Path) -> None:
    words = refusal(ranks(2), run, "no")
    assert "the newest of step 3" in words and "another run.dir" in words
    assert train(ranks(1), tmp_path / "new", "dense", {}, steps=2, resume="no") == [{"status": 0}]


def test_resume_from_a_path_starts_a_branch_that_goes_on_by_the_same_command(
    ranks: RanksOf, run: Path, tmp_path: Path
) -> None:
    branch, checkpoint = tmp_path / "branch", storage.directory(run, STEP)
    command = {"resume": str(checkpoint), "steps": STEP + 3, "every": 1}
    (answer,) = train(ranks(1), branch, "dense", {}, fail_at=STEP + 2, **command)
    assert answer["error"] == "the node went away" and storage.steps(branch) == [STEP + 1, STEP + 2]
    shutil.rmtree(checkpoint)  # as if its run had deleted it since: the new run does not need it any more
    assert train(ranks(1), branch, "dense", {}, **command) == [{"status": 0}]
    losses = {line["step"]: line["loss"] for line in metrics(branch) if "loss" in line}
    assert list(losses) == [STEP + 1, STEP + 2, STEP + 3]
    # The schedules differ in length, but a step's loss is computed with the weights before that step.
    assert losses[STEP + 1] == {line["step"]: line["loss"] for line in metrics(run) if "loss" in line}[STEP + 1]


def test_resume_from_a_path_overwrites_nothing(ranks: RanksOf, run: Path, tmp_path: Path) -> None:
    words = refusal(ranks(1), run, str(storage.directory(run, STEP)))
    assert "do not come from it" in words and "step_3" in words and "another run.dir" in words
    newest = str(storage.directory(run, STEP + 1))  # the run's own newest checkpoint, which `auto` takes too
    assert train(ranks(1), run, "dense", {}, steps=STEP + 2, resume=newest) == [{"status": 0}]


def test_each_rank_reads_its_share_of_a_checkpoint(ranks: RanksOf, tmp_path: Path) -> None:
    def choose(world: int, resume: str = "auto") -> list[dict[str, Any]]:
        return ranks(world).run(
            "tests.parallel.workers.training:chosen",
            process_group=False,
            run_dir=str(tmp_path),
            model=MODELS["dense"],
            resume=resume,
        )

    train(ranks(2), tmp_path, "dense", {}, steps=4)
    old, new = (storage.directory(tmp_path, step) for step in (2, 4))
    files = [storage.rank_file(rank) for rank in range(2)]
    for world in (1, 2, 3):  # with three ranks one has no file
        answers = choose(world)
        assert [answer["path"] for answer in answers] == [str(new)] * world
        assert sorted(name for answer in answers for name in answer["read"]) == [f"step_4/{file}" for file in files]
        assert max(len(answer["read"]) for answer in answers) == -(-2 // world)
    for file in files:  # whichever rank reads it, all hear of it
        content = (new / file).read_bytes()
        (new / file).write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
        assert [answer["path"] for answer in choose(2)] == [str(old)] * 2
        for answer in choose(2, str(new)):
            assert answer["error"].startswith(f"--resume {new}: {new / file} does not match its SHA-256")
        (new / file).write_bytes(content)


def test_a_wrong_path_is_named(ranks: RanksOf, run: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    assert "must: there is no such checkpoint; give auto, no, or a path" in refusal(ranks(2), new, "must")
    assert f"is a run, not a checkpoint; name one of its checkpoints, e.g. {run}" in refusal(ranks(2), new, str(run))
    checkpoint = storage.directory(run, STEP)
    next(checkpoint.glob("*.safetensors")).unlink()
    assert "rank_00000.safetensors is missing" in refusal(ranks(2), new, str(checkpoint))
    (checkpoint / "manifest.json").write_text("{}")
    assert "has format None" in refusal(ranks(2), new, str(checkpoint))


def test_another_models_checkpoint_by_path_is_refused(ranks: RanksOf, saved: Saved, tmp_path: Path) -> None:
    words = refusal(ranks(1), tmp_path, str(storage.directory(saved("moe_tied", "zero1"), STEP)))
    assert "model.tie_embeddings true -> false" in words and "model.moe.num_experts 4 -> unset" in words
