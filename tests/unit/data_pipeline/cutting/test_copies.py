"""Tests cuts of repeated lines and substrings against brute force and a suffix array, on made-up and real texts."""

import gzip
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pydivsufsort
import pytest
from datatrove.data import Document

from configs.cuts import LinesConfig, SubstringsConfig
from data_pipeline.core.tables import as_table, write_table
from data_pipeline.cutting import copies, substrings
from data_pipeline.cutting.copies import AllotQuotas, CountUnits, TextUnits
from data_pipeline.cutting.cuts import Cut, CutStep, apply, merge, read_cuts
from data_pipeline.cutting.lines import CutLines, Lines
from data_pipeline.cutting.substrings import CutSubstrings, Minimizers, Windows
from tests.demo_corpus import DEMO, demo_records

Corpus = dict[str, list[str]]  # shard -> texts, in order


def documents(corpus: Corpus, shards: list[str]) -> list[Document]:
    return [
        Document(
            text=text,
            id=f"{shard}/{row}",
            metadata={"source": shard.split("/")[0], "shard": shard, "row": row, "bytes": len(text.encode())},
        )
        for shard in shards
        for row, text in enumerate(corpus[shard])
    ]


def keep_all(folder: Path, corpus: Corpus) -> str:
    for shard, texts in corpus.items():
        write_table(folder, shard, as_table([{"row": row, "verdict": ""} for row in range(len(texts))]))
    return str(folder)


def count(folder: Path, corpus: Corpus, select: str, units: TextUnits, cap: int, tasks: int, partitions: int) -> str:
    shards = sorted(corpus)
    for rank in range(tasks):
        step = CountUnits(str(folder / "counts"), select, shards, units, partitions)
        list(step.run(iter(documents(corpus, shards[rank::tasks])), rank, tasks))
    for rank in range(tasks):
        (folder / "progress").mkdir(parents=True, exist_ok=True)
        share = AllotQuotas(
            str(folder / "counts"), str(folder / "quotas"), partitions, len(shards), cap, str(folder / "progress")
        )
        list(share.run(None, rank, tasks))
    return str(folder / "quotas")


def cut(folder: Path, corpus: Corpus, step: CutStep, tasks: int) -> dict[tuple[str, int], list[Cut]]:
    shards = sorted(corpus)
    for rank in range(tasks):
        list(step.run(iter(documents(corpus, shards[rank::tasks])), rank, tasks))
    return {(shard, row): found for shard in shards for row, found in read_cuts([folder], shard).items()}


def cut_lines(folder: Path, corpus: Corpus, tasks: int = 1, partitions: int = 3, **settings: Any) -> dict:
    config, select = LinesConfig(**settings), keep_all(folder / "kept", corpus)
    quotas = count(folder, corpus, select, Lines(config), config.max_copies, tasks, partitions)
    out = str(folder / "out")
    return cut(folder / "out", corpus, CutLines(out, str(folder), select, config, quotas, sorted(corpus)), tasks)


def cut_substrings(folder: Path, corpus: Corpus, tasks: int = 1, partitions: int = 3, **settings: Any) -> dict:
    config, select = SubstringsConfig(**settings), keep_all(folder / "kept", corpus)
    repeated = count(folder / "minimizers", corpus, select, Minimizers(config), 1, tasks, partitions)
    windows = Windows(config, repeated, sorted(corpus))
    quotas = count(folder / "windows", corpus, select, windows, 1, tasks, partitions)
    out = str(folder / "out")
    return cut(folder / "out", corpus, CutSubstrings(out, str(folder), select, windows, quotas), tasks)


def left(corpus: Corpus, cuts: dict[tuple[str, int], list[Cut]]) -> Corpus:
    return {
        shard: [apply(text, merge(cuts.get((shard, row), []))) for row, text in enumerate(texts)]
        for shard, texts in corpus.items()
    }


def real_corpus() -> Corpus:
    """Makes a corpus of speeches, code and a Chinese novel, in which documents hold passages of others."""
    draw = random.Random(7)
    texts = {source: [record["text"] for record in demo_records(source)] for source in ("english", "chinese", "code")}
    corpus: Corpus = {}
    for source, found in texts.items():
        some = found[:4] if source == "chinese" else found[:24]
        for number, text in enumerate(some):
            donor = draw.choice(some)
            start, size = draw.randrange(max(1, len(donor) - 900)), draw.randrange(40, 900)
            position = draw.randrange(len(text))
            some[number] = text[:position] + donor[start : start + size] + text[position:]
        half = len(some) // 2
        corpus |= {f"{source}/0000-0000": some[:half], f"{source}/0000-0001": some[half:]}
    return corpus


# --- lines --------------------------------------------------------------------------------------------------------


def lines_slowly(corpus: Corpus, cap: int, min_chars: int, by_source: bool) -> Corpus:
    seen: Counter[tuple[str, str]] = Counter()
    out: Corpus = {}
    for shard in sorted(corpus):
        out[shard] = []
        for text in corpus[shard]:
            kept = []
            for line in text.split("\n"):
                key = (shard.split("/")[0] if by_source else "", line.strip())
                seen[key] += len(line.strip()) >= min_chars
                kept.append(line if seen[key] <= cap else None)
            whole = "".join(line + "\n" for line in kept[:-1] if line is not None) + (kept[-1] or "")
            out[shard].append(whole)
    return out


@pytest.mark.parametrize(("cap", "scope"), [(1, "all"), (3, "all"), (1, "source"), (3, "source")])
def test_lines_agree_with_counting_them_all(tmp_path: Path, cap: int, scope: str) -> None:
    corpus = real_corpus()
    expected = lines_slowly(corpus, cap, 12, scope == "source")
    assert expected != corpus
    cuts = cut_lines(tmp_path, corpus, max_copies=cap, min_chars=12, scope=scope)
    assert left(corpus, cuts) == expected


def test_paragraphs_are_cut_with_the_break_behind_them(tmp_path: Path) -> None:
    one, two = "First paragraph\nof two lines.", "Another one, longer."
    corpus = {"s/0": [f"{one}\n\n{two}\n \n\n{one}\n\nend", f"{two}"], "t/0": [f"  {one}\n\n{two}\n\nlast"]}
    cuts = cut_lines(tmp_path, corpus, unit="paragraph", max_copies=1, min_chars=5)
    assert left(corpus, cuts) == {"s/0": [f"{one}\n\n{two}\n \n\nend", ""], "t/0": ["last"]}
    assert {found.reason for cut_list in cuts.values() for found in cut_list} == {"duplicate_paragraph"}


def test_lines_of_other_sources_are_not_touched(tmp_path: Path) -> None:
    corpus = {"code/0": ["x = 1  # a line\n" * 3], "web/0": ["x = 1  # a line\n" * 3]}
    cuts = cut_lines(tmp_path, corpus, max_copies=1, min_chars=5, sources=("web",))
    assert left(corpus, cuts) == {"code/0": corpus["code/0"], "web/0": ["x = 1  # a line\n"]}


# --- substrings ---------------------------------------------------------------------------------------------------


def repeats_to_text(text: str, marked: np.ndarray) -> str:
    """Removes marked bytes from a text; each run of them first shrinks to whole characters."""
    raw = text.encode()
    marked = marked.copy()
    edges = np.flatnonzero(np.diff(np.r_[0, marked.astype(np.int8), 0]))
    for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        while start < end and raw[start] & 0xC0 == 0x80:
            marked[start] = False
            start += 1
        while end > start and end < len(raw) and raw[end] & 0xC0 == 0x80:
            end -= 1
            marked[end] = False
    return np.frombuffer(raw, np.uint8)[~marked].tobytes().decode()


def by_brute_force(corpus: Corpus, size: int) -> Corpus:
    """Removes repeats, found by putting every window into a dictionary in order."""
    first: dict[bytes, tuple[str, int, int]] = {}
    out: Corpus = {}
    for shard in sorted(corpus):
        out[shard] = []
        for row, text in enumerate(corpus[shard]):
            raw = text.encode()
            marked = np.zeros(len(raw), bool)
            for start in range(len(raw) - size + 1):
                where = first.setdefault(raw[start : start + size], (shard, row, start))
                if where[:2] != (shard, row) or start >= where[2] + size:
                    marked[start : start + size] = True
            out[shard].append(repeats_to_text(text, marked))
    return out


def by_suffix_array(corpus: Corpus, size: int) -> Corpus:
    """Removes repeats as in the paper: neighbours in a suffix array of all texts whose common prefix is long enough."""
    texts = [(shard, text) for shard in sorted(corpus) for text in corpus[shard]]
    joined = b"".join(text.encode() + b"\xff" for _, text in texts)  # 0xff is in no UTF-8 text
    array = pydivsufsort.divsufsort(joined)
    common = pydivsufsort.kasai(joined, array)  # length of the common prefix with the next suffix in order
    ends = np.cumsum([len(text.encode()) + 1 for _, text in texts]) - 1  # where the separators are
    document = np.searchsorted(ends, array)
    inside = array + size <= ends[np.minimum(document, len(ends) - 1)]
    joins = (common[:-1] >= size) & inside[:-1] & inside[1:]
    group = np.r_[0, np.cumsum(~joins)]
    order = np.lexsort((array, group))
    heads = np.r_[True, group[order][1:] != group[order][:-1]]
    first = array[order][np.maximum.accumulate(np.where(heads, np.arange(len(order)), 0))]
    starts = array[order]
    other = np.searchsorted(ends, first) != np.searchsorted(ends, starts)
    repeats = inside[order] & (first != starts) & (other | (starts >= first + size))
    marks = np.zeros(len(joined) + 1, np.int64)
    np.add.at(marks, starts[repeats], 1)
    np.add.at(marks, starts[repeats] + size, -1)
    marked = np.cumsum(marks) > 0
    out: Corpus = {shard: [] for shard in sorted(corpus)}
    for (shard, text), end in zip(texts, ends.tolist(), strict=True):
        out[shard].append(repeats_to_text(text, marked[end - len(text.encode()) : end]))
    return out


def patchwork(seed: int) -> Corpus:
    """Makes texts of a few letters with runs, periods and copies, so that repeats overlap in many ways."""
    draw = random.Random(seed)
    bits = ["a" * 80, "ab" * 50, "桃园", "豪杰三结义" * 9, "xyz😀" * 12]
    bits += ["".join(draw.choices("ab宴é\n", k=draw.randrange(10, 120))) for _ in range(8)]
    return {
        f"{source}/{part}": ["".join(draw.choices(bits, k=draw.randrange(0, 9))) for _ in range(draw.randrange(1, 4))]
        for source in "st"
        for part in range(2)
    }


@pytest.mark.parametrize("block", [50, 1 << 18])
def test_substrings_agree_with_brute_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(substrings, "_BLOCK", block)
    changed = 0
    for seed in range(20):
        corpus = patchwork(seed)
        expected = by_brute_force(corpus, 32)
        assert by_suffix_array(corpus, 32) == expected
        cuts = cut_substrings(tmp_path / str(seed), corpus, tasks=1 + seed % 3, partitions=1 + seed % 4, min_bytes=32)
        assert left(corpus, cuts) == expected, seed
        changed += expected != corpus
    assert changed > 12


def test_substrings_agree_with_a_suffix_array_on_real_text(tmp_path: Path) -> None:
    corpus = real_corpus()
    expected = by_suffix_array(corpus, 100)
    gone = sum(len(t.encode()) for s in corpus.values() for t in s) - sum(
        len(t.encode()) for s in expected.values() for t in s
    )
    assert gone > 20_000
    assert left(corpus, cut_substrings(tmp_path, corpus, min_bytes=100)) == expected


@pytest.mark.full
def test_substrings_agree_with_a_suffix_array_on_the_demo_corpus(tmp_path: Path) -> None:
    corpus: Corpus = {}
    for source in ("english", "chinese", "code"):
        with gzip.open(DEMO / f"{source}.jsonl.gz", "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in lines]
        corpus |= {f"{source}/{part:04d}": texts[part::3] for part in range(3)}
    expected = by_suffix_array(corpus, 200)
    cuts = cut_substrings(tmp_path, corpus, partitions=5, min_bytes=200)
    assert left(corpus, cuts) == expected
    assert sum(cut.end - cut.start for found in cuts.values() for cut in found) > 100_000


def test_the_first_occurrence_stays_whole_and_the_next_goes(tmp_path: Path) -> None:
    passage = "Four score and seven years ago our fathers brought forth on this continent, a new nation. "
    corpus = {"s/0": [f"One. {passage}Two."], "s/1": [f"Three. {passage}Four.", passage]}
    cuts = cut_substrings(tmp_path, corpus, min_bytes=60)
    assert left(corpus, cuts) == {"s/0": corpus["s/0"], "s/1": ["ThreFour.", ""]}  # "e. " is part of the repeat


# --- both ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cutter", [cut_lines, cut_substrings])
def test_tasks_and_partitions_change_nothing(tmp_path: Path, cutter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "_BUFFER_BYTES", 4096)  # so small that tasks write their buffers more than once
    corpus = real_corpus()
    results = [cutter(tmp_path / f"{t}-{p}", corpus, tasks=t, partitions=p) for t, p in ((1, 1), (3, 7), (6, 2))]
    assert results[0] and results[0] == results[1] == results[2]


def test_a_task_that_is_run_again_counts_once(tmp_path: Path) -> None:
    corpus = {"s/0": ["a line that is there twice\na line that is there twice\n"]}
    select = keep_all(tmp_path / "kept", corpus)
    units = Lines(LinesConfig())
    for _ in range(2):
        list(CountUnits(str(tmp_path / "c"), select, ["s/0"], units, 1).run(iter(documents(corpus, ["s/0"])), 0, 1))
    assert np.fromfile(tmp_path / "c/0000/00000.bin", copies.RECORD)["count"].tolist() == [2]
