"""Canaries in a real run with all stages on: their rule catches them, and the run's own documents are unchanged."""

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from configs.data import DataConfig
from configs.loader import ConfigError, load
from data_pipeline import command
from data_pipeline.canaries.check import check_canaries, missed
from data_pipeline.core.canary_naming import canary_of, is_canary, salt
from data_pipeline.core.tables import shards_of
from tests.data_runs import data_config

ROOT = Path(__file__).parents[4]


def config_in(folder: Path) -> Path:
    """Returns the config of a run whose files are in `folder`."""
    return data_config(
        folder / "data.toml",
        {"prose": {"files": [f"{folder}/prose.jsonl"], "format": "jsonl", "rules": {"en": "english"}}},
        run={"dir": f"{folder}/plain", "shard_bytes": 60000},
        extract={"max_bad_share": 0.1},
        rules={
            "english": {
                "language_score": {"min": 0.5},
                "word_count": {"min": 50, "max": 100000},
                "mean_word_length": {"max": 10},
                "drop_lines": ["c4"],
            }
        },
        decontaminate={"files": [f"{folder}/evaluation.jsonl"]},
        lines={"max_copies": 2},
        substrings={"min_bytes": 200},
        pii={"actions": {"email": "replace", "key": "drop_document"}},
        documents={"cut_share_max": 0.5},
        heldout={"share": 0.1},
    )


EMPTY_PAGE = "<html><body><script>1</script></body></html>"
KEY = "ghp_" + "aB3dE5fG7hJ9kL1mN3pQ5rS7tU9vW1xY3zA5"


def passages() -> list[str]:
    """Returns real prose in pieces of about 2,500 characters, one sentence a line, that C4's rules keep."""
    with gzip.open(ROOT / "data/demo/english.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in itertools.islice(lines, 0, 60)]
    pieces = []
    for text in texts:
        sentences = [f"{one}." for one in " ".join(text.split()).split(". ") if 6 <= len(one.split()) < 60]
        pieces.append("\n".join(itertools.islice(sentences, 16)))
    return [piece for piece in pieces if len(piece) > 1500]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("canaries")
    texts = passages()[:40]
    records = [{"id": f"doc-{number}", "text": text} for number, text in enumerate(texts)]
    records.append({"id": "copy", "text": texts[0]})
    (folder / "prose.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    question = " ".join(texts[7].split()[50:90])
    (folder / "evaluation.jsonl").write_text(json.dumps({"text": question}) + "\n", encoding="utf-8")
    return config_in(folder)


def planted(config: Path) -> dict[str, dict[str, Any]]:
    """Returns a canary for each kind of stage; their texts are those of sources, which they must not match."""
    texts = [json.loads(line)["text"] for line in (config.parent / "prose.jsonl").read_text().splitlines()]
    question = json.loads((config.parent / "evaluation.jsonl").read_text())["text"]
    good = texts[0]
    line = "This very line stands in one document three times, which is once too often."
    where = {"source": "prose"}
    return {
        "control": where | {"text": good, "reason": "kept"},
        "short": where | {"text": "Far too short to be kept.", "reason": "word_count_min"},
        "french": where | {"text": "Nous sommes arrivés hier soir. " * 20, "reason": "language_unexpected"},
        "page": where | {"text": EMPTY_PAGE, "html": True, "reason": "no_main_text"},
        "blank": where | {"text": " \n ", "reason": "empty"},
        "copies": where | {"text": [good, good, good], "reason": "exact_duplicate"},
        "near": where | {"text": [texts[1], texts[1].replace("the", "thee", 1)], "reason": "near_duplicate"},
        "question": where | {"text": f"{good}\n{question}", "reason": "contaminated"},
        "mail": where | {"text": f"{good}\nWrite to jane.roe@acme-corp.com about it all.", "reason": "pii_email"},
        "token": where | {"text": f"{good}\nUse {KEY} for it.", "reason": "pii_key"},
        "line": where | {"text": "\n".join([good, line, line, line]), "reason": "duplicate_line"},
        "twice": where | {"text": [texts[2], f"{texts[3]}\n{texts[2][:900]}"], "reason": "duplicate_substring"},
        "mostly": where | {"text": [good[:1200], f"{good[:1200]} And the rest."], "reason": "mostly_cut"},
        "policy": where | {"text": f"{good}\nPlease do read our privacy policy today.", "reason": "c4_policy"},
    }


def with_canaries(config: Path, canaries: dict[str, dict[str, Any]], name: str) -> Path:
    path = config.with_name(f"{name}.toml")
    run_dir = f'dir = "{config.parent}/{name}"'
    text = config.read_text().replace(f'dir = "{config.parent}/plain"', run_dir)
    parts = [
        f"\n[canaries.{key}]\n" + "".join(f"{field} = {json.dumps(value)}\n" for field, value in canary.items())
        for key, canary in canaries.items()
    ]
    path.write_text(text + "".join(parts))
    return path


@pytest.fixture(scope="module")
def planted_run(config: Path) -> Path:
    canaries = planted(config)
    # Two texts that are nearly the same: MinHash would find them first.
    del canaries["mostly"]
    path = with_canaries(config, canaries, "planted")
    assert command.main([str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def plain_run(config: Path) -> Path:
    assert command.main([str(config)]) == 0
    return config.parent / "plain"


def test_every_canary_is_caught_by_its_rule(planted_run: Path) -> None:
    run_dir = planted_run.parent / "planted"
    ledger = json.loads((run_dir / "ledger.json").read_text())
    stages = [stage["name"] for stage in ledger["stages"]]
    found = check_canaries(run_dir, load(DataConfig, planted_run).canaries, stages)
    assert missed(found) == []
    assert check_canaries(run_dir, load(DataConfig, planted_run).canaries, stages[: stages.index("documents")]) == []
    assert ledger["canaries"] == found and not [alarm for alarm in ledger["alarms"] if "canary" in alarm]
    fates = {one["name"]: list(one["texts"].values()) for one in found}
    assert sorted(fates["copies"]) == ["dropped for exact_duplicate"] * 2 + ["kept"]
    assert fates["mail"] == ["cut for pii_email"] and fates["token"] == ["dropped for pii_key"]


def test_documents_are_the_same_with_and_without(planted_run: Path, plain_run: Path) -> None:
    run_dir = planted_run.parent / "planted"
    compared = 0
    for stage in json.loads((plain_run / "ledger.json").read_text())["stages"]:
        folder = plain_run / stage["name"]
        mine = {path.relative_to(run_dir) for path in (run_dir / stage["name"]).rglob("*") if path.is_file()}
        for path in folder.rglob("*"):
            name = path.relative_to(plain_run)
            if path.is_file() and path.name != "stage.json" and "drops" not in name.parts:
                assert (run_dir / name).read_bytes() == path.read_bytes(), name
                compared += 1
            mine.discard(name)
        others = {path for path in mine if "drops" not in path.parts and path.name != "canaries.jsonl"}
        assert all(".canaries" in path.as_posix() for path in others), others
    assert compared > 50


def test_canaries_are_counted_beside_the_sources(planted_run: Path, plain_run: Path) -> None:
    mine, plain = (
        json.loads((folder / "ledger.json").read_text())["stages"]
        for folder in (planted_run.parent / "planted", plain_run)
    )
    texts = sum(len(canary.texts) for canary in load(DataConfig, planted_run).canaries.values())
    for one, other in zip(mine, plain, strict=True):
        assert one["total"] == other["total"] and one["sources"]["prose"] == other["sources"]["prose"]
        extra = one["sources"].keys() - other["sources"].keys()
        assert extra == (set() if one["name"] in ("tokenizer", "tokens", "plan") else {"prose.canaries"})
    assert mine[0]["sources"]["prose.canaries"]["in"]["documents"] == texts
    documents = next(stage for stage in mine if stage["name"] == "documents")["sources"]["prose.canaries"]
    assert documents["kept"]["documents"] == 0 and documents["dropped"]["canary"]["documents"] > 0


def test_no_canary_reaches_documents_or_tokens(planted_run: Path) -> None:
    run_dir = planted_run.parent / "planted"
    for path in (run_dir / "documents").glob("*/*/*.gz"):
        assert b"canaries/" not in gzip.decompress(path.read_bytes())
    assert not [path for name in ("documents", "tokens", "plan") for path in (run_dir / name).rglob("*.canaries*")]
    assert [shard for shard in shards_of(run_dir / "dedup") if is_canary(shard)]


def test_one_that_gets_through_or_meets_another_rule_is_an_alarm(config: Path, planted_run: Path, capsys: Any) -> None:
    canaries = planted(config)
    del canaries["mostly"]
    # Only the expected fates differ, so that no stage runs again.
    canaries["short"]["reason"] = "mean_word_length_max"
    canaries["control"]["reason"] = "pii_email"
    canaries["mail"]["reason"] = "kept"
    canaries["copies"]["reason"] = "near_duplicate"
    path = with_canaries(config, canaries, "planted")
    capsys.readouterr()
    assert command.main([str(path), "alarms.fail=true"]) == 1
    said = capsys.readouterr().out
    assert (
        "0 of 15 stages ran" in said
        and f"canaries: {len(canaries) - 4} of {len(canaries)} caught as they should be" in said
    )
    should = "alarm: canary 'short' of prose should be caught by mean_word_length_max; canaries/short/0 was dropped for"
    assert f"{should} word_count_min" in said
    assert "canary 'control' of prose should be caught by pii_email; canaries/control/0 was kept" in said
    assert "canary 'mail' of prose should be kept whole; canaries/mail/0 was cut for pii_email" in said
    assert "canary 'copies' of prose should be dropped for near_duplicate, all but one of 3" in said


def test_a_text_that_is_mostly_cut(config: Path) -> None:
    """Runs on a copy that MinHash would drop if that were on: it loses most of its text in the substrings stage."""
    canary = planted(config)["mostly"]
    canary["text"][0] += " Not the same end."
    path = with_canaries(config, {"mostly": canary | {"reason": "duplicate_substring"}}, "mostly")
    assert command.main([str(path), "dedup.minhash=false"]) == 0
    (found,) = json.loads((config.parent / "mostly/ledger.json").read_text())["canaries"]
    assert sorted(found["texts"].values()) == ["dropped for mostly_cut", "kept"]


def test_canaries_of_an_earlier_run_are_in_no_index(config: Path, planted_run: Path) -> None:
    canaries = {name: planted(config)[name] for name in ("control", "copies")}
    path = with_canaries(config, canaries, "later")
    text = path.read_text().replace("[lines]", f'[dedup]\nindex = ["{config.parent}/planted"]\n\n[lines]')
    path.write_text(text.replace("prose.jsonl", "later.jsonl"))
    texts = passages()[40:]
    assert len(texts) >= 5
    records = [{"id": f"later-{number}", "text": text} for number, text in enumerate([*texts, passages()[1]])]
    (config.parent / "later.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    assert command.main([str(path)]) == 0
    ledger = json.loads((config.parent / "later/ledger.json").read_text())
    assert [one["caught"] for one in ledger["canaries"]] == [True, True]
    dedup = next(stage for stage in ledger["stages"] if stage["name"] == "dedup")
    assert dedup["total"]["dropped"]["in_index"]["documents"] == 1


@pytest.mark.parametrize(
    ("canary", "message"),
    [
        ({"source": "prose", "text": "x", "reason": "word_count_mn"}, "did you mean 'word_count_min'"),
        ({"source": "prose", "text": "x", "reason": "pii_phone"}, "no rule or stage that is on"),
        ({"source": "prose", "text": "x", "reason": "url_duplicate"}, "takes two documents"),
        ({"source": "prose", "text": ["x", "y"], "reason": "url_duplicate"}, "no rule or stage that is on"),
        ({"source": "news", "text": "x", "reason": "kept"}, r"canaries\.one\.source = 'news'"),
        ({"source": "prose", "text": [], "reason": "kept"}, "plants nothing"),
    ],
)
def test_a_canary_that_cannot_be_caught_is_an_error(config: Path, canary: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(DataConfig, with_canaries(config, {"one": canary}, "wrong"))


def test_only_canaries_are_kept_apart_each_from_every_other() -> None:
    assert canary_of("a/0000-0000") == canary_of("b/0001-0000") == "" and salt("a/0000-0000") == 0
    assert canary_of("a.canaries/0001-0000") == canary_of("a.canaries/0001-0001") != canary_of("a.canaries/0002-0000")
    assert salt("a.canaries/0001-0000") not in (0, salt("a.canaries/0002-0000"), salt("b.canaries/0001-0000"))
