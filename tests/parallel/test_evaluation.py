"""`trivium eval` of a trained run: its held-out numbers are those of training, and its baselines stand beside them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from configs.files import file_sha256
from configs.loader import ConfigError, validate
from configs.mixture import PlanConfig
from data_pipeline.core.integrity import STAGE_MANIFEST
from data_pipeline.mixture.plan_files import build_plan
from data_pipeline.mixture.rows import Plan
from data_pipeline.report.baselines_file import FILE
from export import evaluate
from export.model_source import open_source
from pretrain.model import build_single
from tests.parallel.forks import Forks
from tests.small_training import write_config

ROWS = 4  # of each source, as in the config


@pytest.fixture(scope="module")
def folder(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a data plan over tokens, and `run`, which was trained on it for two steps."""
    folder = tmp_path_factory.mktemp("evaluated")
    config = write_config(folder, steps=2, run_dir=folder / "run", rows=40)
    log = folder / "log"
    assert forks.start("pretrain.train:main", log, argv=[str(config)]).wait() == 0, log.read_text()
    return folder


def evaluated(folder: Path, *argv: str) -> dict[str, Any]:
    """Runs the command and returns what it wrote."""
    out = folder / "out.json"
    assert evaluate.main([str(folder / "run"), "--out", str(out), *argv]) == 0
    return json.loads(out.read_text())


def test_held_out_numbers_are_those_of_training(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    trained = lines[-1]["eval"]
    found = evaluated(folder, "--rows", str(ROWS), "--batch-tokens", "70")["held_out"]["sources"]
    assert found.keys() == trained.keys() == {"code", "prose"}
    for source, values in trained.items():
        for measure, value in values.items():
            assert found[source][measure] == pytest.approx(value, rel=1e-5)
    table = capsys.readouterr().out
    assert f"{trained['code']['bits_per_byte']:.4f}" in table and "xz -9" not in table


def test_languages_are_told_apart_within_rows(folder: Path) -> None:
    """Compares with losses computed document by document from all logits, and added up by each one's language."""
    found = evaluated(folder)
    run, plan = open_source(folder / "run"), Plan.open(folder / "plan")
    decoder = build_single(run.model, run.read())
    wanted: dict[tuple[str, str], np.ndarray] = {}
    for source in plan.sources:
        for i in range(plan.heldout_rows(source)):
            row, begun = plan.heldout_row(source, i), plan.heldout_segments(source, i)
            for segment, (language, begins) in enumerate(begun):
                at = row.segments == segment
                tokens, labels, mask = (torch.from_numpy(x[at]) for x in (row.tokens, row.labels, row.loss_mask))
                with torch.inference_mode():
                    logits = decoder(tokens[None], torch.arange(len(tokens))[None])[0]
                loss = F.cross_entropy(logits[mask].double(), labels[mask], reduction="sum").item()
                size = int(plan.token_bytes[labels[mask].numpy()].sum())
                key = (source, language or "unknown")
                wanted[key] = wanted.get(key, np.zeros(4)) + np.array([loss, int(mask.sum()), size, begins])
    assert set(wanted) == {("code", "unknown"), ("prose", "zh"), ("prose", "en")}
    sources = found["held_out"]["sources"]
    for (source, language), (loss, tokens, size, documents) in wanted.items():
        values = sources[source]["languages"][language]
        assert (values["tokens"], values["bytes"], values["documents"]) == (tokens, size, documents)
        assert values["loss"] == pytest.approx(loss / tokens, rel=1e-5)
        assert values["bits_per_byte"] == pytest.approx(loss / np.log(2) / size, rel=1e-5)
        assert values["perplexity"] == pytest.approx(np.exp(loss / tokens), rel=1e-4)
    assert [sources[name]["documents"] for name in ("code", "prose")] == [3, 3], "each document counts once"
    everything = sum(wanted.values())
    assert found["held_out"]["all"]["loss"] == pytest.approx(everything[0] / everything[1], rel=1e-5)
    assert found["held_out"]["languages"].keys() == {"unknown", "zh", "en"}
    assert found["model"]["step"] == 2 and "tasks" not in found


def test_baselines_stand_beside_the_sources_while_they_are_current(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = folder / "tokens" / STAGE_MANIFEST
    manifest.write_text("{}")
    kept = {"made_from": file_sha256(manifest), "sources": {"code": {"bytes": 9, "xz": 1.25, "ngram": 2.5}}}
    (folder / FILE).write_text(json.dumps(kept))
    found = evaluated(folder, "--rows", "1")
    assert found["held_out"]["sources"]["code"]["baselines"] == {"ngram": 2.5, "xz": 1.25}
    assert "5-gram" in capsys.readouterr().out
    manifest.write_text('{"tokens": "others"}')
    assert "baselines" not in evaluated(folder, "--rows", "1")["held_out"]["sources"]["code"]


def test_results_are_kept_in_the_run_unless_told_otherwise(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(folder / "run"), "--dry-run", "--rows", "2"]) == 0
    printed = capsys.readouterr().out
    assert "held-out rows of 32 tokens: code 2, prose 2" in printed and "parameters, context 32 tokens" in printed
    assert not (folder / "run/eval").exists()
    assert evaluate.main([str(folder / "run/checkpoints/step_2"), "--rows", "1"]) == 0
    assert json.loads((folder / "run/eval/step_2.json").read_text())["held_out"]["rows"] == {"code": 1, "prose": 1}


def test_damaged_held_out_tokens_are_told(folder: Path) -> None:
    store = folder / "tokens/heldout/code/00000.bin"
    content = store.read_bytes()
    store.write_bytes(content[:20] + b"\xff\xff" + content[22:])
    try:
        with pytest.raises(ConfigError, match=r"source code, shard .*00000\.bin.* does not match its checksum"):
            evaluate.main([str(folder / "run"), "--out", str(folder / "none.json")])
    finally:
        store.write_bytes(content)
    assert not (folder / "none.json").exists()


def test_several_ranks_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="runs in one process, and 2 ranks were started; start it without a launcher"):
        evaluate.main([str(folder / "run")])


def test_mistakes_are_told_in_a_sentence(folder: Path) -> None:
    run = str(folder / "run")
    for argv, message in (
        (["--rows", "-1"], r"--rows -1 is less than 0; give 0 or more"),
        (
            ["--rows", "0"],
            r"--rows 0 measures no held-out text, and there are no --tasks; leave it out, or",
        ),
        (["--limit", "0"], r"--limit 0 is less than 1"),
        (["--plan", str(folder)], r"there is no plan at .*plan\.json"),
        (["--step", "7"], r"step = 7 has no checkpoint .*saved steps are \[2\]"),
        (["--out", "/proc/none/out.json"], r"--out = '/proc/none/out\.json'"),
        (["--out", f"{folder}/out.json", "--samples", "/proc/none/s"], r"--samples = '/proc/none/s'"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate.main([run, *argv])
    (folder / "elsewhere").mkdir()
    (folder / "plan").rename(folder / "elsewhere/plan")
    try:
        with pytest.raises(ConfigError, match=r"has no held-out text: its data plan is no longer at .*plan; name a"):
            evaluate.main([run])
    finally:
        (folder / "elsewhere/plan").rename(folder / "plan")
    assert evaluated(folder, "--plan", str(folder / "plan"), "--rows", "1")["held_out"]["rows"]["code"] == 1


@pytest.mark.parametrize(
    ("part", "settings", "words"),
    [
        ("", {"seq_length": 64}, "have 64 tokens, and the model's context has 32; name a plan with shorter rows by"),
        (
            "heldout",
            {"seq_length": 32},
            "has no held-out documents; name another plan by --plan, or give",
        ),
    ],
)
def test_another_plan_is_measured_once_it_is_one_that_the_message_asks_for(
    folder: Path, tmp_path: Path, part: str, settings: dict[str, Any], words: str
) -> None:
    """Follows what the message says; with tasks and no plan the next refusal is about the chat template."""
    tokens = Path(shutil.copytree(folder / "tokens", tmp_path / "tokens"))
    if part:
        shutil.rmtree(tokens / part)
    config = validate(PlanConfig, {"samples": 4, "weights": {"code": 1.0}, **settings})
    build_plan(tokens, folder / "tokenizer", tmp_path / "plan", config)
    plan = ["--plan", str(tmp_path / "plan")]
    for tasks, remedy in ((["--tasks", "x"], "--rows 0 for none"), ([], "--tasks and --rows 0 for none")):
        with pytest.raises(ConfigError, match=words) as told:
            evaluate.main([str(folder / "run"), *plan, *tasks])
        assert str(told.value).endswith(f", or give {remedy}")
    assert evaluate.main([str(folder / "run"), "--dry-run", "--plan", str(folder / "plan")]) == 0
    with pytest.raises(ConfigError, match="has no chat template; leave out --chat"):
        evaluate.main([str(folder / "run"), *plan, "--rows", "0", "--tasks", "x", "--chat"])
