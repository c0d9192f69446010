"""Tests fingerprints, pairs, clusters and survivors, by brute force and against results worked out by hand."""

import gzip
import itertools
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from configs.dedup import DedupConfig
from data_pipeline.core.tables import write_table
from data_pipeline.dedup.clusters import ClusterArrays, Population, count_members, join, label
from data_pipeline.dedup.duplicate_pairs import (
    NOT_KEPT,
    EarlierRun,
    FindPairs,
    Numbering,
    earlier_code,
    key_ranges,
    linked,
)
from data_pipeline.dedup.greedy import jaccard
from data_pipeline.dedup.signatures import MinHasher, exact_hash, read_range, url_key, write_keys
from data_pipeline.dedup.survivors import ChooseSurvivors, chosen
from data_pipeline.scan.minhash import shingles
from data_pipeline.scan.words import Splitter

ROOT = Path(__file__).parents[4]
WORDS = [f"word{number}" for number in range(4000)]


def pair(common: int, own: int) -> tuple[str, str]:
    """Makes two texts that begin with the same `common` words and have `own` other words each."""
    return " ".join(WORDS[: common + own]), " ".join(WORDS[:common] + WORDS[-own:])


def test_exact_hash_ignores_case_and_spaces_only() -> None:
    assert exact_hash("Call  me\nIshmael") == exact_hash("call me ishmael ")
    assert exact_hash("Call me, Ishmael") != exact_hash("Call me Ishmael")


def test_one_address_in_many_spellings() -> None:
    same = ["http://www.Example.org/a/", "https://example.org/a#top", "https://example.org:443/a"]
    assert len({url_key(url) for url in same}) == 1
    same = ["http://Müller.de/Köln?q=%c3%A9%7e a", "http://xn--mller-kva.de./K%C3%B6ln?q=é~%20a"]
    assert url_key(same[0]) == url_key(same[1]) != url_key("http://xn--mller-kva.de/K%C3%B6ln?q=é~%2520a")
    assert url_key("http://a.org/b%2Fc") != url_key("http://a.org/b/c")
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
    assert hasher.keys("short", Splitter.spaces).tolist() == [0] * 14


def test_chinese_near_duplicates_meet() -> None:
    hasher = MinHasher(DedupConfig())
    text = "".join(chr(0x4E00 + number * 7919 % 5000) for number in range(800))
    one, other = hasher.keys(text, Splitter.cjk), hasher.keys(text[:600] + "改" + text[601:], Splitter.cjk)
    assert (one == other).any()


def test_shingles_are_windows_of_words_without_punctuation() -> None:
    """Compares hashes of equal windows at any position, and the rolling hash with that of a window by itself."""
    words = np.random.default_rng(0).choice(["a", "b", "ab", "c"], 300).tolist()
    found = shingles(", ".join(words).upper() + "!", 5)
    grams = [tuple(words[position : position + 5]) for position in range(len(words) - 4)]
    assert len(found) == len(grams)
    by_gram = defaultdict(set)
    for gram, value in zip(grams, found.tolist(), strict=True):
        by_gram[gram].add(value)
        assert shingles(" ".join(gram), 5).tolist() == [value]
    assert all(len(values) == 1 for values in by_gram.values())
    assert len(set().union(*by_gram.values())) == len(by_gram)


def sets_of(pairs: np.ndarray, size: int) -> list[int]:
    """Labels each member with the smallest one that it is connected to, by brute force."""
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


def test_members_are_counted() -> None:
    sizes = np.zeros(7, np.int64)
    assert count_members(np.array([0, 0, 2, 0, 4, 4, 6]), sizes) == 5
    assert sizes.tolist() == [3, 0, 1, 0, 2, 0, 1]


def test_linking_groups_of_equal_keys() -> None:
    keys = np.array([7, 3, 7, 5, 7, 3, 5, 6, 3, 5], np.uint64)
    numbers = np.array([4, 0, 1, 2, 3, 9, *earlier_code(np.array([0, 1, 2, 3])).tolist()])
    codes = [int(earlier_code(np.array(number))) for number in (0, 2, 3)]
    found = linked(keys, numbers)
    expected = [(codes[0], 2), (codes[1], 0), (codes[2], 2), (0, 9), (1, 3), (1, 4)]
    assert sorted(map(tuple, found.tolist())) == sorted(expected)
    assert len(linked(keys[:0], numbers[:0])) == len(linked(keys[6:], numbers[6:])) == 0


@pytest.mark.parametrize("parts", [1, 3, 8])
def test_who_survives_does_not_depend_on_the_parts(tmp_path: Path, parts: int) -> None:
    """Divides clusters into any number of parts: the best document stays, or that of an earlier run if there is one."""
    draw = np.random.default_rng(5)
    write_table(tmp_path / "filter", "s/0", pa.table({"row": range(300), "verdict": [""] * 300}))
    write_table(tmp_path / "dedup", "s/0", pa.table({"row": range(40), "verdict": [""] * 40}))
    np.save(tmp_path / "matched.npy", np.arange(0, 40, 4))
    earlier = [EarlierRun(str(tmp_path), Numbering(tmp_path / "dedup"), 0, {})]
    population = Population(Numbering(tmp_path / "filter"), earlier, str(tmp_path / "matched.npy"))
    arrays = ClusterArrays(tmp_path, population.documents, "w+")
    arrays.of("labels")[:] = np.sort(draw.integers(0, 120, 310))[draw.permutation(310)]
    count_members(arrays.of("labels"), arrays.of("sizes"))
    arrays.of("quality")[:], arrays.of("chars")[:] = draw.integers(0, 3, 310) / 2, draw.integers(0, 3, 310)
    step = ChooseSurvivors(str(tmp_path), population, parts, False, None, "")
    for rank in range(2):
        list(step.run(None, rank, 2))
    found = np.concatenate([np.load(tmp_path / chosen(part)) for part in range(parts)], axis=1)
    stays = dict(zip(found[0].tolist(), found[1].tolist(), strict=True))
    clusters = defaultdict(list)
    for number, root in enumerate(arrays.of("labels").tolist()):
        clusters[root].append(number)
    assert len(stays) == sum(len(members) for members in clusters.values() if len(members) > 1)
    sizes = dict(zip(found[0].tolist(), found[2].tolist(), strict=True))
    for members in clusters.values():
        known = [number for number in members if number >= 300]
        best = min(members, key=lambda n: (-arrays.of("quality")[n], -arrays.of("chars")[n], n))
        for number in members if len(members) > 1 else ():
            assert stays[number] == (number if number in known else known[0] if known else best)
            assert number in known or sizes[number] == len(members) - len(known)


def test_ranges_cover_every_key_once() -> None:
    todo = key_ranges([0, 3], documents=1000, memory=10_000)
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
        todo = [job for kind in (0, 1) for job in key_ranges([kind], 48 * ranges, 48 * 48)][: 2 * ranges]
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
    assert found.numbers(0, np.array([0, 2, 5, 7])).tolist() == [0, NOT_KEPT, 1, NOT_KEPT]
    assert found.numbers(1, np.array([1])).tolist() == [NOT_KEPT]
    assert found.numbers(2, np.array([3])).tolist() == [2]


def test_arrays_keep_ids(tmp_path: Path) -> None:
    ClusterArrays(tmp_path, 3, "w+").of("id_end")[:] = [3, 3, 9]
    (tmp_path / "ids").write_bytes("abc鲸def".encode())
    arrays = ClusterArrays(tmp_path, 3)
    assert arrays.ids([2, 0, 1]) == ["鲸def", "abc", ""]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Demo documents, and copies of them in which 0.2% to 10% of the words are changed."""
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
    """Counts the pairs that share a key, against the true Jaccard similarity of all pairs."""
    settings = DedupConfig()
    hasher = MinHasher(settings)
    keys = np.stack([hasher.keys(text, Splitter.spaces) for text in texts])
    grams = [np.unique(shingles(text, settings.ngram)) for text in texts]
    groups = len(texts) // 5  # a group is an original and its four copies; different groups share almost no n-grams
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
    assert high > 100 and found == high  # at 0.9, the chance to miss a pair is 4e-4
    # Four standard errors; the ten pairs of a group may be fully correlated.
    assert abs(met - expected) < 4 * (10 * variance) ** 0.5
