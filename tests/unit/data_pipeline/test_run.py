"""Tests conservation of counts, skipping and messages of data runs; tests/e2e has workers and killed runs."""

import contextlib
import gzip
import io
import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from configs.cli import entrypoint
from configs.data import DataConfig
from configs.loader import ConfigError, load, toml
from data_pipeline.command import main
from data_pipeline.core import stage
from data_pipeline.core.shards import read_records
from data_pipeline.mixture.earlier import find, first_difference, note_use
from data_pipeline.mixture.rows import Plan
from data_pipeline.provenance import explain
from tests.data_runs import ROOT, ledger, prose_and_pages, published, run_folder

BROKEN = {"bad_json": 1, "invalid_utf8": 1, "missing_text": 1}  # counts of the broken lines that `inputs` writes


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a slice of the demo corpus with an exact duplicate, a near-duplicate and three broken lines."""
    folder = tmp_path_factory.mktemp("inputs") / "in"
    folder.mkdir()
    with gzip.open(ROOT / "data/demo/english.jsonl.gz", "rb") as lines:
        records = [json.loads(line) for line in lines.readlines()[::9]]
    for record in records:
        record["text"] = record["text"][:3000]
    whole, near = dict(records[0], id="copy"), dict(records[1], id="near", text=records[1]["text"] + " And one more.")
    lines = [json.dumps(record).encode() for record in [*records, whole, near]]
    lines[5:5] = [b'{"text": "cut', b'{"id": "no text"}', b'{"text": "\xff"}']
    (folder / "prose-a.jsonl").write_bytes(b"\n".join(lines[:30]))
    (folder / "prose-b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines[30:])))
    content = (ROOT / "data/demo/web.warc.gz").read_bytes()
    cut = content.index(b"\x1f\x8b\x08", 150_000)
    (folder / "pages.warc.gz").write_bytes(content[:cut])
    return folder


@pytest.fixture
def config(inputs: Path, tmp_path: Path) -> Path:
    (tmp_path / "in").symlink_to(inputs)
    return prose_and_pages(tmp_path / "data.toml", tmp_path / "in")


@dataclass(frozen=True)
class Finished:
    """A run with all stages done, and what it printed."""

    config: Path
    folder: Path
    said: str

    def counts(self, source: str) -> dict[str, dict]:
        """Returns the counts of documents of `source`, by stage."""
        return {name: stage["sources"][source] for name, stage in ledger(self.folder).items()}


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    config = prose_and_pages(folder / "data.toml", inputs)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main([str(config)]) == 0
    return Finished(config, folder / "run", " ".join(said.getvalue().split()))


def test_a_run_drops_what_is_broken_or_a_copy(finished: Finished) -> None:
    counts = finished.counts("prose")
    dropped = counts["extract"]["dropped"]
    assert {reason: dropped[reason]["documents"] for reason in dropped} == BROKEN
    assert counts["dedup"]["dropped"]["exact_duplicate"]["documents"] == 1
    assert counts["dedup"]["dropped"]["near_duplicate"]["documents"] >= 1


def test_every_stage_keeps_or_drops_what_came_in(finished: Finished) -> None:
    for counted in ledger(finished.folder).values():
        for counts in counted["sources"].values():
            for unit in ("documents", "bytes"):
                gone = sum(amount[unit] for amount in counts["dropped"].values())
                assert counts["in"][unit] == counts["kept"][unit] + gone


def test_records_that_cannot_be_used_are_set_aside_and_told(finished: Finished) -> None:
    rejected = [json.loads(line) for line in (finished.folder / "extract/rejected/prose-0000.jsonl").open()]
    assert [(record["position"], record["reason"]) for record in rejected] == [
        (6, "bad_json"),
        (7, "missing_text"),
        (8, "invalid_utf8"),
    ]
    assert json.loads((finished.folder / "ledger.json").read_text())["set_aside"] == BROKEN
    reasons = "3 records set aside (bad_json 1, invalid_utf8 1, missing_text 1)"
    assert f"{reasons}, within extract.max_bad_share = 0.1" in finished.said
    assert str(finished.folder / "extract/rejected") in finished.said


def test_documents_written_are_those_counted(finished: Finished) -> None:
    kept = finished.counts("prose")["documents"]["kept"]
    written = [one for path in finished.folder.glob("documents/*/prose/*.jsonl.zst") for one in read_records(path)]
    assert len(written) == kept["documents"]
    assert sum(len(document["text"].encode()) for document in written) == kept["bytes"]
    assert list(finished.folder.glob("documents/heldout/prose/*.jsonl.zst"))


def test_a_document_is_followed_through_the_run(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain.main([str(finished.config), "--id", "copy"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  extract    source prose, shard prose/") for line in told)
    assert any(re.match(r"    word_count +\d+ +at least 50$", line) for line in told)
    assert any("cluster" in line and "of 2 documents; dropped: exact_duplicate; " in line for line in told)
    assert explain.main([str(finished.config), "--id", "no text"]) == 0
    assert "set aside: missing_text" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--id 'nobody' is not a document of"):
        explain.main([str(finished.config), "--id", "nobody"])


def test_what_is_done_is_skipped(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    before = published(finished.folder)
    assert main([str(finished.config)]) == 0
    assert all(not stage["fresh"] for stage in ledger(finished.folder).values())
    assert published(finished.folder) == before

    capsys.readouterr()
    assert main([str(finished.config), "--dry-run", "rules.english.word_count.min=60"]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line)
    assert said["score"].startswith("done") and said["signatures"].startswith("done")
    assert said["filter"].startswith("would run") and said["plan"].startswith("would run")


def test_a_damaged_stage_is_made_again_to_the_same_bytes(finished: Finished) -> None:
    before = published(finished.folder)
    (finished.folder / "filter/prose/0000-0000.parquet").unlink()
    assert main([str(finished.config)]) == 0
    assert ledger(finished.folder)["filter"]["fresh"] and not ledger(finished.folder)["score"]["fresh"]
    assert published(finished.folder) == before


def test_changed_code_is_told_in_one_sentence(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs again after a change of code: repeats the stages concerned, says so and why, and writes the same bytes."""
    before = published(finished.folder)
    shutil.copytree(ROOT / "data_pipeline", tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    for module in ("dedup/greedy.py", "mixture/packing.py"):
        with (tmp_path / "copy" / module).open("a") as source:
            source.write("\n# changed")
    monkeypatch.setattr(stage, "_HERE", tmp_path / "copy")
    stage._source.cache_clear()
    reason = "the code of these stages, or a package that they use, has changed since they were made;"
    for dry in (["--dry-run"], []):
        assert main([str(finished.config), *dry]) == 0
        told = [line for line in capsys.readouterr().out.splitlines() if "has changed" in line]
        assert told == [f"{reason} they run again, with all stages that need them: dedup, plan"]
    assert [name for name, one in ledger(finished.folder).items() if not one["fresh"]] == [
        "extract",
        "language",
        "score",
        "filter",
        "signatures",
    ]
    assert published(finished.folder) == before
    assert main([str(finished.config)]) == 0
    assert "has changed" not in capsys.readouterr().out
    stage._source.cache_clear()


def test_too_many_broken_records_stop_the_run(config: Path, capsys) -> None:
    assert main([str(config), "extract.max_bad_share=0.001"]) == 1
    said = capsys.readouterr().err
    assert "source prose: 3 of" in said
    assert "extract.max_bad_share = 0.001" in said
    assert "extract.failed/rejected/" in said
    assert (run_folder(config) / "extract.failed/rejected/prose-0000.jsonl").is_file()
    assert not (run_folder(config) / "extract").exists()
    counts = json.loads((run_folder(config) / "extract.failed/ledger.json").read_text())["prose"]
    assert sum(amount["documents"] for amount in counts["dropped"].values()) == 3
    for once_more in range(2):  # the stage runs, and is found done
        assert main([str(config), "--until", "extract"]) == 0
        assert not (run_folder(config) / "extract.failed").exists()
        assert main([str(config), "extract.max_bad_share=0.001"]) == 1 or once_more
        assert (run_folder(config) / "extract.failed/rejected").is_dir()


def test_folders_loops_and_blocked_pages_in_one_run(config: Path, tmp_path: Path, capsys) -> None:
    """Runs on folders, from which documents reach the plan; a changed blocklist counts as changed input."""
    tree = tomllib.loads(config.read_text())
    tree["sources"] |= {
        "text": {"files": [f"{tmp_path}/texts"], "format": "text", "rules": {"en": "english"}},
        "code": {"files": [f"{tmp_path}/code"], "format": "code", "skip_vendored": True, "rules": {"any": "code"}},
    }
    tree["extract"]["blocklist"] = {"domains": [f"{tmp_path}/blocked"]}
    tree["rules"]["code"] = {"word_count": {"min": 1}}
    tree["mixture"]["weights"] |= {"text": 1.0, "code": 1.0}
    config.write_bytes(toml(tree))
    with gzip.open(ROOT / "data/demo/english.jsonl.gz", "rb") as lines:
        for number, line in enumerate(lines.readlines()[1:40:3]):
            folder = tmp_path / f"texts/{number % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.txt").write_text(json.loads(line)["text"][:2000])
    (tmp_path / "texts/0/loop").symlink_to(tmp_path / "texts")
    with gzip.open(ROOT / "data/demo/code.jsonl.gz", "rb") as lines:
        for number, line in enumerate(lines.readlines()[:20]):
            for folder in ("code/a", "code/vendor"):
                (tmp_path / folder).mkdir(parents=True, exist_ok=True)
                (tmp_path / folder / f"{number}.py").write_text(json.loads(line)["text"])
    (tmp_path / "blocked").write_text("nobody.example\n")
    assert main([str(config)]) == 0
    assert "symlink_loop 1)" in capsys.readouterr().out
    extract = ledger(run_folder(config))["extract"]["sources"]
    assert extract["text"]["kept"]["documents"] == 13
    assert extract["text"]["dropped"] == {"symlink_loop": {"documents": 1, "bytes": 0}}
    assert extract["code"]["kept"]["documents"] == 20
    assert extract["code"]["dropped"] == {"vendored_folder": {"documents": 1, "bytes": 0}}
    assert not extract["pages"]["dropped"]
    written = [
        record for path in run_folder(config).glob("documents/*/code/*.jsonl.zst") for record in read_records(path)
    ]
    assert written and all(document["id"].startswith("code/a/") for document in written)
    assert written[0]["metadata"]["code_language"] == "Python"

    page = next(read_records(next(run_folder(config).glob("extract/pages/*.zst"))))
    (tmp_path / "blocked").write_text(page["metadata"]["url"].split("/")[2] + "\n")
    assert main([str(config)]) == 0, "every page is from that host, and the other sources go on"
    assert "warning: source pages has no usable record (blocked_url " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ('sources.prose.files=["in/none.jsonl"]', "sources.prose.files: 'in/none.jsonl' matches no file"),
        ("sources.prose.fromat=jsonl", "unknown key 'sources.prose.fromat'"),
        ("rules.english.word_counts.min=5", "unknown key 'rules.english.word_counts'"),
        ("sources.prose.rules.en=englich", "sources.prose.rules.en = 'englich' is no rule set; known under [rules]:"),
        ("rules.english.word_count.min=many", "rules.english.word_count.min = 'many'"),
        ("mixture.weights.poems=1.0", "mixture.weights.poems: there is no such source"),
        ("mixture.epochs.poems=1", "mixture.epochs.poems: there is no such source"),
        (
            "mixture.weights={prose=1.0} mixture.fim.pages=0.5",
            "mixture.fim.pages: mixture.weights leaves this source out",
        ),
        ("mixture.epochs.prose=0", "mixture.epochs.prose = 0.0 is not above 0"),
        ("mixture.fim.prose=1.5", "mixture.fim.prose = 1.5 is no share"),
    ],
)
def test_a_wrong_config_is_one_sentence_and_status_2(
    config: Path, override: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        entrypoint(main, [str(config), *override.split()])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert expected in said
    assert "Traceback" not in said


def test_the_command_ends_with_that_status(config: Path) -> None:
    command = [sys.executable, "-m", "data_pipeline.command", str(config), "mixture.epochs.prose=0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and "mixture.epochs.prose = 0.0 is not above 0" in done.stderr


def test_stages_run_alone_or_up_to_one(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs each stage by a command of its own, which publishes the same bytes as one command for all."""
    assert main([str(config), f"run.dir={config.parent}/whole"]) == 0
    names = list(ledger(config.parent / "whole"))
    with pytest.raises(
        ConfigError,
        match=r"--stage filter: it needs extract,.*, not done yet with this config and code; run .* by --until filter",
    ):
        main([str(config), "--stage", "filter"])
    assert main([str(config), "--until", "score", "--executor", "local"]) == 0
    assert list(ledger(run_folder(config))) == names[: 1 + names.index("score")]
    capsys.readouterr()
    assert main([str(config), "--stage", "filter", "--dry-run"]) == 0
    said = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert said["score"].startswith("done") and said["filter"].startswith("would run")
    assert said["plan"].startswith("not done, not asked for")
    for name in names:
        assert main([str(config), "--stage", name]) == 0
    assert [name for name, one in ledger(run_folder(config)).items() if one["fresh"]] == names[-1:]
    assert list(ledger(run_folder(config))) == names
    assert published(run_folder(config)) == published(config.parent / "whole")
    with pytest.raises(ConfigError, match="--stage dedup: it needs signatures"):
        main([str(config), "dedup.bands=5", "--stage", "dedup"])
    assert main([str(config), "rules.english.word_count.min=51", "--stage", "filter,dedup"]) == 0
    assert list(ledger(run_folder(config))) == names[: 1 + names.index("dedup")], (
        "what comes after is of other documents"
    )
    for arguments, message in (
        (["--stage", "sieve"], "--stage sieve: this run has no such stage; it has extract, language"),
        (["--until", "sieve"], "--until sieve: this run has no such stage"),
        (["--until", "score", "--stage", "score"], "exclude each other; give one of them"),
    ):
        with pytest.raises(ConfigError, match=message):
            main([str(config), *arguments])


def test_the_demo_config_is_valid() -> None:
    config = load(DataConfig, ROOT / "configs/data/demo.toml")
    assert set(config.sources) == {"english", "chinese", "code", "web"}


def test_mixture_takes_one_way_of_weighing(config: Path) -> None:
    with pytest.raises(ConfigError, match="exactly one of weights, temperature and unimax"):
        load(DataConfig, config, ["mixture.temperature=2.0"])


def test_the_forecast_is_printed_by_the_plan_stage_and_by_a_dry_run(config: Path, capsys) -> None:
    assert main([str(config), "--dry-run"]) == 0
    assert "Mixture:" not in capsys.readouterr().out, "there are no tokens yet"
    assert main([str(config)]) == 0
    said = capsys.readouterr().out
    tables = said[said.index("Mixture: 60 rows of 64") : said.index("[10/10] plan")]
    assert "prose" in tables and "best_fit" in tables and "concat" in tables
    before = (run_folder(config) / "plan/plan.json").read_bytes()
    assert main([str(config), "--dry-run"]) == 0
    assert tables in capsys.readouterr().out
    assert main([str(config), "--dry-run", "mixture.samples=50"]) == 0
    assert "Mixture: 50 rows of 64" in capsys.readouterr().out
    assert main([str(config), "--dry-run", "mixture.samples=900000"]) == 1
    assert "too few tokens for mixture.samples = 900,000" in capsys.readouterr().err
    assert (run_folder(config) / "plan/plan.json").read_bytes() == before


def test_other_settings_make_other_plans_and_keep_what_a_training_run_needs(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = run_folder(config)

    def kept() -> set[str]:
        return {path.name.split(".")[0] for path in run_dir.iterdir() if "." in path.name[1:] and path.is_dir()}

    assert main([str(config)]) == 0
    plain = ledger(run_dir)
    symbols = json.loads((run_dir / "tokenizer/info.json").read_text())["special_ids"]
    assert not any("fim" in name for name in symbols)
    first = Plan.open(run_dir / "plan")
    rows = [first.row(i).tokens for i in range(60)]

    assert main([str(config), "mixture.samples=70"]) == 0
    said = capsys.readouterr().out
    assert f"the earlier plan is kept in {run_dir}/plan.{first.fingerprint[:16]}" in said
    assert kept() == {"plan"}
    longer = Plan.open(run_dir / "plan")
    assert first_difference(longer, first, 60) is None

    # Fill-in-the-middle adds control symbols, so that the tokenizer and all tokens change.
    note_use(first.path.with_name(f"plan.{first.fingerprint[:16]}"), run_dir / "some_run")
    assert main([str(config), "mixture.fim.prose=0.5"]) == 0
    symbols = json.loads((run_dir / "tokenizer/info.json").read_text())["special_ids"]
    assert symbols["<|fim_middle|>"] == 10
    again = ledger(run_dir)
    assert [name for name in again if again[name]["fresh"]] == ["tokenizer", "tokens", "plan"]
    assert again.keys() == plain.keys()
    plan = Plan.open(run_dir / "plan")
    assert any("fim" in piece for i in range(60) for piece in plan.provenance(i))
    assert kept() == {"plan", "tokens", "tokenizer"}
    for fingerprint in (first.fingerprint, longer.fingerprint):
        found = find(run_dir / "plan", fingerprint)
        assert found is not None and all(np.array_equal(found.row(i).tokens, rows[i]) for i in range(60))

    # Once no training run needs them, they may be removed as the message says.
    for name in kept():
        for path in run_dir.glob(f"{name}.*/"):
            shutil.rmtree(path)
    capsys.readouterr()
    assert main([str(config), "mixture.fim.prose=0.5"]) == 0
    assert not any(stage["fresh"] for stage in ledger(run_dir).values())
    assert not kept() and "is kept in" not in capsys.readouterr().out
