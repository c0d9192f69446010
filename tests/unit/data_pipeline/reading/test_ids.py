"""Tests that every document gets a unique id without personal data, whatever ids the records have."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from configs.loader import ConfigError
from data_pipeline.command import main
from data_pipeline.core.shards import read_records
from data_pipeline.mixture.rows import Plan
from data_pipeline.provenance import explain, takedown, verify
from data_pipeline.reading.ids import id_of_location, name_of, published_id, roots_of
from data_pipeline.tokens.store import Store
from data_pipeline.tokens.tokenizer import Tokenizer
from tests.data_runs import data_config, published
from tests.demo_corpus import demo_records

MAIL, PHONE = "anna.karenina@levin.ru", "+44 207 154 1707"


def config_in(folder: Path) -> Path:
    """Writes the config of the run, whose files are in `folder`."""
    return data_config(
        folder / "data.toml",
        {
            "plain": {
                "files": [f"{folder}/in/plain", f"{folder}/in/plain/x/*.jsonl", f"{folder}/in/plain/y/part.jsonl"],
                "format": "jsonl",
                "rules": {"any": "all"},
            },
            "given": {"files": [f"{folder}/in/given-*.jsonl"], "format": "jsonl", "rules": {"any": "all"}},
        },
        run={"shard_bytes": 4000},
        extract={"max_bad_share": 0.2},
        rules={"all": {"word_count": {"min": 20}}},
        dedup={"minhash": False},
        heldout={"share": 0.2},
        mixture={"samples": 40},
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Does a run without [pii] over records without ids, with shared ids, others' ids, and personal data as ids."""
    folder = tmp_path_factory.mktemp("ids")
    texts = [record["text"][:600] for record in demo_records("english")]
    for part_of in "xy":
        (folder / "in/plain" / part_of).mkdir(parents=True)
        lines = [json.dumps({"text": texts.pop()}) for _ in range(4)]
        (folder / "in/plain" / part_of / "part.jsonl").write_text("\n".join(lines))
    given = ["same"] * 3 + [MAIL, MAIL, f"tel/{PHONE}", "#alone"]
    given += ["plain/x/part.jsonl/2", "given/given-a.jsonl/9", "", "same#given/given-a.jsonl/1"]
    records = [
        {"id": name, "url": f"http://levin.ru/{number}", "text": texts.pop()} for number, name in enumerate(given)
    ]
    records[3]["url"] = f"http://levin.ru/?mail={MAIL.replace('@', '%40')}"
    records[6] |= {"metadata": {"author": f"Anna <{MAIL}>"}, "phone": PHONE, "text": f"Write to {MAIL}. " + texts.pop()}
    records += [{"id": f"{MAIL}/short", "url": f"mailto:{MAIL}", "text": f"Too short. {MAIL}"}]
    records += [{"id": f"{MAIL}/bad", "url": f"mailto:{MAIL}"}]
    (folder / "in/given-a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "in/given-b.jsonl").write_text(json.dumps({"id": "same", "text": texts.pop()}))
    path = config_in(folder)
    assert main([str(path)]) == 0
    return path


def ids(run_dir: Path) -> list[str]:
    tables = sorted((run_dir / "language").glob("*/*.parquet"))
    return [name for path in tables for name in pq.read_table(path)["id"].to_pylist()]


def test_no_two_documents_have_one_id(config: Path) -> None:
    run_dir = config.parent / "run"
    hashed = published_id(MAIL)
    found = ids(run_dir)
    # One record has the id that another got to make it unique, so both get shard and row appended.
    second = [name for name in found if name.startswith("same#given/given-a.jsonl/1#given/0000-")]
    assert sorted(set(found) - set(second)) == sorted(
        [
            f"plain/{part_of}/part.jsonl/{line}"
            for part_of in "xy"
            for line in (1, 2, 3, 4)
            if (part_of, line) != ("x", 2)
        ]
        + [f"plain/x/part.jsonl/2#{location}" for location in ("plain/x/part.jsonl/2", "given/given-a.jsonl/8")]
        + [f"same#given/given-{location}" for location in ("a.jsonl/2", "a.jsonl/3", "b.jsonl/1")]
        + [f"{hashed}#given/given-a.jsonl/{line}" for line in (4, 5)]
        + [published_id(f"tel/{PHONE}"), "#alone", "given/given-a.jsonl/9", "given/given-a.jsonl/10"]
        + [published_id(f"{MAIL}/short")]
    )
    assert len(second) == 2
    assert len(set(found)) == len(found) == 21
    ledger = json.loads((run_dir / "ledger.json").read_text())
    notes = {name: source["notes"] for name, source in ledger["stages"][0]["sources"].items()}
    assert notes["plain"]["ids made unique"] == 1 and notes["given"]["ids made unique"] == 7
    plan = Plan.open(run_dir / "plan")
    in_rows = {tuple(one[key] for key in ("source", "shard", "document")): one["document_id"]
               for sample in range(plan.num_samples) for one in plan.provenance(sample)}  # fmt: skip
    assert len(set(in_rows.values())) == len(in_rows) > 10
    assert verify.main([str(run_dir)]) == 0  # shards that were written again have checksums of their new content


def test_ids_do_not_depend_on_workers_or_on_where_the_files_are(config: Path, tmp_path: Path) -> None:
    shutil.copytree(config.parent / "in", tmp_path / "moved")
    moved = tmp_path / "data.toml"
    moved.write_text(config.read_text().replace(f"{config.parent}/in", f"{tmp_path}/moved"))
    override = [f"run.dir={tmp_path}/run", "run.workers=3", "--until", "language"]
    assert main([str(config), *override]) == 0
    one, three = published(config.parent / "run"), published(tmp_path / "run")
    assert len(three) > 10 and three.items() <= one.items()
    assert main([str(moved), *override]) == 0
    assert ids(tmp_path / "run") == ids(config.parent / "run")


def test_an_id_leads_to_one_document(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = config.parent / "run"
    for name in [*ids(run_dir)[::4], f"tel/{PHONE}"]:
        assert explain.main([str(config), "--id", name]) == 0
        said = capsys.readouterr().out
        assert said.count("  extract  ") == 1 and said.startswith(published_id(name)) and PHONE not in said
    for shared, count in (("same", 3), (MAIL, 2)):  # the fourth "same" got a second suffix
        with pytest.raises(ConfigError) as error:
            explain.main([str(config), "--id", shared])
        assert MAIL not in str(error.value)
        named = [name for name in ids(run_dir) if name.startswith(f"{published_id(shared)}#")]
        assert len(named) >= count and all(repr(name) in str(error.value) for name in named)
        # The remedy in the message works.
        assert explain.main([str(config), "--id", named[0]]) == 0
    capsys.readouterr()

    url = f"http://levin.ru/?mail={MAIL.replace('@', '%40')}"
    (tmp_path / "list").write_text(
        "\n".join(["# of today", "same", f"tel/{PHONE}", url, "#alone", f"{MAIL}/short", f"{MAIL}/none"])
    )
    assert takedown.main([str(config), str(tmp_path / "list"), "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out/takedown.json").read_text())
    assert sorted(one["id"] for one in report["documents"]) == sorted(
        [published_id(f"tel/{PHONE}"), f"{published_id(MAIL)}#given/given-a.jsonl/4", "#alone"]
    )
    assert report["dropped_earlier"] == [published_id(f"{MAIL}/short")]
    assert report["not_found"] == [published_id(f"{MAIL}/none")]
    assert list(report["given_to_several"]) == ["same"]
    said = capsys.readouterr().out + (tmp_path / "out/takedown.json").read_text()
    assert "same: nothing is removed" in said and MAIL not in said and PHONE not in said


def test_nothing_personal_is_shown_even_without_pii(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from data_pipeline.report.ledger_tables import main as report

    run_dir = config.parent / "run"
    assert report([str(config)]) == 0
    shown = capsys.readouterr().out
    for path in run_dir.rglob("*"):
        if path.is_file() and path.suffix not in (".zst", ".bin", ".model") and "tokens" not in path.parts:
            tables = json.dumps(pq.read_table(path).to_pylist(), default=str) if path.suffix == ".parquet" else ""
            shown += tables or path.read_text(errors="replace")
    assert published_id(f"{MAIL}/bad") in shown and "mailto:<EMAIL>" in shown
    assert not any(secret in shown for secret in (MAIL, MAIL.replace("@", "%40"), PHONE))
    # Without [pii], the texts and URLs of documents are not changed.
    documents = [one for path in run_dir.glob("documents/*/given/*.zst") for one in read_records(path)]
    assert any(MAIL.replace("@", "%40") in one["metadata"]["url"] for one in documents)


def test_with_pii_nothing_personal_comes_out_of_a_run(config: Path, tmp_path: Path) -> None:
    shutil.copytree(config.parent / "run", tmp_path / "run")  # so that only pii and later stages run
    assert main([str(config), f"run.dir={tmp_path}/run", "pii={}"]) == 0
    documents = [one for path in sorted(tmp_path.glob("run/documents/*/*/*.zst")) for one in read_records(path)]
    alone = next(one for one in documents if one["id"] == "#alone")
    assert alone["text"].startswith("Write to <EMAIL>. ")
    assert alone["metadata"]["record"] == {"author": "Anna <<EMAIL>>"}
    assert alone["metadata"]["fields"] == {"phone": "<PHONE>"}
    assert any(one["metadata"].get("url") == "http://levin.ru/?mail=<EMAIL>" for one in documents)
    tokenizer = Tokenizer.load(tmp_path / "run/tokenizer")
    stores = [Store(path.with_suffix("")) for path in sorted(tmp_path.glob("run/tokens/*/given/*.bin"))]
    tokens = [tokenizer.decode(store.tokens(number).tolist()) for store in stores for number in range(len(store))]
    assert any(text.startswith("Write to <EMAIL>. ") for text in tokens)
    shown = json.dumps(documents) + "".join(tokens)
    assert not any(secret in shown for secret in (MAIL, MAIL.replace("@", "%40"), PHONE))


@pytest.mark.parametrize(
    ("patterns", "paths", "names"),
    [
        (["/c/a"], ["/c/a/p.jsonl", "/c/a/b/p.jsonl"], ["p.jsonl", "b/p.jsonl"]),
        (["/c/*/p.jsonl"], ["/c/x/p.jsonl"], ["x/p.jsonl"]),  # "*" may match several folders
        (["/c/a/p.jsonl"], ["/c/a/p.jsonl"], ["p.jsonl"]),
        (["/c/a/p.jsonl", "/c/b/p.jsonl"], ["/c/a/p.jsonl", "/c/b/p.jsonl"], ["a/p.jsonl", "b/p.jsonl"]),
        (["/c/a/**/*.jsonl", "/d/*.jsonl"], ["/c/a/x/p.jsonl", "/d/p.jsonl"], ["c/a/x/p.jsonl", "d/p.jsonl"]),
        (["s3://one/k", "s3://two/k"], ["s3://one/k/p.gz", "s3://two/k/p.gz"], ["one/k/p.gz", "two/k/p.gz"]),
        (["s3://one/k/*.gz"], ["s3://one/k/p.gz"], ["p.gz"]),
        (["s3://one/k", "/c/*"], ["s3://one/k/p.gz", "/c/p.gz"], ["s3://one/k/p.gz", "p.gz"]),
        (["https://a.org/x/p.gz", "https://b.org/x/p.gz"], ["https://a.org/x/p.gz"], ["a.org/x/p.gz"]),
    ],
)
def test_files_are_named_below_what_their_patterns_share(
    patterns: list[str], paths: list[str], names: list[str], tmp_path: Path
) -> None:
    here = [item if "://" in item else f"{tmp_path}{item}" for item in [*patterns, *paths]]
    patterns, paths = here[: len(patterns)], here[len(patterns) :]
    for path in paths:
        if "://" not in path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).touch()
    roots = roots_of(patterns, paths)
    assert [name_of(path, roots) for path in paths] == names


def test_only_personal_ids_are_hashed() -> None:
    kept = ["sotu/1847_james_polk_d", "<urn:uuid:123e4567-e89b-12d3-a456-426614174000>", "1629371938402304000", "春/1"]
    kept += ["CC-MAIN-2024-10/segments/1707947473347.0/warc/CC-MAIN-20240220211055-20240221001055-00000.warc.gz/7"]
    kept += ["http://example.org/2024/02/11/a-b?page=2", "@user", "213/456/7890.txt", "npm/vue@2.6.11/dist/vue.js"]
    assert [published_id(one) for one in kept] == kept
    personal = [MAIL, f"x/{MAIL}.txt", f"u?m={MAIL.replace('@', '%40')}", f"tel/{PHONE}", "ips/81.2.69.142", "x" * 501]
    hashed = [published_id(one) for one in personal]
    assert len(set(hashed)) == len(hashed) and hashed == list(map(published_id, personal))
    assert all(one.startswith("id-") and len(one) == 35 and published_id(one) == one for one in hashed)
    assert id_of_location("s", f"{MAIL}.jsonl", 3) == published_id(f"s/{MAIL}.jsonl/3")
