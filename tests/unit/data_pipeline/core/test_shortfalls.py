"""Tests that data runs that lack documents or tokens warn early, continue where they can, and never extract twice."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from configs.loader import ConfigError
from data_pipeline import command
from data_pipeline.mixture.rows import Plan
from data_pipeline.report import ledger_tables as report
from export.heldout_passages import heldout_passages
from pretrain.heldout_loss import HeldoutLoss
from tests.small_sources import text, write_config


def said(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return captured.out + captured.err


def extracted(folder: Path) -> Any:
    return (folder / "run/extract/stage.json").stat().st_mtime_ns


def test_sources_with_too_little_are_told_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixture = "[mixture]\nseq_length = 32\nsamples = 20\nweights = { big = 1.0, one = 0.2, short = 1.0, none = 3.0 }"
    mixture += "\nepochs = { none = 2 }\n"
    config = write_config(tmp_path, {"big": 30, "one": 1, "short": 4, "none": 0}, mixture)
    assert command.main([str(config)]) == 0
    told = said(capsys)
    assert "warning: source none has no usable record (no records); check sources.none.files and format\n" in told
    assert "warning: source none has no document left to train on, so it has no part in the mixture; no record" in told
    short = told.split("warning: source short has no document left to train on")[1]
    assert "change the rule or key behind them" in short.splitlines()[0]
    assert "warning: source one has 1 document left, too few to hold one out: it is trained on and not ev" in told
    assert "; give it more files if it should be\n" in told.split("too few to hold one out")[1]
    plan = Plan.open(tmp_path / "run/plan")
    assert plan.sources == ["big", "one"]
    assert plan.heldout_rows("big") and not plan.heldout_rows("one")
    assert HeldoutLoss.of_plan(plan, 4).rows["one"] == []
    first = extracted(tmp_path)
    assert report.main([str(config)]) == 0
    assert command.main([str(config), "mixture.samples=22"]) == 0
    assert "warning: source short has no document left to train on" in said(capsys)
    assert extracted(tmp_path) == first
    assert "no record was read from its files: name others by sources.none.files, or correct its format" in told
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps({"id": str(n), "text": text(n + 77)}) + "\n" for n in range(9)))
    files = [f"sources.{name}.files=['{tmp_path}/{name}.jsonl','{more}']" for name in ("none", "one")]
    assert command.main([str(config), *files, "dedup.exact=false", f"run.dir={tmp_path}/again"]) == 0
    told = said(capsys)
    assert "source none has" not in told and "source one has" not in told


def test_nothing_is_held_out_of_a_share_of_0(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"big": 30}, "[mixture]\nseq_length = 32\nsamples = 20\ntemperature = 1.0\n")
    assert command.main([str(config), "heldout.share=0"]) == 0
    assert not (tmp_path / "run/documents/heldout").exists()
    plan = Plan.open(tmp_path / "run/plan")
    assert plan.heldout_rows("big") == 0
    assert HeldoutLoss.of_plan(plan, 4).rows == {"big": []}
    assert heldout_passages(plan.path, 2, 16, plan.tokenizer_path) == []  # an export compares its prompts then


def test_without_any_document_the_first_stage_that_kept_none_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, {"short": 4}, "[mixture]\ntemperature = 1.0\n")
    assert command.main([str(config)]) == 1
    assert "stage filter kept none of 4 documents (word_count_min 4)" in (told := said(capsys))
    assert f"look at {tmp_path}/run/filter/drops" in told
    first = extracted(tmp_path)
    assert command.main([str(config), "rules.short.word_count.min=5", "--until", "documents"]) == 0
    assert extracted(tmp_path) == first


def test_too_little_text_is_told_before_the_plan_and_by_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(
        tmp_path, {"big": 30}, "[mixture]\nseq_length = 64\nsamples = 9000\nweights = { big = 1.0 }\n"
    )
    assert command.main([str(config)]) == 1
    told = said(capsys)
    for stage, about in (("dedup", "about "), ("documents", "about "), ("tokens", "")):
        assert f"warning: source big has {about}" in told and f"tokens for mixture after {stage}, all allowed" in told
    assert told.index("after dedup, all allowed epochs") < told.index("documents: 30 in")
    assert "mixture.samples = 9,000 rows of mixture.seq_length = 64" in told.split("error: ")[1]
    fitting = int(told.split("Lower mixture.samples to ")[1].split(", ")[0].replace(",", ""))
    assert command.main([str(config), f"mixture.samples={fitting}"]) == 0
    assert "will probably refuse" not in said(capsys)
    has, wanted, epochs = re.findall(
        r"has (\S+) tokens for mixture after tokens, .* need (\S+) of them: .* raise mixture\.max_epochs = (\d+), or",
        told,
    )[0]
    most = int(epochs) * int(wanted.replace(",", "")) // int(has.replace(",", "")) + 1
    assert command.main([str(config), f"mixture.max_epochs={most + 1}"]) == 0  # rows cut some documents
    assert "will probably refuse" not in said(capsys)


def test_no_mixture_is_needed_before_the_plan(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"big": 30}, "")
    with pytest.raises(ConfigError, match=r"key 'mixture' is missing.*--until tokens"):
        command.main([str(config)])
    assert command.main([str(config), "--until", "tokens"]) == 0
    assert (tmp_path / "run/tokens/train/big").is_dir() and not (tmp_path / "run/plan").exists()
