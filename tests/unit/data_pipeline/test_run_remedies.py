"""Remedies in what a data run says of its files and results: each is done, and the run or its plan is right then."""

import re
import shutil
from pathlib import Path

import pytest

from data_pipeline import command
from data_pipeline.core.shards import read_records
from data_pipeline.mixture.rows import Plan
from data_pipeline.provenance import explain
from tests.small_sources import write_config


def test_a_run_begins_once_its_files_hold_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [str(write_config(tmp_path, {"big": 3}, "")), "--until", "extract"]
    lines = (tmp_path / "big.jsonl").read_text()
    (tmp_path / "big.jsonl").write_text("\n\n")
    assert command.main(args) == 1
    words = "the files of all sources hold no record; check sources.*.files and their format"
    assert words in " ".join(capsys.readouterr().err.split())
    (tmp_path / "big.jsonl").write_text(lines)
    assert command.main(args) == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a finished run's config; a tenth of its documents are held out."""
    folder = tmp_path_factory.mktemp("finished")
    mixture = "[mixture]\nseq_length = 32\nsamples = 20\nweights = { big = 1.0 }\n"
    config = write_config(folder, {"big": 40}, mixture, "[heldout]\nshare = 0.1\n")
    assert command.main([str(config)]) == 0
    return config


def test_a_plan_opens_once_its_damaged_tokenizer_is_made_anew(finished: Path, tmp_path: Path) -> None:
    """Follows what is said of a tokenizer that is cut short, and of one that is gone."""
    run = tmp_path / "run"
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:-1]), Path.unlink):
        shutil.copytree(finished.parent / "run", run)
        damage(run / "tokenizer/tokenizer.model")
        with pytest.raises(ValueError, match=r"delete the folder \S+ and run `trivium data run` again") as told:
            Plan.open(run / "plan")
        shutil.rmtree(re.findall(r"delete the folder (\S+)", str(told.value))[0])
        assert command.main([str(finished), f"run.dir={run}"]) == 0
        Plan.open(run / "plan")
        shutil.rmtree(run)


def test_an_earlier_plan_is_removed_as_the_run_says(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished.parent / "run", tmp_path / "run"))
    args = [str(finished), f"run.dir={run}", "mixture.seed=4"]
    assert command.main(args) == 0
    told = r"the earlier plan is kept in (\S+) for training runs that use it; remove it when none does"
    kept = re.search(told, capsys.readouterr().out)
    assert kept and Path(kept[1]).is_dir()
    shutil.rmtree(kept[1])
    assert command.main(args) == 0
    assert not re.search(told, capsys.readouterr().out) and Plan.open(run / "plan").num_samples == 20


def test_a_held_out_document_is_said_to_be_in_no_row(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished.parent / "run"
    shard = next((run / "documents/heldout/big").glob("*.zst"))
    assert explain.main([str(finished), "--id", next(iter(read_records(shard)))["id"]]) == 0
    assert re.search(r"^  plan +held out: in no training row$", capsys.readouterr().out, re.M)
