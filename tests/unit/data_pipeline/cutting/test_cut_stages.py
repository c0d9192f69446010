"""Tests runs with all cutting stages: counts, numbers of workers, planted texts, and that secrets are never shown."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.cuts import DecontaminateConfig
from data_pipeline.command import main
from data_pipeline.core.shards import read_records, shard_path, shards_under
from data_pipeline.cutting.cut_stages import evaluation_files
from tests.data_runs import data_config, ledger, published
from tests.demo_corpus import demo_records, write_jsonl


def config_in(folder: Path) -> Path:
    """Writes the config of the run, whose files are in `folder`."""
    return data_config(
        folder / "data.toml",
        {
            "prose": {"files": [f"{folder}/in/prose.jsonl.gz"], "format": "jsonl", "rules": {"any": "all"}},
            "novel": {"files": [f"{folder}/in/novel.jsonl.gz"], "format": "jsonl", "rules": {"any": "cjk"}},
        },
        run={"shard_bytes": 60000},
        rules={"cjk": {"splitter": "cjk", "word_count": {"min": 20}}, "all": {"word_count": {"min": 20}}},
        decontaminate={"files": [f"{folder}/in/questions.jsonl"], "action": "drop"},
        lines={"max_copies": 2, "min_chars": 12},
        substrings={"min_bytes": 150},
        pii={
            "actions": {
                "email": "replace",
                "ip": "replace",
                "phone": "replace",
                "key": "replace",
                "card": "drop_document",
            }
        },
        tokenizer={"vocab_size": 3000},
        heldout={"share": 0.1},
        mixture={"samples": 100},
    )


LINE = "Please subscribe to our newsletter, dear reader."
PASSAGE = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "
)
PASSAGE += "It was the epoch of belief, it was the epoch of incredulity, it was the season of Light."
SECRETS = ("anna.karenina@levin.ru", "81.2.69.142", "+44 207 154 1707", "gh" + "p_a8Kd03jfLq92nXpZ7vBt5RyWc1eUgHs6oMi4")
CARD = "4539 1488 0343 6467"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prose and chapters with planted texts: a card number, secrets, a line 4 times, a passage twice, two questions."""
    folder = tmp_path_factory.mktemp("inputs") / "in"
    folder.mkdir()
    prose = [dict(record, text=record["text"][300:3000]) for record in demo_records("english")[:24]]
    novel = [dict(record, text=record["text"][:2500]) for record in demo_records("chinese")]
    questions = [prose[5]["text"][400:560], novel[3]["text"][700:760]]
    for number in (0, 1, 2, 3):
        prose[number]["text"] = f"{LINE}\n{prose[number]['text']}"
    prose[6]["text"] += f"\n{PASSAGE}"
    novel[1]["text"] = f"{novel[1]['text']}（{PASSAGE}）"
    prose[7]["text"] = f"{SECRETS[0]}\n" + prose[7]["text"] + f" My card: {CARD}."
    prose[8]["text"] = f"{' '.join(SECRETS)} and then: {prose[8]['text']}"
    novel[2]["text"] = f"电话：{SECRETS[2]}，邮箱{SECRETS[0]}。" + novel[2]["text"]
    # A document that mostly repeats others, and one that the filter drops, which begins with a secret.
    prose.append({"id": "mostly", "text": PASSAGE + " And this is what there is of its own, a line."})
    prose.append({"id": "short", "text": f"Too short. {SECRETS[0]} {SECRETS[3]}"})
    write_jsonl(folder / "prose.jsonl.gz", prose)
    write_jsonl(folder / "novel.jsonl.gz", novel)
    lines = [json.dumps({"id": f"q{number}", "text": text}) for number, text in enumerate(questions)]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def config(inputs: Path, tmp_path: Path) -> Path:
    (tmp_path / "in").symlink_to(inputs)
    return config_in(tmp_path)


def records(folder: Path) -> list[dict[str, Any]]:
    return [record for shard in shards_under(folder) for record in read_records(shard_path(folder, shard))]


def test_all_stages_on_two_workers_and_one(config: Path, tmp_path: Path) -> None:
    assert main([str(config)]) == 0
    run_dir = tmp_path / "run"
    stages = ledger(run_dir)
    assert list(stages)[5:12] == ["dedup", "decontaminate", "lines", "substrings", "pii", "documents", "tokenizer"]
    texts = {record["id"]: record["text"] for record in records(run_dir / "documents")}
    extracted = {record["id"]: record["text"] for record in records(run_dir / "extract")}

    # Counts add up to the byte, and agree with the published texts.
    for stage in stages.values():
        for counts in stage["sources"].values():
            for unit in ("documents", "bytes"):
                gone = sum(amount[unit] for amount in counts["dropped"].values())
                assert counts["in"][unit] == counts["kept"][unit] + gone
    for source in ("prose", "novel"):
        passed_on = stages["documents"]["sources"][source]["passed_on"]
        mine = [record for record in records(run_dir / "documents") if record["metadata"]["source"] == source]
        assert passed_on == {"documents": len(mine), "bytes": sum(len(record["text"].encode()) for record in mine)}
        assert stages["tokens"]["sources"][source]["in"] == passed_on

    # Every planted text was found by its stage.
    dropped = {name: stages[name]["total"]["dropped"] for name in ("decontaminate", "pii", "documents")}
    assert dropped["decontaminate"]["contaminated"]["documents"] == 2
    assert "mostly" not in texts and "short" not in texts
    assert dropped["pii"]["pii_card"]["documents"] == dropped["documents"]["pii_card"]["documents"] == 1
    assert dropped["documents"]["mostly_cut"]["documents"] == 1
    assert dropped["documents"]["duplicate_line"] == {"documents": 0, "bytes": 2 * len(LINE + "\n")}
    assert sum(text.count(LINE) for text in texts.values()) == 2
    assert sum(text.count(PASSAGE) for text in texts.values()) == 1
    everything = "\n".join(texts.values())
    assert not any(secret in everything for secret in (*SECRETS, CARD))
    assert (
        "<EMAIL> <IP_ADDRESS> <PHONE> <KEY> and then: " in everything and "电话：<PHONE>，邮箱<EMAIL>。" in everything
    )

    # Samples show the text that matched a question in its context.
    shown = [json.loads(line) for line in (run_dir / "decontaminate/drops/contaminated.jsonl").open()]
    assert {match["item"] for match in shown} == {"q0", "q1"}
    for match in shown:
        span = extracted[match["id"]].encode()[match["start"] : match["end"]].decode()
        assert f"«{span}»" in match["context"]
    assert not any(secret in path.read_text(errors="replace") for secret in SECRETS for path in visible(run_dir))

    assert main([str(config), f"run.dir={tmp_path}/two", "run.workers=2"]) == 0
    assert published(tmp_path / "two") == published(run_dir)


def visible(run_dir: Path) -> list[Path]:
    """Lists all files except shards of texts, token stores and the tokenizer: samples, logs, counts, tables."""
    return [
        path
        for path in run_dir.rglob("*")
        if path.is_file()
        and path.suffix != ".zst"
        and path.relative_to(run_dir).parts[0] not in ("tokens", "tokenizer")
    ]


def test_tables_hold_no_secret(config: Path, tmp_path: Path) -> None:
    """Reads every table of every stage, since Parquet files are compressed."""
    import pyarrow.parquet as pq

    assert main([str(config)]) == 0
    heads = 0
    for path in (tmp_path / "run").rglob("*.parquet"):
        if path.relative_to(tmp_path / "run").parts[0] == "tokens":
            continue
        said = json.dumps(pq.read_table(path).to_pylist(), ensure_ascii=False, default=str)
        heads += said.count("<EMAIL>")
        assert not any(secret in said for secret in (*SECRETS, CARD)), path
    assert heads >= 3


def test_a_changed_stage_repeats_only_what_hangs_on_it(config: Path, tmp_path: Path, capsys) -> None:
    assert main([str(config)]) == 0
    for override, repeated in (
        ("lines.max_copies=1", {"lines", "documents", "tokenizer", "tokens", "plan"}),
        ("documents.cut_share_max=0.9", {"documents", "tokenizer", "tokens", "plan"}),
        ("pii.enabled=false", {"documents", "tokenizer", "tokens", "plan"}),
    ):
        capsys.readouterr()
        assert main([str(config), "--dry-run", override]) == 0
        said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line)
        assert {name for name, verdict in said.items() if verdict.startswith("would run")} == repeated
        assert ("pii" in said) == (override != "pii.enabled=false")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            'decontaminate.files=["in/none.jsonl"]',
            f"'in/none.jsonl' matches no file, looked for from {Path.cwd()}; correct the path, or run from the folder",
        ),
        ("decontaminate.min_words=20", "min_words = 20 is above ngram = 13"),
        ('pii.replacements={card="x"}', "replacements.card has no effect; set actions = "),
        ('pii.actions={names="replace"}', "pii.actions"),
        ('lines.sources=["poems"]', "lines.sources.poems: there is no such source"),
        ("substrings.min_bytes=5", "substrings.min_bytes = 5"),
        ("lines.unit=word", "lines.unit = 'word'"),
    ],
)
def test_a_wrong_config_is_one_sentence(config: Path, override: str, expected: str, capsys) -> None:
    from configs.loader import ConfigError

    with pytest.raises(ConfigError) as error:
        main([str(config), override])
    assert expected in str(error.value)


def test_evaluation_files_are_found_from_the_folder_that_they_are_relative_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evaluation.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert evaluation_files(DecontaminateConfig(files=("evaluation.jsonl",))) == ["evaluation.jsonl"]
