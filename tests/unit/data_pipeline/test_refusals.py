"""Tests that a refused data run writes nothing, and that a replaced input file is noticed."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from configs.data import DataConfig
from configs.loader import ConfigError, load
from data_pipeline.command import main
from data_pipeline.core import stage
from data_pipeline.core.run_context import RunContext
from data_pipeline.core.stage import file_hashes
from data_pipeline.extraction.extract_stage import extract_stage
from tests.data_runs import write_inputs


def test_a_refused_run_and_a_dry_run_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, run = write_inputs(tmp_path), tmp_path / "deep/run"
    refused = [
        ["--stage", "sieve"],
        ["--stage", "filter"],
        ["--until", "filter", "--stage", "filter"],
        ['sources.prose.files=["none"]'],
        ['dedup.index=["none"]'],
        ['extract.blocklist.domains=["none"]'],
        ['decontaminate.files=["none"]'],
        [f'decontaminate.files=["{config}"]'],  # no JSON lines
        ["rules.prose.word_count.min=x"],
        ["sources.prose.text_key=body"],
        ["sources.prose.rules={english='english'}"],
        ["scores.languages=['ger']"],
        [f"scores.arpa={config}", "rules.english.perplexity.max=9"],
        [f"scores.unigrams={config}", "rules.english.unigram_logprob.min=-9"],
    ]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"run\.dir"):
        main([str(config), "run.dir="])
    for options in refused:
        for folder in (run, tmp_path / "mine"):
            for dry in ([], ["--dry-run"]):
                with pytest.raises(ConfigError):
                    main([str(config), f"run.dir={folder}", *options, *dry])
            assert not run.parent.exists(), options
            assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"], options
    assert main([str(config), f"run.dir={run}", "--dry-run"]) == 0
    assert "would run" in capsys.readouterr().out and not run.parent.exists()


def test_a_file_replaced_in_place_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces files by others of the same name, size and time, some too new for the hash cache."""
    file, cache = tmp_path / "input.jsonl", tmp_path / "cache.json"
    for settled in (stage._SETTLED_NS, 0):
        monkeypatch.setattr(stage, "_SETTLED_NS", settled)
        seen = set()
        for content in ("one", "two", "six"):
            file.write_text(content)
            os.utime(file, ns=(10**18, 10**18))
            time.sleep(0.05 if settled == 0 else 0)
            seen.add(file_hashes([file], cache))
            assert file_hashes([file], cache) in seen
            assert bool(json.loads(cache.read_text())[str(file)]["mark"]) == (settled == 0)
        assert len(seen) == 3


class Meanwhile:
    """Stands for an executor: what happens while tasks run, of which there are none."""

    workers = 1

    def __init__(self, happens: Callable[[], Any]) -> None:
        self.happens = happens

    def perform(self, *arguments: Any) -> None:
        self.happens()


def test_files_that_change_while_they_are_read_are_not_taken_for_what_they_were(tmp_path: Path) -> None:
    config, first, second = write_inputs(tmp_path), tmp_path / "prose-0.jsonl", tmp_path / "prose-1.jsonl"

    def work(happens: Callable[[], Any]) -> None:
        (tmp_path / "run").mkdir(exist_ok=True)
        for name in ("folder", "logs"):
            (tmp_path / name).mkdir(exist_ok=True)
        context = RunContext(load(DataConfig, config), tmp_path / "run", Console(quiet=True), Meanwhile(happens))
        extract_stage(context).work(tmp_path / "folder", tmp_path / "logs")

    def both() -> None:
        first.write_bytes(first.read_bytes() + b"\n")
        second.unlink()

    for happens, named in (
        (lambda: first.write_text("{}"), "prose-0.jsonl"),
        (both, "prose-0.jsonl and 1 more"),
    ):
        with pytest.raises(ValueError, match=f"/{named} changed while the extract stage read its input; run the same"):
            work(happens)
        work(lambda: None)  # the same command again
