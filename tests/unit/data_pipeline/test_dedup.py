"""Fingerprints, pairs, clusters and survivors, against brute force and by hand."""

import gzip
import itertools
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from configs.data import DedupConfig
from data_pipeline.dedup.clusters import Arrays, elect, join, label
from data_pipeline.dedup.pairs import INDEXED, FindPairs, Numbering, jobs, linked
from data_pipeline.dedup.signatures import MinHasher, exact_hash, read_range, url_key, write_keys
from data_pipeline.dedup.verify import jaccard
from data_pipeline.scan.minhash import shingles
from data_pipeline.scan.words import Splitter
from data_pipeline.tables import write_table

ROOT = Path(__file__).parents[3]
WORDS = [f"word{number}" for number in range(4000)]


def pair(common: int, own: int) -> tuple[str, str]:
    """Two texts that share a run of `common` words and have `own` more each."""
    return " ".join(WORDS[: common + own]), " ".join(WORDS[:common] + WORDS[-own:])


def test_exact_hash_ignores_case_and_spaces_only() -> None:
    assert exact_hash("Call  me\nIshmael") == exact_hash("call me ishmael ")
    assert exact_hash("Call me, Ishmael") != exact_hash("Call me Ishmael")


def test_one_address_in_many_spellings() -> None:
    same = ["http://www.Example.org/a/", "https://example.org/a#top", "https://example.org:443/a"]
    assert len({url_key(url) for url in same}) == 1
    assert len({url_key(url) for url in [same[0], "example.org/b", "https://example.org/a?page=2", "http://[x"]}) == 4
    assert url_key("") == 0


def test_signatures_estimate_jaccard_similarity() -> None:
    hasher = MinHasher(DedupConfig(bands=256, rows=8))
    for common, own in ((900, 100), (600, 200), (300, 300)):
        one, other = (hasher.signature(text, Splitter.spaces) for text in pair(common, own))
        shared = common - 4
        truth = shared / (shared + 2 * own)
        assert abs((one == other).mean() - truth) < 0.045  # 4 standard errors of 2048 draws


def test_near_duplicates_meet_and_others_do_not() -> None:
    hasher = MinHasher(DedupConfig())
    near = [hasher.keys(text, Splitter.spaces) for text in pair(1000, 30)]
    far = [hasher.keys(text, Splitter.spaces) for text in pair(300, 300)]
    assert (near[0] == near[1]).any()
    assert not (far[0] == far[1]).any()
    assert len(hasher.keys("short", Splitter.spaces)) == 14


def test_chinese_near_duplicates_meet() -> None:
    hasher = MinHasher(DedupConfig())
    text = "".join(chr(0x4E00 + number * 7919 % 5000) for number in range(800))
    one, other = hasher.keys(text, Splitter.cjk), hasher.keys(text[:600] + "改" + text[601:], Splitter.cjk)
    assert (one == other).any()


def test_shingles_are_windows_of_words_without_punctuation() -> None:
    """Equal windows have equal hashes, wherever they stand; the rolling hash agrees with a fresh one."""
    words = np.random.default_rng(0).choice(["a", "b", "ab", "c"], 300).tolist()
    found = shingles(", ".join(words).upper() + "!", 5)
    grams = [tuple(words[place : place + 5]) for place in range(len(words) - 4)]
    assert len(found) == len(grams)
    by_gram = defaultdict(set)
    for gram, value in zip(grams, found.tolist(), strict=True):
        by_gram[gram].add(value)
        assert shingles(" ".join(gram), 5).tolist() == [value]
    assert all(len(values) == 1 for values in by_gram.values())
    assert len(set().union(*by_gram.values())) == len(by_gram)


def sets_of(pairs: np.ndarray, size: int) -> list[int]:
    """Labels by brute force: the smallest member that can be reached."""
    labels = list(range(size))
    for _ in range(size):
        for one, other in pairs.tolist():
            labels[one] = labels[other] = min(labels[one], labels[other])
    return labels


def test_clusters_are_what_pairs_reach_in_any_order() -> None:
    draw = np.random.default_rng(1)
    for _ in range(50):
        pairs = draw.integers(0, 40, (30, 2))
        for order in (pairs, pairs[::-1].copy(), pairs[:, ::-1].copy()):
            parents = np.arange(40)
            join(parents, order)
            label(parents)
            assert parents.tolist() == sets_of(pairs, 40)


def test_the_best_document_survives() -> None:
    labels = np.array([0, 0, 0, 3, 3, 5])
    quality = np.array([0.5, 0.9, 0.9, 0.7, 0.7, 0.1])
    chars = np.array([99, 10, 20, 5, 5, 1])
    for cut in range(7):  # the documents come shard by shard
        best, sizes, marks = np.zeros(6, np.int64), np.zeros(6, np.int64), np.zeros((6, 2))
        for part in (slice(0, cut), slice(cut, 6)):
            elect(labels, quality[part], chars[part], part.start, best, sizes, marks)
        assert best[labels].tolist() == [2, 2, 2, 3, 3, 5]
        assert sizes[labels].tolist() == [3, 3, 3, 2, 2, 1]


def test_linking_groups_of_equal_keys() -> None:
    keys = np.array([7, 3, 7, 5, 7, 3], np.uint64)
    numbers = np.array([4, 0, 1, 2, 3, 9])
    found = linked(keys, numbers, np.array([5, 6, 3], np.uint64))
    assert sorted(map(tuple, found.tolist())) == [(INDEXED, 0), (INDEXED, 2), (0, 9), (1, 3), (1, 4)]
    assert len(linked(keys[:0], numbers[:0], keys)) == 0


def test_ranges_cover_every_key_once() -> None:
    todo = jobs([0, 3], documents=1000, memory=10_000)
    assert len(todo) == 2 * 5
    for kind in (0, 3):
        mine = [job for job in todo if job.kind == kind]
        assert (mine[0].low, mine[-1].high) == (0, 2**64 - 1)
        assert all(one.high + 1 == other.low for one, other in itertools.pairwise(mine))


def test_pairs_do_not_depend_on_the_number_of_ranges(tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    for shard in range(4):
        rows = np.arange(50)
        keys = draw.integers(1, 40, (50, 2), dtype=np.uint64) * np.uint64(2**58)
        write_keys(tmp_path / "signatures", f"s/{shard}", keys, rows)
        verdicts = ["" if keep else "why" for keep in draw.random(50) < 0.7]
        write_table(tmp_path / "filter", f"s/{shard}", pa.table({"row": rows, "verdict": verdicts}))
    found = []
    for ranges in (1, 3, 16):
        todo = [job for kind in (0, 1) for job in jobs([kind], 48 * ranges, 48 * 48)][: 2 * ranges]
        assert len(todo) == 2 * ranges
        out = tmp_path / f"out{ranges}"
        out.mkdir()
        step = FindPairs(str(out), Numbering(tmp_path / "filter"), str(tmp_path / "signatures"), todo)
        for rank in range(3):
            list(step.run(None, rank, 3))
        pairs = np.concatenate([np.load(out / job.file) for job in todo])
        found.append(sorted(map(tuple, pairs.tolist())))
    assert found[0] == found[1] == found[2] and len(found[0]) > 100


def test_a_range_of_sorted_keys_is_read(tmp_path: Path) -> None:
    write_keys(tmp_path, "s/0", np.array([[9, 1], [4, 2], [4, 3]], np.uint64), np.array([10, 11, 12]))
    keys, rows = read_range(tmp_path, "s/0", 0, 4, 8)
    assert (keys.tolist(), rows.tolist()) == ([4, 4], [11, 12])
    keys, rows = read_range(tmp_path, "s/0", 0, 5, 2**64 - 1)
    assert (keys.tolist(), rows.tolist()) == ([9], [10])


def test_numbers_are_of_kept_documents(tmp_path: Path) -> None:
    write_table(tmp_path, "a/0", pa.table({"row": [0, 2, 5], "verdict": ["", "why", ""]}))
    write_table(tmp_path, "a/1", pa.table({"row": [1], "verdict": ["why"]}))
    write_table(tmp_path, "b/0", pa.table({"row": [3], "verdict": [""]}))
    found = Numbering(tmp_path)
    assert found.documents == 3
    assert found.numbers(0, np.array([0, 2, 5, 7])).tolist() == [0, INDEXED, 1, INDEXED]
    assert found.numbers(1, np.array([1])).tolist() == [INDEXED]
    assert found.numbers(2, np.array([3])).tolist() == [2]


def test_arrays_keep_ids(tmp_path: Path) -> None:
    Arrays(tmp_path, 3, "w+").of("id_end")[:] = [3, 3, 9]
    (tmp_path / "ids").write_bytes("abc鲸def".encode())
    arrays = Arrays(tmp_path, 3)
    assert arrays.ids([2, 0, 1]) == ["鲸def", "abc", ""]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Demo documents and edited copies of them, of every similarity."""
    with gzip.open(ROOT / "data/demo/english.jsonl.gz", "rt", encoding="utf-8") as lines:
        originals = [json.loads(line)["text"][:4000] for line in lines][::5]
    draw = np.random.default_rng(3)
    found = list(originals)
    for share in (0.002, 0.01, 0.03, 0.1):
        for text in originals:
            words = text.split()
            edited = [word if draw.random() > share else f"x{draw.integers(1000)}" for word in words]
            found.append(" ".join(edited))
    return found


def test_recall_is_the_one_that_bands_and_rows_promise(texts: list[str]) -> None:
    """Candidates against true Jaccard similarity of all pairs, brute force."""
    settings = DedupConfig()
    hasher = MinHasher(settings)
    keys = np.stack([hasher.keys(text, Splitter.spaces) for text in texts])
    grams = [np.unique(shingles(text, settings.ngram)) for text in texts]
    groups = len(texts) // 5  # an original and its four copies; documents of two groups are all but disjoint
    expected, variance, met, high, found = 0.0, 0.0, 0, 0, 0
    for one, other in itertools.combinations(range(len(texts)), 2):
        meets = bool((keys[one] == keys[other]).any())
        if not meets and one % groups != other % groups:
            continue
        similarity = jaccard(grams[one], grams[other])
        chance = 1 - (1 - similarity**settings.rows) ** settings.bands
        expected, met = expected + chance, met + meets
        variance += chance * (1 - chance)
        high, found = high + (similarity >= 0.9), found + (similarity >= 0.9 and meets)
    assert high > 100 and found == high  # missed with a chance of 4e-4 at 0.9
    # Four standard errors; the ten pairs of a group may all go together.
    assert abs(met - expected) < 4 * (10 * variance) ** 0.5
