"""Tests the stage that cuts lines by published rules: each document's own rule set, and correct byte offsets."""

from pathlib import Path

import pyarrow as pa
from datatrove.data import Document

from configs.rules import RuleSet
from data_pipeline.core.tables import read_table, write_table
from data_pipeline.cutting.cuts import apply, merge, read_cuts
from data_pipeline.cutting.web_lines import CutWebLines

RULES = {
    "web": RuleSet(c4="datatrove", drop_lines=("c4", "refinedweb")),
    "strict": RuleSet(c4="reference", drop_lines=("c4",)),
}
TEXTS = {
    0: ("web", "鲸鱼 Menu\nCall me Ishmael, he said.\n12 likes\nHe said so.\nSOME YEARS AGO, HE SAID.\n"),
    1: ("strict", "Call me Ishmael, he said.\nHe said so.\nSome years ago, he said."),
    2: ("plain", "Menu\n12 likes"),
}


def test_lines_are_cut_by_each_documents_own_rules(tmp_path: Path) -> None:
    documents = [
        Document(text, str(row), metadata={"source": "s", "shard": "s/0", "row": row, "bytes": len(text.encode())})
        for row, (_, text) in TEXTS.items()
    ]
    rows = {"row": list(TEXTS), "verdict": [""] * 3}
    write_table(tmp_path / "dedup", "s/0", pa.table(rows))
    write_table(tmp_path / "language", "s/0", pa.table(rows | {"rules": [rules for rules, _ in TEXTS.values()]}))
    step = CutWebLines(
        str(tmp_path / "out"), str(tmp_path / "tallies"), str(tmp_path / "dedup"), RULES, str(tmp_path / "language")
    )
    list(step.run(iter(documents), 0, 1))

    cuts = read_cuts([tmp_path / "out"], "s/0")
    left = {row: apply(text, merge(cuts.get(row, []))) for row, (_, text) in TEXTS.items()}
    assert left == {
        0: "Call me Ishmael, he said.\nHe said so.\n",
        1: "Call me Ishmael, he said.\nSome years ago, he said.",  # the reference drops lines under five words
        2: TEXTS[2][1],
    }
    assert [cut.reason for cut in cuts[0]] == ["c4_no_end", "c4_no_end", "refinedweb_counter", "refinedweb_uppercase"]
    assert [cut.reason for cut in cuts[1]] == ["c4_few_words"]
    assert read_table(tmp_path / "out", "s/0")["cut_bytes"].to_pylist() == [
        len(text.encode()) - len(left[row].encode()) for row, (_, text) in TEXTS.items()
    ]
