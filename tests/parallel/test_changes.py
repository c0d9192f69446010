"""Settings that change when a run is resumed: they are reported, kept in its history and effective, or refused."""

import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import run_history
from configs.sealed import CHECKPOINT
from pretrain import inspection
from pretrain.checkpoint import storage
from tests.parallel.harness import RanksOf
from tests.parallel.matrix import MODELS
from tests.parallel.runs import metrics

SECTIONS: dict[str, dict[str, Any]] = {"schedule": {"kind": "constant", "warmup_steps": 0}}


def train(ranks: RanksOf, run_dir: Path, model: dict[str, Any], steps: int, **options: Any) -> dict[str, Any]:
    (answer,) = ranks(1).run(
        "tests.parallel.workers.training:train_and_listen",
        process_group=False,
        run_dir=str(run_dir),
        model=model,
        parallel={},
        steps=steps,
        **SECTIONS | options,
    )
    return answer


@pytest.fixture(scope="module", params=["dense", "deepseek"])
def runs(request: pytest.FixtureRequest, ranks: RanksOf, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A model's name, and a folder with a run of two steps (begun) and the same run after a third step (same)."""
    folder, model = tmp_path_factory.mktemp("runs"), MODELS[request.param]
    assert train(ranks, folder / "begun", model, 2)["status"] == 0
    shutil.copytree(folder / "begun", folder / "same")
    said = train(ranks, folder / "same", model, 3)["said"]
    assert "train.steps 2 -> 3 from step 2 on" in said and said.count(" -> ") == 1
    return request.param, folder


# (section, its changed keys, the reported line); the section `moe` is model.moe.
CHANGES: dict[str, list[tuple[str, dict[str, Any], str]]] = {
    "dense": [
        ("optimizer", {"lr": 0.1}, "optimizer.lr 0.01 -> 0.1"),
        ("optimizer", {"betas": [0.9, 0.5]}, "optimizer.betas [0.9, 0.95] -> [0.9, 0.5]"),
        ("optimizer", {"eps": 1e-2}, "optimizer.eps 1e-08 -> 0.01"),
        ("optimizer", {"weight_decay": 0.5}, "optimizer.weight_decay 0.1 -> 0.5"),
        ("optimizer", {"clip_grad": 0.01}, "optimizer.clip_grad 0.1 -> 0.01"),
        ("train", {"dropout": 0.3}, "train.dropout 0.0 -> 0.3"),
    ],
    "deepseek": [
        ("moe", {"aux_loss_coef": 5.0}, "model.moe.aux_loss_coef 0.5 -> 5.0"),
        ("moe", {"bias_update_rate": 0.5}, "model.moe.bias_update_rate 0.05 -> 0.5"),
    ],
}

# Only with `make test-full`.
MORE_CHANGES: dict[str, list[tuple[str, dict[str, Any], str]]] = {
    "dense": [
        ("optimizer", {"betas": [0.5, 0.95]}, "optimizer.betas [0.9, 0.95] -> [0.5, 0.95]"),
        ("schedule", {"kind": "cosine"}, "schedule.kind constant -> cosine"),
        ("schedule", {"kind": "cosine", "steps": 50}, "schedule.steps unset -> 50"),
        ("train", {"global_batch_size": 4}, "train.global_batch_size 8 -> 4"),
        ("train", {"precision": "bf16"}, "train.precision fp32 -> bf16"),
    ],
    "deepseek": [
        ("moe", {"z_loss_coef": 10.0}, "model.moe.z_loss_coef 0.1 -> 10.0"),
        ("moe", {"capacity_factor": 0.3}, "model.moe.capacity_factor unset -> 0.3"),
    ],
}


@pytest.mark.parametrize("changes", [CHANGES, pytest.param(MORE_CHANGES, marks=pytest.mark.full)])
def test_what_changes_is_told_and_kept_and_does_something(
    ranks: RanksOf,
    runs: tuple[str, Path],
    changes: dict[str, list[tuple[str, dict[str, Any], str]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, folder = runs
    same = storage.directory(folder / "same", 3)
    for number, (section, change, words) in enumerate(changes[name]):
        run, model, options = tmp_path / str(number), MODELS[name], {}
        shutil.copytree(folder / "begun", run)
        if section == "moe":
            model = model | {"moe": model["moe"] | change}
        else:
            options = {section: SECTIONS.get(section, {}) | change}
        answer = train(ranks, run, model, 3, **options)
        assert answer["status"] == 0, answer
        assert f"{words} from step 2 on" in answer["said"]
        path = storage.directory(run, 3)
        manifest = storage.read_manifest(path)
        changed = [not torch.equal(storage.read_full(path)[key], one) for key, one in storage.read_full(same).items()]
        assert any(changed), f"{words} did nothing"
        # The earlier settings are still in the manifest, and the change is in the history, `inspect` and the report.
        (first, second) = manifest["data_spans"]
        assert first["config"] == storage.read_manifest(storage.directory(run, 2))["config"]
        assert second["config"] == manifest["config"] and second["first_step"] == 2
        assert run_history.read(run) == manifest["data_spans"]
        assert words.replace(">", "&gt;") in (run / "report.html").read_text(encoding="utf-8")
        if not number:
            assert inspection.main([str(run)]) == 0
            assert words in capsys.readouterr().out


def test_what_cannot_change_is_refused_in_words(ranks: RanksOf, runs: tuple[str, Path]) -> None:
    name, folder = runs
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = {
        "dense": [
            (
                {"attention": {"qk_norm": "head"}, "norm": {"eps": 1e-3}},
                {},
                "model.attention.qk_norm none -> head; model.norm.eps 1e-05 -> 0.001",
            ),
            ({}, {"seed": 5, "train": {"seq_length": 48}}, "run.seed 3 -> 5; train.seq_length 24 -> 48"),
        ],
        # The checkpoint lacks the state of a new balancing, and its state of the old one would be lost.
        "deepseek": [
            ({"moe": MODELS["deepseek"]["moe"] | {"bias_update_rate": 0.0}}, {}, "bias_update_rate 0.05 -> 0.0"),
            ({"moe": MODELS["deepseek"]["moe"] | {"aux_loss": "sequence"}}, {}, "aux_loss global_batch -> sequence"),
            ({"moe": MODELS["deepseek"]["moe"] | {"top_k": 1}}, {}, "model.moe.top_k 2 -> 1"),
        ],
    }[name]
    for change, options, words in cases:
        answer = train(ranks, folder / "same", MODELS[name] | change, 4, **options)
        assert answer["kind"] == "ConfigError" and words in answer["error"], answer
        assert "set it back, or choose another run.dir" in answer["error"]


def test_a_run_of_before_a_key_was_there_goes_on(ranks: RanksOf, tmp_path: Path) -> None:
    """Resumes a run whose manifest lacks some keys that have a default, and whose data spans have no config."""
    run = tmp_path / "run"
    assert train(ranks, run, MODELS["moe"], 2)["status"] == 0
    file = storage.directory(run, 2) / "manifest.json"
    manifest = json.loads(file.read_text())
    for model in (manifest["config"]["model"], manifest["identity"]["model"]):
        for key in ("attention", "norm", "tie_embeddings"):
            del model[key]
        for key in ("gating", "renormalize", "num_shared_experts"):
            del model["moe"][key]
    del manifest["config"]["optimizer"]["weight_decay"], manifest["config"]["log"]
    manifest["data_spans"] = [{k: v for k, v in manifest["data_spans"][0].items() if k not in ("config", "facts")}]
    file.write_bytes(CHECKPOINT.write(manifest))
    answer = train(ranks, run, MODELS["moe"], 4)
    assert answer["status"] == 0 and answer["said"].count(" -> ") == 1, answer
    losses = [line["loss"] for line in metrics(run) if "loss" in line]
    shutil.rmtree(run)
    train(ranks, run, MODELS["moe"], 4)
    assert losses == [line["loss"] for line in metrics(run) if "loss" in line]


def test_a_damaged_manifest_is_passed_over(ranks: RanksOf, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(ranks, run, MODELS["deepseek"], 2, every=1)["status"] == 0
    file = storage.directory(run, 2) / "manifest.json"
    content = file.read_bytes()
    for key in ("step", "samples", "tokens", "ledger", "optimizer_steps", "balance", "seed", "offset"):
        at = content.index(f'"{key}"'.encode())
        at = next(i for i in range(at, len(content)) if content[i : i + 1].isdigit())
        file.write_bytes(content[:at] + (b"7" if content[at : at + 1] != b"7" else b"3") + content[at + 1 :])
        with pytest.raises(storage.CheckpointError, match=r"step_2/manifest\.json is damaged.*earlier checkpoint"):
            storage.verify(file.parent)
        assert storage.latest(run) == storage.directory(run, 1)
    answer = train(ranks, run, MODELS["deepseek"], 2, every=1)
    assert answer["status"] == 0 and f"going on from {storage.directory(run, 1)}" in answer["said"]
    assert f"warning: {file} is damaged" in answer["said"]
    assert storage.verify(file.parent)["step"] == 2


def test_a_checkpoint_of_other_parameters_than_its_model_has_is_for_another_version(
    ranks: RanksOf, runs: tuple[str, Path], tmp_path: Path
) -> None:
    """Resumes a checkpoint of parameters with other names or shapes, which is refused with a remedy that works."""
    name, folder = runs
    lost = "final_norm.weight" if name == "dense" else "balance"
    for number in range(2):
        run = Path(shutil.copytree(folder / "begun", tmp_path / str(number)))
        file = storage.directory(run, 2) / storage.MANIFEST
        manifest = CHECKPOINT.read(file.read_bytes(), file)
        if lost == "balance":
            lost = next(iter(manifest["balance"]))
        entries = manifest["parameters" if name == "dense" else "balance"]
        if number and name == "dense":
            entries[lost]["shape"] = [3]
        else:
            del entries[lost]
        file.write_bytes(CHECKPOINT.write(manifest))
        answer = train(ranks, run, MODELS[name], 3)
        assert answer["kind"] == "CheckpointError" and lost in answer["error"], answer
        assert "use the version that trained it, or train it again in another run.dir" in answer["error"]
        assert not number or f"{lost} is [3] in {file.parent}, and its model has [" in answer["error"]
        if name != "dense":
            break
    assert train(ranks, tmp_path / "another", MODELS[name], 1)["status"] == 0


def test_a_run_that_another_process_trains_goes_on_after_it(
    ranks: RanksOf, runs: tuple[str, Path], tmp_path: Path
) -> None:
    name, folder = runs
    run = Path(shutil.copytree(folder / "begun", tmp_path / "run"))
    with (run / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        answer = train(ranks, run, MODELS[name], 3)
        assert answer["kind"] == "ConfigError"
        assert f"is training in {run}; wait for it, stop it or choose another run.dir" in answer["error"]
    assert train(ranks, run, MODELS[name], 3)["status"] == 0
