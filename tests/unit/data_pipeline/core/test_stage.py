"""Tests the hash of a stage's code, a change of which makes the stage run again."""

import shutil
from pathlib import Path

import pytest

from data_pipeline.core import stage
from tests.data_runs import ROOT


def test_a_stages_code_is_all_that_its_modules_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes imported modules, which changes the hash, and executors and other stages' code, which does not."""
    shutil.copytree(ROOT / "data_pipeline", tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(stage, "_HERE", tmp_path / "copy")

    def version() -> str:
        stage._source.cache_clear()
        return stage.code_version(("language.identification",), ())

    before = version()
    for module, matters in (
        ("language/identification.py", True),
        ("scan/line_scores.py", True),
        ("scan/characters.py", True),
        ("scores/filtering.py", True),
        ("personal_data/credentials.py", True),
        ("core/progress.py", False),
        ("core/ledger.py", False),
        ("mixture/packing.py", False),
    ):
        path = tmp_path / "copy" / module
        content = path.read_bytes()
        path.write_bytes(content + b"\n# changed")
        assert (version() != before) == matters, module
        path.write_bytes(content)
    assert version() == before
    with pytest.raises(ValueError, match="'langauge' as its code"):
        stage.code_version(("langauge",), ())
    stage._source.cache_clear()
