"""Tests that `trivium data sample` shows what the tables of all kinds of stages hold, and masks it."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.loader import ConfigError
from data_pipeline import command
from data_pipeline.core.tables import read_table, shards_of
from data_pipeline.provenance import document_samples
from data_pipeline.provenance.excerpts import excerpt, piece
from tests.data_runs import data_config
from tests.demo_corpus import demo_records


def config_in(folder: Path) -> Path:
    """Returns the config of a run whose files are in `folder`."""
    return data_config(
        folder / "data.toml",
        {"prose": {"files": [f"{folder}/prose.jsonl"], "format": "jsonl", "rules": {"en": "english"}}},
        run={"shard_bytes": 50000},
        extract={"max_bad_share": 0.5},
        rules={"english": {"word_count": {"min": 100}}},
        decontaminate={"files": [f"{folder}/evaluation.jsonl"]},
        lines={"max_copies": 1},
        pii={},
        mixture={"samples": 20},
        canaries={
            "short": {
                "source": "prose",
                "text": "A canary that is too short, and in no sample.",
                "reason": "word_count_min",
            }
        },
    )


MAIL = "jane.roe@acme-corp.com"
LINE = "This line stands in each of the documents, and all but the first of it go."


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    records = [
        {"id": f"doc-{n}", "text": f"{one['text'][:1500]}\n{LINE}\nMail {MAIL} now.\n{one['text'][1500:2500]}"}
        for n, one in enumerate(demo_records("english")[:30])
    ]
    records += [
        {"id": f"short-{n}", "text": f"Only {n} words, and {MAIL} among them: that is not much."} for n in range(9)
    ]
    records.append({"id": "echo", "text": f"{LINE}\n" * 20})
    records.append({"id": "copy", "text": records[0]["text"] + " And an end of its own."})
    lines = [json.dumps(record) for record in records]
    (folder / "prose.jsonl").write_text("\n".join([*lines, '{"text": "cut']) + "\n", encoding="utf-8")
    question = " ".join(records[3]["text"].split()[100:140])
    (folder / "evaluation.jsonl").write_text(json.dumps({"id": "Q7", "text": question}) + "\n", encoding="utf-8")
    path = config_in(folder)
    assert command.main([str(path)]) == 0
    return path


def said(config: Path, capsys: Any, *args: str) -> str:
    capsys.readouterr()
    assert document_samples.main([str(config), *args]) == 0
    out: str = capsys.readouterr().out
    assert MAIL not in out and "canaries/" not in out
    return out


def drawn(out: str) -> list[str]:
    return [line.split()[1] for line in out.splitlines() if line.startswith("prose ")]


def test_dropped_documents_with_the_score_that_broke_its_bound(config: Path, capsys: Any) -> None:
    out = said(config, capsys, "--reason", "word_count_min", "-n", "4")
    assert len(drawn(out)) == 4 and all(name.startswith("short-") for name in drawn(out))
    assert out.count("dropped for word_count_min") == 4 and "word_count 11, at least 100 in english" in out
    assert "<EMAIL>" in out
    assert drawn(said(config, capsys, "-n", "4")) == drawn(out)
    assert drawn(said(config, capsys, "-n", "4", "--seed", "1")) != drawn(out)
    assert len(drawn(said(config, capsys, "--source", "prose", "-n", "100"))) == 9


def test_kept_documents(config: Path, capsys: Any) -> None:
    folder = config.parent / "run"
    assert (
        said(config, capsys, "--kept", "-n", "7", "--dry-run")
        == f"would draw 7 documents of stage filter in {folder}\n"
    )
    out = said(config, capsys, "--kept", "-n", "100")
    folder = config.parent / "run" / "filter"
    rows = [row for shard in shards_of(folder) for row in read_table(folder, shard).to_pylist()]
    assert sorted(drawn(out)) == sorted(row["id"] for row in rows if not row["verdict"])
    final = said(config, capsys, "--stage", "documents", "--kept", "-n", "100", "--chars", "4000")
    assert final.count(LINE) == 1 and "Mail <EMAIL> now." in final


def test_what_a_stage_cut_stands_in_its_context(config: Path, capsys: Any) -> None:
    out = said(config, capsys, "--stage", "lines", "--reason", "duplicate_line", "-n", "3")
    assert len(drawn(out)) == 3 and out.count(f"[[{LINE}\n") == 3
    out = said(config, capsys, "--stage", "pii", "--reason", "pii_email", "-n", "2")
    assert out.count("Mail [[<EMAIL>]] now.") == 2


def test_other_stages(config: Path, capsys: Any) -> None:
    out = said(config, capsys, "--stage", "dedup")
    assert "is kept in its place" in out and len(drawn(out)) == 1
    out = said(config, capsys, "--stage", "decontaminate")
    assert "n-grams of Q7 in" in out and "«" in out
    out = said(config, capsys, "--stage", "documents")
    assert drawn(out) == ["echo"] and "bytes cut for duplicate_line" in out and LINE in out
    assert "bad_json" in said(config, capsys, "--stage", "extract")
    assert len(drawn(said(config, capsys, "--stage", "language", "--kept", "-n", "3"))) == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--reason", "word_count_mn"],
            r"stage filter has no such document for word_count_mn; it drops or cuts for: word_count_min \(9\)$",
        ),
        (["--stage", "lines", "--reason", "x"], r"duplicate_line \(\d+\)"),
        (["--stage", "tokens"], "--stage 'tokens'"),
        (["--stage", "substrings"], r"switched off; add a section \[substrings\], and run it"),
        (["-n", "0"], "-n '0'"),
        (["--kept", "--reason", "word_count_min"], "exclude each other"),
        (["--source", "news"], "known: prose"),
    ],
)
def test_what_cannot_be_drawn_is_an_error(config: Path, args: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        document_samples.main([str(config), *args])


def test_a_piece_that_cuts_through_an_address_is_masked() -> None:
    text = f"Write to {MAIL} or not. " * 3
    for start in range(len(text)):
        for end in (start + 5, start + 30):
            shown = piece(text, start, end)
            assert "roe@" not in shown and "acme" not in shown and len(shown) < 80
    at = text.index(MAIL)
    cut = {"start": at + len("é".encode()), "end": at + len("é".encode()) + len(MAIL), "replacement": "<EMAIL>"}
    assert str(excerpt(f"é{text}", cut | {"reason": "pii_email"}, context=9)) == "Write to [[<EMAIL>]] or not. "
    other = {"reason": "pii_email", "replacement": "(mail)"}
    assert str(excerpt(f"é{text}", cut | other, context=9)) == "Write to [[(mail)]] or not. "
    line = {"reason": "duplicate_line", "replacement": ""}
    assert str(excerpt(f"é{text}", cut | line, context=4)) == " to [[<EMAIL>]] or "
