"""Fingerprints, clusters and survivors."""

import numpy as np

from configs.data import DedupConfig
from data_pipeline.dedup import clusters, survivors
from data_pipeline.scan.words import Splitter
from data_pipeline.signatures import MinHasher, exact_hash

WORDS = [f"word{number}" for number in range(4000)]


def pair(common: int, own: int) -> tuple[str, str]:
    """Two texts that share a run of `common` words and have `own` more each."""
    return " ".join(WORDS[: common + own]), " ".join(WORDS[:common] + WORDS[-own:])


def test_exact_hash_ignores_case_and_spaces_only() -> None:
    assert exact_hash("Call  me\nIshmael") == exact_hash("call me ishmael ")
    assert exact_hash("Call me, Ishmael") != exact_hash("Call me Ishmael")


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


def test_chinese_near_duplicates_meet() -> None:
    hasher = MinHasher(DedupConfig())
    text = "".join(chr(0x4E00 + number * 7919 % 5000) for number in range(800))
    one, other = hasher.keys(text, Splitter.cjk), hasher.keys(text[:600] + "改" + text[601:], Splitter.cjk)
    assert (one == other).any()


def test_keys_do_not_depend_on_the_documents_seen_before() -> None:
    fresh, used = MinHasher(DedupConfig()), MinHasher(DedupConfig())
    used.keys("some other text that fills the cache", Splitter.spaces)
    assert (fresh.keys("a b c d e f g", Splitter.spaces) == used.keys("a b c d e f g", Splitter.spaces)).all()
    assert len(fresh.keys("short", Splitter.spaces)) == 14


def test_clusters_join_through_a_third() -> None:
    exact = np.array(["a", "b", "a", "c", "d"])
    keys = np.array([[1, 9], [2, 8], [3, 7], [2, 7], [5, 5]], np.uint64)
    same, near = clusters(exact, keys)
    assert same.tolist() == [0, 1, 0, 3, 4]
    assert near.tolist() == [0, 0, 0, 0, 4]  # 0=2 exactly, 2-3 by band 1, 3-1 by band 0


def test_the_best_document_survives() -> None:
    labels = np.array([0, 0, 0, 3, 3, 5])
    quality = np.array([0.5, 0.9, 0.9, 0.7, 0.7, 0.1])
    chars = np.array([99, 10, 20, 5, 5, 1])
    assert survivors(labels, quality, chars).tolist() == [2, 2, 2, 3, 3, 5]
