"""Compares tracing of documents to rows and steps, and back, with brute force; tests plans without some documents."""

import errno
import json
import re
import shutil
from collections import defaultdict
from pathlib import Path

import pytest

from configs.loader import ConfigError
from configs.mixture import PlanConfig
from data_pipeline.mixture.plan_files import build_plan
from data_pipeline.mixture.rows import Plan
from data_pipeline.provenance import replan, takedown, trace
from data_pipeline.provenance.lookup import stored, uses
from data_pipeline.tokens import store
from data_pipeline.tokens.tokenizer import Tokenizer
from tests.data_runs import data_config
from tests.shards import write_shard

L, SAMPLES, BATCH = 64, 600, 16
MIXTURE = {"english": 0.5, "chinese": 0.2, "code": 0.3}


@pytest.fixture(scope="module")
def run_dir(tokens: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a data run with tokens, tokenizer and plan."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(tokens, folder / "tokens")
    shutil.copytree(tokenizer_folder, folder / "tokenizer")
    settings = PlanConfig(seq_length=L, samples=SAMPLES, seed=1, weights=MIXTURE)
    build_plan(folder / "tokens", folder / "tokenizer", folder / "plan", settings)
    (folder / "plan" / "stage.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def training_run(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    data_span = {"first_step": 0, "first_sample": 0, "global_batch_size": BATCH, "plan": f"{run_dir}/plan"}
    (folder / "history.json").write_text(json.dumps([{**data_span, "data": Plan.open(run_dir / "plan").fingerprint}]))
    return folder


@pytest.fixture
def config(run_dir: Path, tmp_path: Path) -> Path:
    return data_config(
        tmp_path / "data.toml",
        {name: {"files": ["x"], "format": "jsonl", "rules": {"any": "r"}} for name in MIXTURE},
        run={"dir": str(run_dir)},
        rules={"r": {}},
        mixture={"seq_length": L, "samples": SAMPLES, "seed": 1, "weights": MIXTURE},
    )


def brute_force(plan: Plan) -> dict[tuple[str, str, int], list[tuple[int, int, int]]]:
    found = defaultdict(list)
    for sample in range(plan.num_samples):
        for segment in plan.provenance(sample):
            key = (segment["source"], segment["shard"], segment["document"])
            found[key].append((sample, segment["start"], segment["length"]))
    return {key: sorted(uses_of_one) for key, uses_of_one in found.items()}


def test_uses_are_all_segments_of_a_document(run_dir: Path) -> None:
    plan = Plan.open(run_dir / "plan")
    expected = brute_force(plan)
    assert len(expected) > 100
    for (source, shard, document), uses_of_one in expected.items():
        assert plan.uses(source, shard, document) == uses_of_one
    assert plan.uses("poems", "00000", 0) == []
    with pytest.raises(ValueError, match="there is no token store '77777' here; there are 00000, 00001"):
        plan.uses("code", "77777", 0)


def test_held_out_documents_are_in_no_row(run_dir: Path) -> None:
    plan = Plan.open(run_dir / "plan")
    held = [one for one in stored(run_dir, _ids(run_dir)) if one.split == "heldout"]
    assert len(held) == 9
    assert uses(plan, held) == {one: [] for one in held}


def _ids(run_dir: Path) -> list[str]:
    plan = Plan.open(run_dir / "plan")
    names = {segment["document_id"] for sample in range(plan.num_samples) for segment in plan.provenance(sample)}
    held = [shards.stores for shards in (rows.shards for rows in plan._heldout)]
    return sorted(names | {store.document_id(n) for stores in held for store in stores for n in range(len(store))})


def test_a_step_is_its_samples(run_dir: Path, training_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trace.main(["--run", str(training_run), "--step", "7", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    plan = Plan.open(run_dir / "plan")
    samples = range(7 * BATCH, 8 * BATCH)
    assert found == [{"sample": i, **segment} for i in samples for segment in plan.provenance(i)]
    last = SAMPLES // BATCH - 1
    with pytest.raises(ConfigError, match=f"make steps 0 to {last}, {BATCH} each"):
        trace.main(["--run", str(training_run), "--step", str(last + 1)])
    with pytest.raises(ConfigError, match=r"name the run\.dir of a pretraining run"):
        trace.main(["--run", str(run_dir), "--step", "0"])


def test_a_takedown_leaves_nothing_of_a_document(
    run_dir: Path,
    training_run: Path,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = Plan.open(run_dir / "plan")
    gone = [plan.provenance(i)[0]["document_id"] for i in (3, 99)]
    (held,) = [row.id for row in stored(run_dir, _ids(run_dir)) if row.split == "heldout" and row.source == "code"][:1]
    (tmp_path / "list.txt").write_text("\n".join([*gone, "# a remark", "", held, "nobody"]))
    out = tmp_path / "clean"
    command = [str(config), str(tmp_path / "list.txt"), "--out", str(out), "--run", str(training_run)]
    (run_dir / "language").mkdir(exist_ok=True)
    (run_dir / "ledger.json").write_text('{"stages": [{"name": "language"}]}')  # the plan is of an earlier run
    with pytest.raises(ConfigError, match=r"holds no plan yet; run: trivium data run"):
        takedown.main(command)
    (run_dir / "ledger.json").unlink()
    assert takedown.main([*command, "--dry-run"]) == 0
    assert not out.exists()

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(takedown, "write_atomic", fail)
        takedown.main(command)
    assert not list(tmp_path.glob("*clean*"))  # so that the same command can be run again
    assert takedown.main(command) == 0
    said = capsys.readouterr().out
    assert "nobody: not found" in said and "without 3 documents" in said.replace("\n", " ")

    report = {entry["id"]: entry for entry in json.loads((out / "takedown.json").read_text())["documents"]}
    expected = brute_force(plan)
    for name in gone:
        entry = report[name]
        samples = sorted({i for i, _, _ in expected[entry["source"], entry["store"], entry["document"]]})
        assert entry["rows"] == {"plan": samples}
        assert entry["steps"] == sorted({i // BATCH for i in samples})
    assert report[held]["split"] == "heldout" and report[held]["rows"] == {"plan": []}

    clean = Plan.open(out)
    assert clean.num_samples == SAMPLES
    left = {segment["document_id"] for i in range(SAMPLES) for segment in clean.provenance(i)}
    assert left and not left & {*gone, held}
    assert clean.heldout_rows("code") < plan.heldout_rows("code")
    assert {source["name"]: source["samples"] for source in clean.description["sources"]} == {
        source["name"]: source["samples"] for source in plan.description["sources"]
    }
    with pytest.raises(ConfigError, match=re.escape(f"--out {out} exists already")):
        takedown.main(command)
    below = tmp_path / "list.txt/clean"
    for main, more in ((takedown.main, [str(tmp_path / "list.txt")]), (replan.main, ["--after", "step_1"])):
        with pytest.raises(ConfigError, match=r"--out = '.*clean': .*list\.txt is a file; name a folder"):
            main([str(config), *more, "--out", str(below)])


def test_documents_are_found_by_address(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [{"text": "abc", "id": str(n), "metadata": {"record": {"url": f"https://a.org/{n}"}}} for n in range(3)]
    store.build(write_shard(tmp_path / "in.jsonl.zst", records), tmp_path / "tokens/train/web/00000", small_tokenizer)
    found = stored(tmp_path, [], ["http://www.a.org/1/"])
    assert [(one.source, one.store, one.document, one.id) for one in found] == [("web", "00000", 1, "1")]
