"""Tests that a refused data run writes nothing, and that a replaced input file is noticed."""

import json
import os
import time
from pathlib import Path

import pytest

from configs.loader import ConfigError
from data_pipeline.command import main
from data_pipeline.core import stage
from data_pipeline.core.stage import file_hashes
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
