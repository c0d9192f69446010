"""Damaged training data stops a run on all ranks, whichever of them finds it, before or while it trains."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.loader import toml
from configs.mixture import PlanConfig
from data_pipeline.core import integrity
from data_pipeline.mixture.plan_files import build_plan
from data_pipeline.mixture.rows import Plan
from data_pipeline.tokens.store import Store
from export.heldout_passages import check_heldout, heldout_passages
from pretrain import train as train_command
from pretrain.checkpoint import storage
from tests.parallel.harness import RanksOf
from tests.parallel.matrix import MODELS
from tests.parallel.runs import metrics
from tests.small_data import VOCAB, make_tokens
from tests.training_configs import training_config

SEQ_LENGTH = 32


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokens, tokenizer and plan."""
    folder = tmp_path_factory.mktemp("data")
    tokens, tokenizer = make_tokens(folder)
    plan = PlanConfig(seq_length=SEQ_LENGTH, samples=400, seed=1, temperature=1.0)
    build_plan(tokens, tokenizer, folder / "plan", plan)
    return folder


@pytest.fixture
def data(sound: Path, tmp_path: Path) -> Path:
    """A copy of the sound data, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "data"))


def config(run_dir: Path, plan: Path) -> dict[str, Any]:
    return training_config(
        run_dir,
        6,
        (4, 2),
        SEQ_LENGTH,
        model={**MODELS["dense"], "vocab_size": VOCAB},
        data={"plan": str(plan)},
        optimizer={"lr": 0.001},
        checkpoint={"every": 6},
    )


def train(ranks: RanksOf, world: int, run_dir: Path, plan: Path, first_bytes: int, **more: Any) -> list[dict[str, Any]]:
    tree = config(run_dir, plan)
    function = "tests.parallel.workers.plans:train_and_listen"
    return ranks(world).run(function, process_group=False, tree=tree, first_bytes=first_bytes, **more)


@pytest.mark.parametrize(
    ("name", "first_bytes"),
    [("train/code/00000.bin", 10**6), ("heldout/prose/00000.bin", 0), ("train/prose/00000.parquet", 10**6)],
)
def test_one_changed_token_stops_all_ranks(
    ranks: RanksOf, data: Path, tmp_path: Path, name: str, first_bytes: int
) -> None:
    path = data / "tokens" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    first, second = train(ranks, 2, tmp_path / "run", data / "plan", first_bytes)
    assert first["status"] == second["status"] == 1
    source = name.split("/")[1]
    assert f"source {source}, shard {name.split('.')[0]}: the file {path.name}" in first["said"]
    assert "does not match its checksum" in first["said"] and second["said"] == ""
    if first_bytes:
        assert not (tmp_path / "run").exists(), "no step is trained on it, and nothing is written"


def test_a_dry_run_tells_of_damage_and_of_what_it_did_not_compare(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "train.toml"
    file.write_bytes(toml(config(tmp_path / "run", data / "plan")))
    path = data / "tokens/train/code/00000.bin"
    sound = path.read_bytes()

    def dry_run(status: int) -> str:
        assert train_command.main([str(file), "--dry-run"]) == status
        return "".join(capsys.readouterr())

    assert "note" not in dry_run(0)
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    told = dry_run(1)
    assert "source code, shard train/code/00000: the file 00000.bin" in told and "not match its checksum" in told
    monkeypatch.setattr(integrity, "FIRST_BYTES", 1000)
    assert "were not compared with their checksums" in dry_run(0)
    path.write_bytes(sound[:-2])
    assert f"token store {path} ha" in dry_run(1)
    assert not (tmp_path / "run").exists()


def test_damage_found_late_is_told_from_the_last_checked_step_on(ranks: RanksOf, data: Path, tmp_path: Path) -> None:
    """Stops a run before its check is done, after it has trained on damaged data, which the next start reports."""
    path = data / "tokens/train/code/00000.bin"
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for run in ("stopped", "checked"):
        if run == "checked":
            path.write_bytes(content)
        answers = train(ranks, 2, tmp_path / run, data / "plan", 0, stopped="third step" if run == "stopped" else "")
        assert [answer["status"] for answer in answers] == ([75, 75] if run == "stopped" else [0, 0])
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said = train(ranks, 2, tmp_path / "stopped", data / "plan", 10**6)[0]["said"]
    assert (
        "does not match its checksum" in said
        and "checkpoints after step 0 may have been trained on damaged data" in said
    )
    manifest = storage.read_manifest(storage.directory(tmp_path / "checked", 6))
    assert manifest["unchecked_from"] == 6, "all of its training data was checked"


def test_a_signal_ends_the_last_wait_and_the_next_start_does_the_check_alone(
    ranks: RanksOf, data: Path, tmp_path: Path
) -> None:
    """Stops a run that waits for its check at the end, again and again; damage is reported all the same."""
    run, path = tmp_path / "run", data / "tokens/train/code/00000.bin"
    checkpoint = storage.directory(run, 6)
    for start in ("trains", "checks"):
        first, second = train(ranks, 2, run, data / "plan", 0, stopped="last step")
        assert (first["status"], second["status"], second["said"]) == (75, 75, "")
        assert "stopped by SIGTERM at step 6; the same command checks the training data against" in first["said"]
        assert ("was not checked to the end" in first["said"]) == (start == "checks")
        assert storage.verify(checkpoint)["unchecked_from"] == 0
    lines, sound = metrics(run), path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    for first_bytes in (0, 10**6):
        answers = train(ranks, 2, run, data / "plan", first_bytes)
        assert [answer["status"] for answer in answers] == [1, 1]
        assert "error: source code, shard train/code/00000: the file 00000.bin" in answers[0]["said"]
        assert "checkpoints after step 0 may have been trained on damaged data" in answers[0]["said"]
    path.write_bytes(sound)
    for said in ("the training data matches its checksums", "nothing to do"):
        answers = train(ranks, 2, run, data / "plan", 0)
        assert [answer["status"] for answer in answers] == [0, 0] and said in answers[0]["said"]
    assert metrics(run) == lines, "nothing was trained again"


@pytest.mark.parametrize("tp", [1, 2])
def test_damage_in_a_heldout_part_is_told_once(ranks: RanksOf, data: Path, tmp_path: Path, tp: int) -> None:
    """Damages held-out data: all ranks end, be they replicas of the model or its parts, and nothing is trained."""
    with (data / "tokens/heldout/prose/00000.bin").open("r+b") as file:
        file.write(np.array([VOCAB], "<u2").tobytes())
    (tmp_path / "train.toml").write_bytes(toml(config(tmp_path / "run", data / "plan") | {"eval": {"rows": 4}}))
    args = [str(tmp_path / "train.toml"), f"parallel.tp={tp}"]
    answers = ranks(2).run("tests.parallel.workers.plans:train_command", process_group=False, args=args)
    assert [answer["status"] for answer in answers] == [1, 1]
    told = r"source prose, shard .*heldout/prose/00000, document 0: token 0 is the id 511, and the vocabulary has 511"
    said = "".join(answer["said"] for answer in answers)
    assert len(re.findall(told, said)) == said.count("error:") == 1, said
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_sound_data_is_trained_on_while_it_is_read(ranks: RanksOf, sound: Path, tmp_path: Path) -> None:
    answers = train(ranks, 2, tmp_path / "run", sound / "plan", 0)
    assert [answer["status"] for answer in answers] == [0, 0]
    assert len([line for line in metrics(tmp_path / "run") if "loss" in line]) == 6


def test_an_id_beyond_the_vocabulary_names_source_shard_and_document(data: Path) -> None:
    store = Store(data / "tokens/train/code/00000")
    rows = 3 * int(store.lengths.sum()) // SEQ_LENGTH  # so many that every document is in one of them
    whole = PlanConfig(seq_length=SEQ_LENGTH, samples=rows, seed=1, temperature=1.0)
    build_plan(data / "tokens", data / "tokenizer", data / "whole", whole)
    index = int(store.lengths[:7].sum()) + 3
    with store.file(".bin").open("r+b") as file:
        file.seek(2 * index)
        file.write(np.array([VOCAB], "<u2").tobytes())
    plan = Plan.open(data / "whole")
    message = r"source code, shard .*train/code/00000, document 7: token 3 is the id 511, and the vocabulary has 511"
    with pytest.raises(ValueError, match=message):
        for i in range(plan.num_samples):
            plan.row(i)


def test_damaged_heldout_text_is_not_measured(data: Path) -> None:
    """Checks the held-out text that evaluation and export read, and not the rest of the plan's files."""
    for name, word in (("train/code", ""), ("heldout/prose", r"source prose, shard heldout/prose/00000: the file")):
        path = data / f"tokens/{name}/00000.bin"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        if not word:
            check_heldout(Plan.open(data / "plan"))
            continue
        with pytest.raises(integrity.DamagedData, match=f"{word} .* does not match its checksum"):
            heldout_passages(data / "plan", 2, 16, data / "tokenizer")
