"""Tests merging and applying cuts against a slow version of the rules that goes byte by byte."""

import random
from itertools import pairwise
from pathlib import Path

import pytest

from data_pipeline.cutting.cuts import Cut, MergedCuts, apply, byte_offsets, merge, read_cuts, write_cuts
from tests.demo_corpus import demo_records

TEXT = "第一回 宴桃园豪杰三结义 — naïve café, 😀 and so on. " * 3


def random_cuts(draw: random.Random, text: str, count: int) -> list[Cut]:
    found = []
    for number in range(count):
        start, end = sorted(draw.sample(range(len(text) + 1), 2))
        end = min(end, start + draw.choice([1, 5, 30]))
        low, high = byte_offsets(text, [start, end])
        found.append(Cut(low, high, draw.choice(["", "", f"<{number}>", "<电话>"]), draw.choice("abc")))
    return found


def applied_slowly(text: str, cuts: list[Cut]) -> tuple[str, dict[str, int]]:
    """Applies cuts by the rules in the docstring of `cuts`, one byte at a time."""
    raw = text.encode()
    reasons: list[str | None] = [None] * len(raw)
    for cut in sorted(cuts, key=lambda cut: cut.start):
        for position in range(cut.start, cut.end):
            reasons[position] = reasons[position] or cut.reason
    removed_for_good = {position for cut in cuts if not cut.replacement for position in range(cut.start, cut.end)}
    bridged = {
        position for cut in cuts for position in range(cut.start + 1, cut.end)
    }  # positions inside a cut, where no span ends
    out, position = b"", 0
    while position < len(raw):
        if reasons[position] is None:
            out += raw[position : position + 1]
            position += 1
            continue
        end = position + 1
        while end < len(raw) and end in bridged:
            end += 1
        standing = [
            cut
            for cut in sorted(cuts, key=lambda cut: (cut.start, -cut.end))
            if position <= cut.start < end
            and cut.replacement
            and not set(range(cut.start, cut.end)) <= removed_for_good
        ]
        out += standing[0].replacement.encode() if standing else b""
        position = end
    totals: dict[str, int] = {}
    for reason in reasons:
        if reason:
            totals[reason] = totals.get(reason, 0) + 1
    return out.decode(), totals


def test_merging_agrees_with_the_rules_read_byte_by_byte() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        cuts = random_cuts(draw, TEXT, draw.randrange(1, 9))
        merged = merge(cuts)
        assert (apply(TEXT, merged), merged.removed) == applied_slowly(TEXT, cuts)
        assert all(one[1] <= other[0] for one, other in pairwise(merged.spans))
        size = len(TEXT.encode()) - merged.removed_bytes + merged.inserted_bytes
        assert len(apply(TEXT, merged).encode()) == size


@pytest.mark.parametrize(
    ("cuts", "expected"),
    [
        ([(0, 3, "<X>"), (3, 6, "<Y>")], "<X><Y>ghij"),  # touching cuts are not joined
        ([(0, 10, ""), (4, 6, "<X>")], ""),  # a replacement inside what is removed is not inserted
        ([(0, 2, ""), (2, 4, ""), (1, 3, "<X>")], "efghij"),  # nor is one that two removals cover together
        ([(2, 6, ""), (4, 8, "<X>")], "ab<X>ij"),  # but one that is covered in part is inserted
        ([(1, 5, "<X>"), (3, 8, "<Y>")], "a<X>ij"),  # the first of two replacements is inserted
        ([(1, 3, "<X>"), (1, 5, "<Y>")], "a<Y>fghij"),  # or the longer of two with one start
        ([(1, 3, "<X>"), (1, 3, "<Y>")], "a<X>defghij"),  # or the earlier stage's of two with one span
        ([], "abcdefghij"),
    ],
)
def test_precedence(cuts: list[tuple[int, int, str]], expected: str) -> None:
    assert apply("abcdefghij", merge([Cut(*cut, "why") for cut in cuts])) == expected


def test_a_cut_inside_a_character_is_refused() -> None:
    with pytest.raises(ValueError, match="bytes 1 to 3 does not lie between characters of 6"):
        apply("回宴", MergedCuts([(1, 3, "")], {"why": 2}))
    with pytest.raises(ValueError, match="does not lie between characters"):
        apply("ab", MergedCuts([(1, 3, "")], {"why": 2}))


def test_byte_offsets_on_real_text() -> None:
    for record in [*demo_records("chinese")[:2], *demo_records("english")[:2]]:
        offsets = [len(record["text"]), 0, 7, 500, 7]
        assert byte_offsets(record["text"], offsets) == [len(record["text"][:end].encode()) for end in offsets]


def test_tables_of_cuts_keep_the_order_of_stages(tmp_path: Path) -> None:
    first, second = Cut(5, 9, "", "late"), Cut(0, 3, "<X>", "early")
    write_cuts(tmp_path / "one", "s/0000", [(4, first)])
    write_cuts(tmp_path / "two", "s/0000", [(4, second), (0, second)])
    write_cuts(tmp_path / "two", "s/0001", [])
    stages = [tmp_path / "one", tmp_path / "two", tmp_path / "absent"]
    assert read_cuts(stages, "s/0000") == {4: [first, second], 0: [second]}
    assert read_cuts(stages, "s/0001") == {}
