"""`trivium sft` by its command, with text of pretraining between the dialogues: the same at any layout, and resumed."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.mixture import PlanConfig
from data_pipeline.mixture.plan_files import build_plan
from pretrain.checkpoint import storage
from tests.parallel.harness import RanksOf
from tests.parallel.runs import metrics
from tests.small_data import VOCAB, make_tokens
from tests.training_configs import write_training_config

MODEL = {
    "vocab_size": VOCAB,
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
}
ROW = 64  # tokens


@pytest.fixture(scope="module")
def base(ranks: RanksOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a plan of text, an untrained model, dialogues, and a config."""
    base = tmp_path_factory.mktemp("fine_tuning")
    tokens, tokenizer = make_tokens(base)
    settings = PlanConfig(seq_length=ROW, samples=20, seed=1, weights={"prose": 1.0, "code": 1.0}, max_epochs=99)
    build_plan(tokens, tokenizer, base / "plan", settings)
    ranks(1).run(
        "tests.parallel.workers.posttraining:save_untrained",
        process_group=False,
        run_dir=str(base / "init"),
        model=MODEL,
        tokenizer=str(tokenizer / "tokenizer.model"),
    )
    turns = [[f"how are you {i}?", "I am fine" + "!" * (i % 7)] for i in range(60)]
    lines = [json.dumps({"prompt": user, "completion": answer}) for user, answer in turns]
    (base / "dialogues.jsonl").write_text("\n".join(lines))
    write_training_config(
        base / "sft.toml",
        base / "run",
        4,
        (8, 4),
        ROW,
        run={"seed": 5},
        init={"run": str(base / "init"), "tokenizer": str(tokenizer)},
        data={
            "dialogues": [str(base / "dialogues.jsonl")],
            "text_plan": str(base / "plan"),
            "text_weight": 0.5,
            "heldout_share": 0.2,
        },
        optimizer={"lr": 0.001, "eps": 1e-5},
        eval={"every": 1000, "rows": 4},
    )
    return base


def sft(ranks: RanksOf, base: Path, name: str, *overrides: str, world: int = 1) -> dict[str, Any]:
    argv = [str(base / "sft.toml"), f"run.dir={base / name}", *overrides]
    worker = "tests.parallel.workers.posttraining:command"
    answers = ranks(world).run(worker, process_group=False, timeout=300, module="posttrain.sft", argv=argv)
    return dict(answers[0])


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(run) if "loss" in line]


def test_text_has_its_share_at_any_layout_and_after_an_interruption(ranks: RanksOf, base: Path) -> None:
    assert sft(ranks, base, "one")["status"] == 0
    pipeline = ("parallel.pp=2", "train.micro_batch_size=1")
    for steps in (1, 4):
        assert sft(ranks, base, "two", *pipeline, f"train.steps={steps}", world=2)["status"] == 0
    one, two = steps_of(base / "one"), steps_of(base / "two")
    assert len(one) == len(two) == 4
    for line, other in zip(one, two, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert line["loss_by_source"] == pytest.approx(other["loss_by_source"], rel=1e-5)
    assert {name for line in one for name in line["loss_by_source"]} == {"dialogues", "text prose", "text code"}
    ledgers = [storage.read_manifest(storage.directory(base / name, 4))["ledger"] for name in ("one", "two")]
    assert ledgers[0] == ledgers[1]
    text = ledgers[0]["text prose"] + ledgers[0]["text code"]
    assert 0.7 * 16 * ROW < text <= 16 * ROW  # half of 32 rows, and most of their tokens
    assert 0 < ledgers[0]["dialogues"] < 16 * ROW
    heldout = metrics(base / "one")[-1]["eval"]
    assert {"dialogues", "text prose", "text code"} <= set(heldout)
    assert "<h2>What is trained</h2>" in (base / "one/report.html").read_text()


def test_text_that_does_not_fit_is_refused(ranks: RanksOf, base: Path) -> None:
    refused = sft(ranks, base, "refused", "train.seq_length=32")
    assert refused["status"] == 2
    assert "data.text_plan has rows of 64 tokens, and train.seq_length = 32; make a plan with" in refused["error"]
    gone = sft(ranks, base, "refused", "data.text_plan=gone")
    assert gone["status"] == 2 and gone["error"].startswith("data.text_plan = 'gone': there is no plan at ")
    assert gone["error"].endswith("make it with `trivium data run`, or correct the path")
