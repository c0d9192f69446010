"""Distillation by logits has the same gradient in any layout, goes on bit by bit, and refuses what does not fit."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from configs.mixture import PlanConfig
from configs.sealed import CHECKPOINT
from configs.tokenizer import TokenizerConfig
from data_pipeline.mixture.plan_files import build_plan
from data_pipeline.mixture.rows import Plan
from data_pipeline.tokens.tokenizer_training import train as train_tokenizer
from pretrain.checkpoint import storage
from tests.parallel.harness import RanksOf
from tests.parallel.matrix import BASE
from tests.parallel.runs import metrics
from tests.published_plans import publish, without_plan
from tests.small_data import VOCAB, make_tokens
from tests.training_configs import write_training_config

LOSSES = ["forward_kl", "reverse_kl", "jsd"]
STUDENT: dict[str, Any] = {**BASE, "num_layers": 4}
# Another width, depth and number of heads, and tied embeddings; the student's are BASE's.
TEACHER: dict[str, Any] = {
    **BASE, "num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "tie_embeddings": True,
}  # fmt: skip
BOUND = 1e-5  # of the norm of a difference, relative: fp32 sums in another order

Found = tuple[dict[str, torch.Tensor], dict[str, dict[str, float]]]
Gradients = Callable[[int, dict[str, Any], int], Found]


@pytest.fixture(scope="module")
def gradients(ranks: RanksOf, tmp_path_factory: pytest.TempPathFactory) -> Gradients:
    run = tmp_path_factory.mktemp("teacher") / "run"
    ranks(1).run("tests.parallel.workers.distillation:save", process_group=False, model=TEACHER, run_dir=str(run))

    def gradients(world: int, parallel: dict[str, Any], micro: int) -> Found:
        tensors: dict[str, torch.Tensor] = {}
        values: dict[str, dict[str, float]] = {}
        # DeepSpeed adds gradients up until the optimizer's step, so each loss has an engine of its own there.
        for losses in [[loss] for loss in LOSSES] if "zero" in parallel else [LOSSES]:
            out = tmp_path_factory.mktemp("gradients")
            found = ranks(world).run(
                "tests.parallel.workers.distillation:gradients",
                process_group=False,
                model=STUDENT,
                teacher_model=TEACHER,
                teacher_run=str(run),
                parallel=parallel,
                out=str(out),
                micro=micro,
                losses=losses,
            )
            tensors |= {name: tensor for file in sorted(out.iterdir()) for name, tensor in load_file(file).items()}
            values |= found[0]
        return tensors, values

    return gradients


@pytest.fixture(scope="module")
def expected(gradients: Gradients) -> Found:
    """Gradients and logged values that one rank computes in one micro-batch, to which all layouts are held."""
    return gradients(1, {}, 8)


def assert_same(found: Found, expected: Found) -> None:
    assert found[0].keys() == expected[0].keys()
    for name, tensor in expected[0].items():
        assert float((found[0][name] - tensor).norm()) <= BOUND * float(tensor.norm()), name
    for name, values in expected[1].items():
        assert found[1][name] == pytest.approx(values, rel=1e-5)


def test_tensor_parallel_and_micro_batches(gradients: Gradients, expected: Found) -> None:
    assert_same(gradients(2, {"tp": 2}, 2), expected)
    norms = {name: float(expected[0][f"{name}/layers.0.attention.q_proj.weight"].norm()) for name in LOSSES}
    assert all(norms.values()) and len(set(norms.values())) == 3
    values = expected[1]
    assert values["forward_kl"]["teacher_nll"] == values["jsd"]["teacher_nll"] != values["jsd"]["student_nll"]
    assert 0 <= values["jsd"]["agreement"] < 1 and values["jsd"]["loss"] < values["forward_kl"]["loss"]


@pytest.mark.full
@pytest.mark.parametrize(
    ("world", "parallel", "micro"),
    [
        (1, {}, 1),
        (2, {}, 2),
        (2, {"pp": 2}, 1),
        (2, {"pp": 2, "vpp": 2}, 2),
        (2, {"tp": 2, "sp": True}, 2),
        (2, {"cp": 2}, 4),
        (2, {"zero": 3}, 2),
    ],
)
def test_other_layouts(gradients: Gradients, expected: Found, world: int, parallel: dict[str, Any], micro: int) -> None:
    assert_same(gradients(world, parallel, micro), expected)


@pytest.fixture(scope="module")
def base(ranks: RanksOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with an untrained student and teacher, and a config."""
    base = tmp_path_factory.mktemp("distillation")
    _, tokenizer = make_tokens(base)
    write_training_config(
        base / "distill.toml",
        base / "run",
        4,
        (4, 2),
        48,
        init={"run": str(base / "student")},
        teacher={"run": str(base / "teacher")},
        task={"digits": 3, "max_new_tokens": 6, "eval_prompts": 8, "demonstrations": 60},
        distill={"loss": "jsd", "on_policy": 0.5},
        optimizer={"lr": 1e-2},
        checkpoint={"every": 2, "keep": 9},
        eval={"rows": 4},
    )
    for name, model in (("student", BASE), ("teacher", TEACHER)):
        ranks(1).run(
            "tests.parallel.workers.posttraining:save_untrained",
            process_group=False,
            run_dir=str(base / name),
            model={**model, "vocab_size": VOCAB},
            tokenizer=str(tokenizer / "tokenizer.model"),
        )
    return base


def distill(ranks: RanksOf, base: Path, world: int, *overrides: str) -> dict[str, Any]:
    argv = [str(base / "distill.toml"), *overrides]
    worker = "tests.parallel.workers.posttraining:command"
    return ranks(world).run(worker, process_group=False, module="posttrain.distill", argv=argv)[0]


@pytest.fixture(scope="module")
def trained(ranks: RanksOf, base: Path) -> Path:
    """Folder of a run of four steps on two ranks, the second and the fourth on the student's own samples."""
    done = distill(ranks, base, 2)
    assert done["status"] == 0, done
    return base / "run"


def steps_of(run: Path) -> list[dict[str, Any]]:
    timed = ("tokens_per_s", "memory_bytes", "save_copy_s", "mfu")
    return [{k: v for k, v in line.items() if k not in timed} for line in metrics(run) if "loss" in line]


def test_a_killed_run_goes_on_bit_by_bit(ranks: RanksOf, base: Path, trained: Path, tmp_path: Path) -> None:
    """Makes the state after a kill between two checkpoints, of which the newest is that of the second step."""
    run = shutil.copytree(trained, tmp_path / "killed")
    shutil.rmtree(storage.directory(run, 4))
    assert distill(ranks, base, 2, f"run.dir={run}")["status"] == 0
    assert steps_of(run) == steps_of(trained)
    weights = [storage.read_full(storage.directory(one, 4)) for one in (run, trained)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    steps = steps_of(run)
    assert [len(line["loss_by_source"]) for line in steps] == [1, 1, 1, 1]
    assert [list(line["loss_by_source"]) for line in steps[:2]] == [["sort"], ["own samples"]]
    held_out = metrics(run)[-1]["eval"]["sort against the teacher"]
    assert 0 < held_out["divergence"] < 1 and set(held_out) >= {"agreement", "student_nll", "teacher_nll"}


@pytest.mark.full
@pytest.mark.parametrize(("world", "parallel"), [(1, "tp=1"), (2, "tp=2"), (2, "pp=2"), (2, "zero=3")])
def test_a_run_is_the_same_in_any_layout(
    ranks: RanksOf, base: Path, trained: Path, tmp_path: Path, world: int, parallel: str
) -> None:
    assert distill(ranks, base, world, f"run.dir={tmp_path}", f"parallel.{parallel}")["status"] == 0
    losses = [[line["loss"] for line in steps_of(run)] for run in (tmp_path, trained)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_run_on_a_plan_goes_on_once_the_plan_has_grown_or_was_replaced(
    ranks: RanksOf, base: Path, tmp_path: Path
) -> None:
    data = without_plan(base, tmp_path / "data")
    first = publish(data)
    rows = [f"data.plan={data / 'plan'}", "train.seq_length=32", "task=none", "distill.on_policy=0.0"]

    def run(name: str, steps: int) -> dict[str, Any]:
        return distill(ranks, base, 1, *rows, f"run.dir={tmp_path / name}", f"train.steps={steps}")

    assert run("grown", 2)["status"] == run("kept", 2)["status"] == 0
    said = run("grown", 5)["error"]
    assert "needs 8 samples more than" in said and "raise mixture.samples" in said
    longer = publish(data, samples=12 + 8)
    assert "goes on with the new one" in run("grown", 5)["said"]
    assert run("straight", 5)["status"] == 0
    assert steps_of(tmp_path / "grown") == steps_of(tmp_path / "straight")
    mixture = PlanConfig(seq_length=32, samples=8, weights={"code": 1.0})
    build_plan(data / "tokens", data / "tokenizer", tmp_path / "rest", mixture, after=(Plan.open(data / "plan"), 4))
    new = [*rows, f"run.dir={tmp_path / 'new'}", "--dry-run"]
    said = distill(ranks, base, 1, *new, f"data.plan={tmp_path / 'rest'}")["error"]
    assert said.endswith(
        "continues another plan after its first 4 samples; name a plan that begins at the first sample"
    )
    assert distill(ranks, base, 1, *new)["status"] == 0
    publish(data, weights={"code": 0.9, "prose": 0.1})
    kept = run("kept", 3)
    assert kept["status"] == 0 and "weights.code 0.6 -> 0.9" in kept["said"]
    assert steps_of(tmp_path / "kept") == steps_of(tmp_path / "straight")[:3]
    found = [
        storage.read_manifest(storage.directory(tmp_path / name, step)) for name, step in (("kept", 3), ("grown", 5))
    ]
    assert [one["source"]["data_plan"] for one in found] == [first, longer]


def test_a_run_keeps_the_teacher_that_it_began_with(ranks: RanksOf, base: Path, tmp_path: Path) -> None:
    """A teacher that has trained further, was moved, or is gone: a run that goes on needs the one it has had."""
    teacher = shutil.copytree(base / "teacher", tmp_path / "teacher")

    def run(where: Path, steps: int, name: str = "run", data: str = "eval.every=1000") -> dict[str, Any]:
        own = [f"run.dir={tmp_path / name}", f"teacher.run={where}", f"train.steps={steps}", "distill.on_policy=0.0"]
        return distill(ranks, base, 1, *own, data)

    assert run(teacher, 1)["status"] == run(base / "teacher", 3, "straight")["status"] == 0
    manifest = storage.read_manifest(storage.directory(teacher, 1))
    newer = shutil.copytree(storage.directory(teacher, 1), storage.directory(teacher, 2))
    (newer / storage.MANIFEST).write_bytes(CHECKPOINT.write({**manifest, "step": 2}))
    said = run(teacher, 2)
    assert (
        said["status"] == 0 and f"began with the teacher {storage.directory(teacher, 1)} and keeps it" in said["said"]
    )
    moved = teacher.rename(tmp_path / "moved")
    assert run(moved, 3)["status"] == 0
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "straight")
    assert "section data is" not in (said := run(moved, 4, data="task.demonstrations=61")["error"])
    assert "task.demonstrations 60 -> 61; its data differ: " in said
    shutil.rmtree(storage.directory(moved, 1))
    said = run(moved, 4)["error"]
    assert "step_1 when the run began, and that is gone or was replaced; restore it, or choose another run.dir" in said
    assert "teacher.run " in run(base / "student", 4)["error"], "another one is told by its key"


def test_what_does_not_fit_is_refused_before_the_first_step(ranks: RanksOf, base: Path, tmp_path: Path) -> None:
    other = TokenizerConfig(vocab_size=VOCAB - 30)
    train_tokenizer([base / "train.prose.jsonl.zst"], tmp_path / "tokenizer", other)
    ranks(1).run(
        "tests.parallel.workers.posttraining:save_untrained",
        process_group=False,
        run_dir=str(tmp_path / "other"),
        model={**BASE, "vocab_size": VOCAB},
        tokenizer=str(tmp_path / "tokenizer/tokenizer.model"),
    )
    none = f"run.dir={tmp_path}/none"
    sizes = f"the first has {VOCAB - 30} tokens and the second {VOCAB}, so their tokens cannot be compared"
    for overrides, words in (
        (
            [f"teacher.run={tmp_path}/other"],
            (sizes, "`trivium sample`", "trivium sft"),
        ),
        (["teacher.run=nowhere"], ("teacher.run = 'nowhere'",)),
    ):
        refused = distill(ranks, base, 1, none, *overrides)
        assert refused["status"] == 2 and all(word in refused["error"] for word in words), refused
    assert not (tmp_path / "none").exists()
