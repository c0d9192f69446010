"""Tests what `trivium data baselines` measures of a small run: xz by its own program, the 5-gram by its bounds."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from configs.tokenizer import TokenizerConfig, TokenizerKind
from data_pipeline.core.shards import read_records
from data_pipeline.report import baselines
from data_pipeline.tokens.store import build
from data_pipeline.tokens.tokenizer import Tokenizer
from data_pipeline.tokens.tokenizer_training import train


def text(run_dir: Path, split: str, source: str) -> bytes:
    files = sorted((run_dir / "documents" / split / source).glob("*.zst"))
    return b"".join(record["text"].encode() for file in files for record in read_records(file))


def test_measures_are_those_of_the_held_out_text(
    config: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    assert baselines.main([str(config), f"run.dir={copy}"]) == 0
    said = capsys.readouterr().out
    found = json.loads((copy / baselines.FILE).read_text())["sources"]
    assert set(found) == {"prose", "code"}
    for source, values in found.items():
        held_out, training = text(copy, "heldout", source), text(copy, "train", source)
        assert f"{values['xz']:.3f}" in said and values["bytes"] == len(held_out) > 0
        if shutil.which("xz"):
            sizes = [
                len(subprocess.run(["xz", "-9", "-c"], input=part, capture_output=True, check=True).stdout)
                for part in (held_out, training, training + held_out)
            ]
            assert values["xz"] * len(held_out) / 8 == pytest.approx(sizes[0])
            assert values["xz_after_training"] * len(held_out) / 8 == pytest.approx(sizes[2] - sizes[1])
        assert 0.5 < values["ngram"] < 8

    bare = tmp_path / "bare"  # with heldout.share = 0 nothing is held out
    shutil.copytree(copy / "tokens", bare / "tokens", ignore=shutil.ignore_patterns("heldout"))
    assert baselines.main([str(config), f"run.dir={bare}", "heldout.share=0"]) == 1
    assert "(heldout.share = 0); set heldout.share above 0" in capsys.readouterr().err

    before = (copy / baselines.FILE).stat().st_mtime_ns
    assert baselines.main([str(config), f"run.dir={copy}"]) == 0
    assert (copy / baselines.FILE).stat().st_mtime_ns == before, "nothing has changed, so nothing is measured again"
    (copy / baselines.FILE).write_text((copy / baselines.FILE).read_text().replace('"made_from": "', '"made_from": "0'))
    assert baselines.main([str(config), f"run.dir={copy}"]) == 0
    assert json.loads((copy / baselines.FILE).read_text())["sources"] == found


def test_tokens_without_bytes_give_no_n_gram_model(config: Path, run_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    files = sorted((copy / "documents").glob("*/*/*.zst"))
    shutil.rmtree(copy / "tokenizer")
    train(files, copy / "tokenizer", TokenizerConfig(kind=TokenizerKind.WORDPIECE, vocab_size=400))
    for file in files:
        split, source, name = file.relative_to(copy / "documents").with_suffix("").with_suffix("").parts
        build(file, copy / "tokens" / split / source / name, Tokenizer.load(copy / "tokenizer"))
    assert baselines.main([str(config), f"run.dir={copy}"]) == 0
    found = json.loads((copy / baselines.FILE).read_text())["sources"]
    assert [set(values) for values in found.values()] == [{"bytes", "xz", "xz_after_training"}] * 2


def test_a_run_without_tokens_is_refused(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert baselines.main([str(config), f"run.dir={tmp_path}", "--dry-run"]) == 0
    assert f"would measure the held-out text of {tmp_path}" in capsys.readouterr().out
    assert baselines.main([str(config), f"run.dir={tmp_path}"]) == 1
    assert "has no tokens yet; run: trivium data run CONFIG" in capsys.readouterr().err
