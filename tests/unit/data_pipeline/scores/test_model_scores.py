"""Tests a run with model scores and languages of paragraphs: columns, rules, stage keys, and refused settings."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from configs.data import DataConfig
from configs.loader import ConfigError, load
from configs.model_scores import ScoresConfig
from data_pipeline.command import main
from data_pipeline.core.tables import read_table, shards_of
from data_pipeline.language.identification import Identifier, kept_identifier, language_parts, model_path
from data_pipeline.provenance import explain, what_if
from data_pipeline.scores import classifier
from data_pipeline.scores.model_scores import kept_model_scores
from tests.data_runs import data_config
from tests.demo_corpus import DEMO, demo_records, write_jsonl
from tests.unit.data_pipeline.scores.arpa import SMALL


def config_in(folder: Path) -> Path:
    """Writes the config of the run, whose files are in `folder`."""
    return data_config(
        folder / "data.toml",
        {"prose": {"files": [f"{folder}/prose.jsonl.gz"], "format": "jsonl", "rules": {"any": "prose"}}},
        language={"paragraphs": True},
        scores={
            "classifier": f"{folder}/quality.model",
            "unigrams": f"{folder}/words.tsv",
            "arpa": f"{folder}/small.arpa",
            "languages": ["en"],
        },
        rules={
            "prose": {"language_share": {"min": 0.6}, "classifier_score": {"min": 0.5}, "unigram_logprob": {"min": -50}}
        },
        tokenizer={"vocab_size": 3000},
        mixture={"samples": 20},
    )


@pytest.fixture
def config(tmp_path: Path) -> Path:
    english, chinese, code = (demo_records(name) for name in ("english", "chinese", "code"))
    records = [{"id": f"en{n}", "text": record["text"][:3000]} for n, record in enumerate(english[:12])]
    records += [{"id": f"zh{n}", "text": record["text"][:1000]} for n, record in enumerate(chinese[:4])]
    records += [{"id": f"py{n}", "text": record["text"][:3000]} for n, record in enumerate(code[:8])]
    mixed = f"{english[20]['text'][:2000]}\n\n{chinese[5]['text'][:1900]}"
    write_jsonl(tmp_path / "prose.jsonl.gz", [*records, {"id": "mixed", "text": mixed}])
    (tmp_path / "words.tsv").write_text("the\t60\nof\t40\n")
    (tmp_path / "small.arpa").write_text(SMALL)
    argv = [str(DEMO / "english.jsonl.gz"), "--bad", str(DEMO / "code.jsonl.gz"), "--max-chars", "2000"]
    assert classifier.main([*argv, "--out", str(tmp_path / "quality.model")]) == 0
    return config_in(tmp_path)


def rows_of(stage: Path) -> list[dict[str, Any]]:
    return [row for shard in shards_of(stage) for row in read_table(stage, shard).to_pylist()]


def test_a_run_with_models(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = config.parent
    assert main([str(config)]) == 0
    rows = {row["id"]: row for row in rows_of(folder / "run/score")}
    verdicts = {row["id"]: row["verdict"] for row in rows_of(folder / "run/filter")}
    assert len(rows) == 25
    assert verdicts["mixed"] == "language_share_min" and 0.4 < rows["mixed"]["language_share"] < 0.6
    for name, row in rows.items():
        if name.startswith("zh"):  # no model scores Chinese, so no rule on a model score drops it
            assert row["classifier_score"] != row["classifier_score"] and verdicts[name] == ""
        elif name.startswith("en"):
            assert row["classifier_score"] > 0.5 and row["perplexity"] > 1 and verdicts[name] == ""
    english_code = [name for name, row in rows.items() if name.startswith("py") and row["perplexity"] > 1]
    assert english_code and all(verdicts[name] == "classifier_score_min" for name in english_code)
    languages = {row["id"]: row["languages"] for row in rows_of(folder / "run/language")}
    assert {part.split()[0] for part in languages["mixed"].split(", ")} >= {"en", "zh"}

    capsys.readouterr()
    assert what_if.main([str(config), "perplexity.max=1.5"]) == 0
    assert "perplexity.max of prose: None -> 1.5" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="a changed key under scores or language"):
        what_if.main([str(config), "scores.languages=[]"])
    assert explain.main([str(config), "--id", "mixed"]) == 0
    said = capsys.readouterr().out
    assert "paragraphs in " in said and "language_share" in said and "at least 0.6   <- broken" in said

    # New content of a model file changes the score stage's key, not the language stage's.
    (folder / "small.arpa").write_text(SMALL.replace("-1.0\t<unk>", "-2.0\t<unk>"))
    assert main([str(config)]) == 0
    stages = {stage["name"]: stage for stage in json.loads((folder / "run/ledger.json").read_text())["stages"]}
    assert stages["score"]["fresh"] and not stages["language"]["fresh"]
    again = {row["id"]: row for row in rows_of(folder / "run/score")}
    assert again["en0"]["perplexity"] > rows["en0"]["perplexity"]
    (folder / "small.arpa").write_text("no model")
    with pytest.raises(ConfigError, match=r"small\.arpa is not an ARPA file"):  # before any work
        main([str(config)])
    (folder / "small.arpa").unlink()
    with pytest.raises(ConfigError, match=r"scores.arpa = '.*small.arpa' is not a file"):
        main([str(config)])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ('scores.arpa=""', None),
        ('scores.classifier=""', "rules.prose.classifier_score bounds a score .* scores.classifier = PATH"),
        ('scores.unigrams=""', "rules.prose.unigram_logprob bounds a score .* scores.unigrams = PATH"),
        ("language.paragraphs=false", "rules.prose.language_share needs .* language.paragraphs = true"),
    ],
)
def test_a_rule_needs_its_model(tmp_path: Path, override: str, said: str | None) -> None:
    path = config_in(tmp_path)
    if said is None:
        load(DataConfig, path, [override])
    else:
        with pytest.raises(ConfigError, match=said):
            load(DataConfig, path, [override])


def test_short_paragraphs_follow_the_document() -> None:
    with gzip.open(DEMO / "chinese.jsonl.gz", "rt", encoding="utf-8") as lines:
        chinese = "".join(json.loads(next(lines))["text"][:300].split())
    english = "The committee met on Tuesday and found that the report was late and full of small mistakes in it."
    identify = Identifier(model_path(), 10_000)
    text = f"{english}\n\n{chinese}\n\n短。\n\n  "
    total = len(english) + len(chinese) + 2
    expected = {"zh": len(chinese) / total, "en": (len(english) + 2) / total}
    assert language_parts(text, "en", identify, 50) == pytest.approx(expected)
    assert list(language_parts(text, "en", identify, 50)) == ["zh", "en"]  # the largest first
    assert language_parts(text, "en", identify, 1000) == {"en": 1.0}
    assert language_parts(" \n ", "en", identify, 50) == {"en": 1.0}


def test_models_are_read_once_a_process_and_anew_when_a_file_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "words.tsv").write_text("the\t60\nof\t40\n")
    (tmp_path / "small.arpa").write_text(SMALL)
    config = ScoresConfig(unigrams=str(tmp_path / "words.tsv"), arpa=str(tmp_path / "small.arpa"))
    first = kept_model_scores(config)
    assert kept_model_scores(ScoresConfig(**config.model_dump())) is first
    before = first("a b", "en")
    (tmp_path / "other.arpa").write_text(SMALL.replace("-0.4\t<s> a", "-0.5\t<s> a"))  # another file of the same size
    (tmp_path / "other.arpa").replace(tmp_path / "small.arpa")
    assert kept_model_scores(config)("a b", "en")["perplexity"] > before["perplexity"]
    assert kept_model_scores(config.model_copy(update={"arpa": ""}))("a", "en").keys() == {"unigram_logprob"}
    here = config.model_copy(update={"arpa": "small.arpa"})
    with pytest.raises(ConfigError, match=r"scores\.arpa = 'small\.arpa' is not a file, seen .*; correct the path"):
        kept_model_scores(here)
    monkeypatch.chdir(tmp_path)
    kept_model_scores(here)
    assert kept_identifier(500) is kept_identifier(500) is not kept_identifier(600)
