"""Tests which documents the documents stage drops as mostly cut, and that replacements of cuts stay in texts."""

from pathlib import Path

import pyarrow as pa
import pytest

from configs.cuts import DocumentsConfig
from data_pipeline.core.tables import write_table
from data_pipeline.cutting.cuts import Cut, write_cuts
from data_pipeline.documents.write import MOSTLY_CUT, StageFolders, fates


def fate(tmp_path: Path, size: int, cuts: list[Cut], settings: DocumentsConfig) -> str:
    folder = str(tmp_path / "stage")
    write_table(folder, "s/0", pa.table({"row": [3], "id": ["a"], "bytes": [size], "verdict": [""]}))
    write_cuts(folder, "s/0", [(3, cut) for cut in cuts])
    before = StageFolders(folder, (), (folder,), "", "", "", settings.cut_share_max, settings.left_bytes_min)
    (found,) = fates(before, "s/0")
    return found.reason


@pytest.mark.parametrize(
    ("size", "cut", "reason"),
    [
        (20_000, 18_000, ""),  # a long licence, and 2,000 bytes of its own
        (20_000, 19_501, MOSTLY_CUT),  # 499 are left
        (20_000, 19_500, ""),
        (400, 300, ""),  # short, and a quarter is left
        (400, 321, MOSTLY_CUT),
        (400, 400, MOSTLY_CUT),
        (20_000, 20_000, MOSTLY_CUT),
    ],
)
def test_a_document_goes_if_a_large_share_is_cut_and_little_is_left(
    tmp_path: Path, size: int, cut: int, reason: str
) -> None:
    block = [Cut(0, cut // 2, "", "duplicate_line"), Cut(cut // 2, cut, "", "duplicate_substring")]
    assert fate(tmp_path, size, block, DocumentsConfig()) == reason


def test_the_share_decides_alone_where_no_bytes_are_enough(tmp_path: Path) -> None:
    block = [Cut(0, 18_000, "", "duplicate_substring")]
    for left, reason in ((0, ""), (2_001, MOSTLY_CUT), (2_000, "")):
        assert fate(tmp_path, 20_000, block, DocumentsConfig(left_bytes_min=left)) == reason


def test_what_is_put_in_place_of_a_cut_is_left(tmp_path: Path) -> None:
    mails = [Cut(10 * n, 10 * n + 9, "<EMAIL>", "pii_email") for n in range(100)]
    assert fate(tmp_path, 1_000, mails, DocumentsConfig()) == ""
