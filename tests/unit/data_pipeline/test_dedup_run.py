"""The dedup stage on real documents: addresses, true similarity, an earlier run, and what it refuses."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from configs.data import DataConfig
from configs.loader import ConfigError, validate, write
from data_pipeline.dedup.stages import dedup_stages
from data_pipeline.executors.local import LocalExecutor
from data_pipeline.ledger import Tally
from data_pipeline.stage import perform, sole_user
from data_pipeline.stages import Workshop, document_stages
from data_pipeline.tables import read_table, shards_of

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    """Ten documents; copy: the first again; near: the second with a change in each half; moved: a text of its own."""
    with gzip.open(ROOT / "data/demo/english.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"][:3000] for line in lines][::40][:12]
    found = [{"id": f"doc{n}", "text": text, "metadata": {"url": f"http://a.org/{n}"}} for n, text in enumerate(texts)]
    near = texts[1][:700] + " Inserted here. " + texts[1][700:2000] + " And there too. " + texts[1][2000:]
    found.append({"id": "copy", "text": texts[0].upper(), "metadata": {"url": "http://a.org/copy"}})
    found.append({"id": "near", "text": near, "metadata": {"url": "http://a.org/near"}})
    found.append({"id": "moved", "text": texts[11][::-1], "metadata": {"url": "https://www.a.org/2#end"}})
    return found


def verdicts(folder: Path, records: list[dict[str, Any]], **dedup: Any) -> dict[str, dict[str, Any]]:
    """id -> its row of the dedup stage's table, of a run in `folder`/run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tree = {
        "run": {"dir": str(folder / "run"), "workers": 1, "shard_bytes": 4_000},
        "sources": {"s": {"files": [str(folder / "in.jsonl")], "format": "jsonl", "rules": {"any": "none"}}},
        "rules": {"none": {}},
        "dedup": dedup,
        "mixture": {"weights": {"s": 1.0}},
    }
    config = validate(DataConfig, tree)
    run_dir = folder / "run"
    with sole_user(run_dir):
        shop = Workshop(config, run_dir, Console(file=io.StringIO()), LocalExecutor(1))
        stages = document_stages(shop)
        stages += dedup_stages(shop, {stage.name: stage for stage in stages})
        write(config, run_dir / "config.toml")
        tallies: dict[str, Tally] = {}
        for stage in stages:
            before = tallies[stage.counted_against.name] if stage.counted_against else None
            tallies[stage.name] = perform(stage, run_dir, before).tally
    found = [row for shard in shards_of(run_dir / "dedup") for row in read_table(run_dir / "dedup", shard).to_pylist()]
    assert len(shards_of(run_dir / "dedup")) > 2 and len(found) == len(records)
    assert not (run_dir / "dedup" / "work").exists()
    return {row["id"]: row for row in found}


def dropped(rows: dict[str, dict[str, Any]]) -> dict[str, tuple[str, str]]:
    return {name: (row["verdict"], row["survivor"]) for name, row in rows.items() if row["verdict"]}


def test_why_each_duplicate_goes(records: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = verdicts(tmp_path, records, url=True)
    found = dropped(rows)
    # The capitals have no stop words and no other quality than the original; the first wins.
    assert found.pop("copy") == ("exact_duplicate", "doc0")
    (near,) = (name for name in found if found[name][0] == "near_duplicate")
    assert {near, found[near][1]} == {"doc1", "near"}
    (moved,) = (name for name in found if found[name][0] == "url_duplicate")
    assert {moved, found[moved][1]} == {"doc2", "moved"}
    assert len(found) == 2
    assert rows["doc0"]["cluster"] == rows["copy"]["cluster"] != rows["doc1"]["cluster"]
    assert {row["cluster_size"] for row in rows.values()} == {1, 2}
    assert rows["doc0"]["cluster_size"] == 2


def test_true_similarity_decides_when_asked_for(records: list[dict[str, Any]], tmp_path: Path) -> None:
    # The changes touch some 15 of 500 n-grams: a similarity of about 0.97.
    assert set(dropped(verdicts(tmp_path / "low", records, verify=0.9))) in ({"copy", "near"}, {"copy", "doc1"})
    assert set(dropped(verdicts(tmp_path / "high", records, verify=0.995))) == {"copy"}


def test_documents_of_an_earlier_run_are_not_kept_again(records: list[dict[str, Any]], tmp_path: Path) -> None:
    verdicts(tmp_path / "old", records[:6])
    rows = verdicts(tmp_path / "new", records[1:2] + records[5:], index=[str(tmp_path / "old/run")])
    found = dropped(rows)
    assert found == dict.fromkeys(("doc1", "near", "doc5", "copy"), ("in_index", ""))


def test_an_index_of_other_signatures_is_refused(records: list[dict[str, Any]], tmp_path: Path) -> None:
    verdicts(tmp_path / "old", records[:6])
    index = [str(tmp_path / "old/run")]
    with pytest.raises(ConfigError, match=r"dedup\.bands = 20 here and 14 in the index .*old/run"):
        verdicts(tmp_path / "new", records, index=index, bands=20)
    with pytest.raises(ConfigError, match="holds no finished signatures"):
        verdicts(tmp_path / "new", records, index=[str(tmp_path / "none")])
    with pytest.raises(ConfigError, match=r"dedup\.verify = 0\.8 compares texts"):
        verdicts(tmp_path / "new", records, index=index, verify=0.8)
