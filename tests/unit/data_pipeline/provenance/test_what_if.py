"""Compares the numbers of `trivium data what-if` with the filter's own; tests which changes are refused."""

import gzip
import json
import re
from pathlib import Path

import pytest

from configs.data import DataConfig
from configs.loader import ConfigError, load
from data_pipeline.core.tables import as_table, read_table, write_table
from data_pipeline.provenance.what_if import changes, expanded, main, margin
from data_pipeline.scan.scores import Scanner, definition_of
from data_pipeline.scores.filtering import verdict
from data_pipeline.scores.scoring import HEAD_CHARS
from tests.data_runs import data_config

ROOT = Path(__file__).parents[4]


def config_in(folder: Path) -> Path:
    """Returns the config of a run whose files are in `folder`."""
    return data_config(
        folder / "data.toml",
        {
            "prose": {"files": ["prose.jsonl"], "format": "jsonl", "rules": {"en": "english"}},
            "code": {"files": ["code.jsonl"], "format": "jsonl", "rules": {"any": "code"}},
        },
        rules={
            "english": {"use": ["gopher_quality@paper"], "language_score": {"min": 0.5}},
            "code": {"use": ["code@starcoder"]},
        },
        mixture={"weights": {"prose": 1.0}},
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a config whose run has scores of real documents, and the tokens stage's counts for the prose."""
    folder = tmp_path_factory.mktemp("what_if")
    path = config_in(folder)
    rules = load(DataConfig, path).rules
    for source, name, file in (("prose", "english", "english"), ("code", "code", "code")):
        with gzip.open(ROOT / f"data/demo/{file}.jsonl.gz", "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["text"][:20_000] for line in lines][::6]
        scanner = Scanner(definition_of(rules[name]))
        rows = [
            {"source": source, "shard": f"{source}/0", "row": n, "id": f"{source}{n}", "bytes": len(text.encode()),
             "verdict": "", "rules": name, "language_score": 0.5 + n / 1000, **scanner.scores(text),
             "head": text[:HEAD_CHARS]}
            for n, text in enumerate(texts)
        ]  # fmt: skip
        write_table(folder / "run/score", f"{source}/0", as_table(rows))
    (folder / "run/score/stage.json").write_text("{}")
    (folder / "run/tokens").mkdir()
    stage = {"sources": {"prose": {"kept": {"bytes": 1000}, "notes": {"tokens": 250}}}}
    (folder / "run/tokens/stage.json").write_text(json.dumps(stage))
    return path


def test_counts_are_those_of_the_filter(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["word_count.min=2000", "rules.code.alnum_ratio.min=0.6"]
    assert main([str(config), *asked]) == 0
    lines = capsys.readouterr().out.splitlines()
    changed = load(DataConfig, config, expanded(asked, ["code", "english"]))
    for source in ("prose", "code"):
        rows = read_table(config.parent / "run/score", f"{source}/0").to_pylist()
        kept = [
            [row for row in rows if not verdict(row, one.rules[row["rules"]])]
            for one in (load(DataConfig, config), changed)
        ]
        assert 0 < len(kept[1]) < len(kept[0])
        (line,) = [line for line in lines if re.match(rf"│ {source} ", line)]
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert cells[1:3] == [str(len(part)) for part in kept]
        sizes = [sum(row["bytes"] for row in part) / 1e6 for part in kept]
        assert cells[3:5] == [f"{size:.2f}" for size in sizes]
        tokens = [f"{size / 4:.2f}" for size in sizes] if source == "prose" else ["not yet", "not yet"]
        assert cells[5:7] == tokens
    assert any("word_count.min of english: 50.0 -> 2000.0" in line for line in lines)


def test_the_margin_is_nearest_first_on_both_sides(config: Path) -> None:
    before = load(DataConfig, config)
    after = load(DataConfig, config, ["rules.english.word_count.min=2000"])
    (change,) = changes(before.rules, after.rules)
    found = margin(read_table(config.parent / "run/score", "prose/0"), change)
    inside = [row["word_count"] for word, row in found if word == "in"]
    outside = [row["word_count"] for word, row in found if word == "out"]
    assert len(inside) == len(outside) == 3
    assert inside == sorted(inside) and inside[0] >= 2000 > outside[0]
    assert outside == sorted(outside, reverse=True)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rules.english.splitter=words", "rules.english: a change of splitter"),
        ("rules.english.language_score.min=0.4", "would let in documents that the language stage dropped"),
        ('run.dir="nowhere"', "run.dir = 'nowhere' holds no scores yet"),
        ("rules.english.word_counts.min=4", "unknown key 'rules.english.word_counts'"),
    ],
)
def test_what_scores_do_not_decide_is_refused(config: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        main([str(config), override])


def test_a_change_is_compared_once_one_is_made_as_the_message_says(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = r"no bound differs from the config's; change one, e\.g\. (\S+)"
    assert main([str(config)]) == 0
    change = re.search(told, capsys.readouterr().out)
    assert change and main([str(config), change[1]]) == 0
    said = capsys.readouterr().out
    assert "word_count.min of english: 50.0 -> 100.0" in said and not re.search(told, said)
