"""Tests the dedup stage on real documents: addresses, true similarity, an earlier run, and refused settings."""

import gzip
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from configs.data import DataConfig
from configs.loader import ConfigError, validate, write
from data_pipeline.core.integrity import DamagedData
from data_pipeline.core.ledger import Tally
from data_pipeline.core.run_context import RunContext
from data_pipeline.core.stage import Stage, perform, sole_user
from data_pipeline.core.tables import read_table, shards_of
from data_pipeline.dedup.greedy import jaccard
from data_pipeline.executors.local_executor import LocalExecutor
from data_pipeline.run import recipe
from data_pipeline.scan.minhash import shingles

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    """Records of demo documents doc0, doc1, ... and three more.

    `copy` is doc0 in capitals, `near` is doc1 with two insertions, `moved` is another text at the address of doc2.
    """
    with gzip.open(ROOT / "data/demo/english.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"][:3000] for line in lines][::40][:12]
    found = [{"id": f"doc{n}", "text": text, "metadata": {"url": f"http://a.org/{n}"}} for n, text in enumerate(texts)]
    near = texts[1][:700] + " Inserted here. " + texts[1][700:2000] + " And there too. " + texts[1][2000:]
    found.append({"id": "copy", "text": texts[0].upper(), "metadata": {"url": "http://a.org/copy"}})
    found.append({"id": "near", "text": near, "metadata": {"url": "http://a.org/near"}})
    found.append({"id": "moved", "text": texts[11][::-1], "metadata": {"url": "https://www.a.org/2#end"}})
    return found


def config_of(folder: Path, shard_bytes: int = 4_000, **dedup: Any) -> DataConfig:
    tree = {
        "run": {"dir": str(folder / "run"), "workers": 1, "shard_bytes": shard_bytes},
        "sources": {"s": {"files": [str(folder / "in.jsonl")], "format": "jsonl", "rules": {"any": "none"}}},
        "rules": {"none": {}},
        "dedup": dedup,
        "mixture": {"weights": {"s": 1.0}},
    }
    return validate(DataConfig, tree)


def stages_of(config: DataConfig) -> list[Stage]:
    """Describes the stages up to dedup; raises ConfigError as a run does before it starts."""
    return recipe(RunContext(config, Path(config.run.dir), Console(file=io.StringIO()), LocalExecutor(1)))[:6]


def verdicts(
    folder: Path, records: list[dict[str, Any]], shard_bytes: int = 4_000, **dedup: Any
) -> dict[str, dict[str, Any]]:
    """Runs the pipeline up to dedup in `folder`/run; maps each id to its row of the dedup stage's table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config, run_dir = config_of(folder, shard_bytes, **dedup), folder / "run"
    with sole_user(run_dir):
        stages = stages_of(config)
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
    # The copy has the same quality score as the original, so the first one wins.
    assert found.pop("copy") == ("exact_duplicate", "doc0")
    (near,) = (name for name in found if found[name][0] == "near_duplicate")
    assert {near, found[near][1]} == {"doc1", "near"}
    (moved,) = (name for name in found if found[name][0] == "url_duplicate")
    assert {moved, found[moved][1]} == {"doc2", "moved"}
    assert len(found) == 2
    assert rows["doc0"]["cluster"] == rows["copy"]["cluster"] != rows["doc1"]["cluster"]
    assert {row["cluster_size"] for row in rows.values()} == {1, 2}
    assert rows["doc0"]["cluster_size"] == 2


def test_true_similarity_decides(records: list[dict[str, Any]], tmp_path: Path) -> None:
    # The insertions change some 15 of 500 n-grams, which leaves a similarity of about 0.97.
    assert set(dropped(verdicts(tmp_path / "low", records, verify=0.9))) in ({"copy", "near"}, {"copy", "doc1"})
    assert set(dropped(verdicts(tmp_path / "high", records, verify=0.995))) == {"copy"}


def test_documents_of_an_earlier_run_are_not_kept_again(records: list[dict[str, Any]], tmp_path: Path) -> None:
    verdicts(tmp_path / "old", records[:6])
    rows = verdicts(tmp_path / "new", records[1:2] + records[5:], index=[str(tmp_path / "old/run")])
    found = dropped(rows)
    same = {"doc1": "doc1", "near": "doc1", "doc5": "doc5", "copy": "doc0"}
    assert found == {name: ("in_index", earlier) for name, earlier in same.items()}
    assert {rows[name]["cluster_size"] for name in ("doc1", "near")} == {2}
    blind = verdicts(tmp_path / "blind", records[1:2] + records[5:], index=[str(tmp_path / "old/run")], verify=False)
    assert dropped(blind).keys() == found.keys()


def test_texts_of_an_earlier_run_are_compared_too(records: list[dict[str, Any]], tmp_path: Path) -> None:
    """Compares documents of one template in an earlier run and in this one: they share keys, and none is similar."""
    filled = template(50, 0.7)
    few: dict[str, Any] = {"shard_bytes": 40_000, "index": [str(tmp_path / "old/run")]}
    verdicts(tmp_path / "old", filled[:25], shard_bytes=40_000)
    assert dropped(verdicts(tmp_path / "new", filled[25:] + filled[3:4], **few)) == {"filled3": ("in_index", "filled3")}
    assert len(dropped(verdicts(tmp_path / "blind", filled[25:], verify=False, **few))) > 12
    (tmp_path / "old/run/extract").rename(tmp_path / "old/run/gone")
    with pytest.raises(ConfigError, match=r"dedup\.verify = 0\.75 .* no extract stage .* set dedup\.verify = false"):
        verdicts(tmp_path / "new", filled[25:], **few)


def template(count: int, similarity: float) -> list[dict[str, Any]]:
    """Makes texts that share a common part, such that any two have about this Jaccard similarity."""
    common, own = [f"said{n}" for n in range(600)], round(600 * (1 / similarity - 1) / 2)
    texts = [" ".join([*common, *(f"own{n}x{m}" for m in range(own))]) for n in range(count)]
    return [{"id": f"filled{n}", "text": text, "metadata": {}} for n, text in enumerate(texts)]


def windows(text: str, size: int, step: int) -> list[dict[str, Any]]:
    words = text.split()
    starts = range(0, len(words) - size, step)
    return [{"id": f"window{n}", "text": " ".join(words[n : n + size]), "metadata": {}} for n in starts]


def similarity(one: str, other: str) -> float:
    return jaccard(*(np.unique(shingles(text, 5)) for text in (one, other)))


def test_every_near_duplicate_is_similar_to_the_one_that_stays(records: list[dict[str, Any]], tmp_path: Path) -> None:
    """Runs on overlapping windows and a template: most stay if texts are compared, and collapse if they are not."""
    with gzip.open(ROOT / "data/demo/english.jsonl.gz", "rt", encoding="utf-8") as lines:
        text = json.loads(lines.readline())["text"]
    chain, filled = windows(text[:40_000], 400, 40), template(40, 0.68)
    given = {record["id"]: record["text"] for record in [*chain, *filled]}
    rows = verdicts(tmp_path / "verified", [*chain, *filled], shard_bytes=50_000)
    gone, kept = dropped(rows), [name for name, row in rows.items() if not row["verdict"]]
    for name, (verdict, survivor) in gone.items():
        assert verdict == "near_duplicate" and survivor in kept
        assert similarity(given[name], given[survivor]) >= 0.75
    assert {record["id"] for record in filled} <= set(kept)
    assert len(chain) / 3 <= len([name for name in kept if name.startswith("window")]) <= 2 * len(chain) / 3
    blind = verdicts(tmp_path / "blind", [*chain, *filled], shard_bytes=50_000, verify=False)
    assert len(dropped(blind)) > len(gone) + 20


WORDLESS = {
    "punctuation": ["?! ... --- ;; , . /", "((( ))) [] {} <> ::"],
    "emoji": ["🎉🎊🎈 🎁🎂🍰" * 20, "🐶🐱🐭🐹🐰🦊" * 20],
    "frames": ["┌──┬──┐│  │" * 9, "╔══╦══╗║  ║" * 9],
    "emoji beside the same words": [
        "one cake for all of us " + "🎉🎊🎈🎁🎂🍰" * 9,
        "One cake for all of us " + "🐶🐱🐭" * 18,
    ],
    "few words": ["x = -1", "x = 1"],
    "four words": ["come with us (now)", "Come with us, now?"],
    "few numbers": ["3.14", "3,14"],
    "few ideographs": ["三国。演义", "三国、演义"],
}
WORDY = {
    "five words": ("Come with us, all, now!", "come with us all now"),
    "numbers": ("1.5, 22, 300, 4: 55", "1,5 22 300 4 55"),
    "ideographs without spaces": ("话说天下大势，分久必合，合久必分。", "话说天下大势分久必合合久必分"),
    "other composition": (
        "Voil\u00e0, un caf\u00e9 tr\u00e8s serr\u00e9",
        "Voila\u0300 un cafe\u0301 tre\u0300s serre\u0301!",
    ),
    "minified json": ('{"a":1,"b":[2,3],"c":{"d":4}}', '{"a":1,"b":[2,3],"c":{"d":4},}'),
}


def test_texts_without_words_are_like_no_other_but_their_copies(tmp_path: Path) -> None:
    """Runs on texts without n-grams, which are dropped only as exact duplicates."""
    wordless = [(f"{kind} {n}", text) for kind, texts in WORDLESS.items() for n, text in enumerate(texts)]
    wordy = [(f"{kind} {n}", text) for kind, texts in WORDY.items() for n, text in enumerate(texts)]
    copies = [(f"{name} copy", text.upper() + "  ") for name, text in wordless]
    texts = {"id": "", "metadata": {}}
    given = [texts | {"id": name, "text": text} for name, text in [*wordless, *wordy, *copies]]
    gone = dropped(verdicts(tmp_path, given, shard_bytes=1_500))
    for name, _ in wordless:
        (one,) = {name, f"{name} copy"} & gone.keys()
        assert gone.pop(one) == ("exact_duplicate", f"{name} copy" if one == name else name)
    assert {verdict for verdict, _ in gone.values()} == {"near_duplicate"}
    assert {name[:-2] for name in gone} == WORDY.keys() and len(gone) == len(WORDY)


@pytest.mark.parametrize("name", ["keys", "rows"])
def test_damaged_keys_are_named(records: list[dict[str, Any]], tmp_path: Path, name: str) -> None:
    verdicts(tmp_path, records)
    file = next((tmp_path / "run/signatures").rglob(f"*.{name}.npy"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        DamagedData, match=rf"{re.escape(str(file))}\) does not match its checksum.*; delete the folder"
    ):
        perform(stages_of(config_of(tmp_path, 4_000))[5], tmp_path / "run", None)


def test_an_index_that_cannot_be_compared_is_refused_and_its_remedies_work(
    records: list[dict[str, Any]], tmp_path: Path
) -> None:
    old, few, new = tmp_path / "old", records[:6], tmp_path / "new"
    verdicts(old, few)
    new.mkdir()
    (new / "in.jsonl").write_text("")

    def refused(folder: Path = old, **dedup: Any) -> str:
        """Returns why a run with the index `folder`/run is refused, "" if it is not."""
        try:
            stages_of(config_of(new, index=[str(folder / "run")], **dedup))
        except ConfigError as error:
            return str(error)
        return ""

    assert "name the run.dir of a finished data run" in refused(tmp_path / "none")
    said = refused(bands=20, ngram=6)
    assert f"dedup.bands = 20, dedup.ngram = 6 here, and dedup.bands = 14, dedup.ngram = 5 in the index {old}" in said
    (there,) = re.findall(r"set (.+) here, or run that one again$", said)
    assert not refused(**{name: int(value) for name, value in re.findall(r"dedup\.(\w+) = (\d+)", there)})
    verdicts(old, few, bands=20, ngram=6)
    assert not refused(bands=20, ngram=6)
    (old / "run/language").rename(old / "elsewhere")
    assert "restore that folder, or set dedup.verify = false" in refused(bands=20, ngram=6)
    assert not refused(bands=20, ngram=6, verify=False)
    (old / "elsewhere").rename(old / "run/language")
    assert not refused(bands=20, ngram=6)
