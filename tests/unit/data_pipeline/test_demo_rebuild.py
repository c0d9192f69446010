"""Rebuilds the demo corpus with stand-ins for the packages that it would fetch: what it says of its files is right."""

import gzip
import importlib.util
import sys
from pathlib import Path

import pytest

from tests.demo_corpus import DEMO

MAKERS = ("speeches", "chapters", "scenes", "sanguo", "modules", "dialogues", "problems")


def test_files_that_differ_are_told_and_taken_over_as_the_message_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("rebuild", DEMO / "rebuild.py")
    assert spec and spec.loader
    rebuild = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rebuild)

    def said(*argv: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["rebuild.py", *argv])
        capsys.readouterr()
        status: int = rebuild.main()
        captured = capsys.readouterr()
        return status, (captured.out + captured.err).splitlines()[-1]

    monkeypatch.setattr(rebuild, "HERE", tmp_path)
    monkeypatch.setattr(rebuild, "fetch", lambda cache: None)
    for name in MAKERS:
        monkeypatch.setattr(rebuild, name, lambda cache: [{"text": "as it was"}])
    monkeypatch.setattr(rebuild, "pages", lambda cache: gzip.compress(b"WARC-Type: response", mtime=0))
    assert said("--write")[0] == 0
    assert said() == (0, "every file is byte-identical to the committed one")
    monkeypatch.setattr(rebuild, "pages", lambda cache: gzip.compress(b"WARC-Type: response", 0, mtime=0))
    assert said() == (0, "same content, compressed differently (another zlib): web.warc.gz")
    monkeypatch.setattr(rebuild, "sanguo", lambda cache: [{"text": "as it is now"}])
    told = "differ from manifest.json: chinese.jsonl.gz; a package's content changed, and --write takes it"
    assert said() == (1, told)
    assert said("--write")[0] == 0
    assert said() == (0, "every file is byte-identical to the committed one")
