"""Tests splitters, lines and n-grams of the compiled scan against plain Python on random strings."""

import random
import re
from collections import Counter

import numpy as np
import pytest

from data_pipeline.scan.characters import codes_of, kinds_of
from data_pipeline.scan.line_scores import gopher_duplicates, lines_of, paragraphs_of, repeated
from data_pipeline.scan.repetition import ngram_scores
from data_pipeline.scan.words import Splitter, describe, split, word_hash

# Letters, signs, every kind of line break, CJK, an ideograph beyond U+1FFFF, marks, a lone surrogate.
ALPHABET = "ab  \n\n\r\t\v\x1c\x85\u2028.,!--_'’…•#{三国\U00020001é\u0301９\ud800"


def strings(count: int, longest: int = 60, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(ALPHABET, k=draw.randrange(1, longest))) for _ in range(count)]


def words_of(text: str, splitter: Splitter) -> list[str]:
    codes = codes_of(text)
    starts, ends = split(codes, kinds_of(codes), int(splitter))
    return [text[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


def test_splitters_by_hand() -> None:
    assert words_of("Don't  stop,\nnow... --x", Splitter.spaces) == ["Don't", "stop,", "now...", "--x"]
    assert words_of("Don't stop,\nnow... 'x'", Splitter.words) == ["Don't", "stop", ",", "now", "...", "'", "x", "'"]
    assert words_of("曹操用AI 3次。", Splitter.cjk) == ["曹", "操", "用", "AI", "3", "次", "。"]
    assert [Splitter.words.window(5), Splitter.cjk.window(5)] == [5, 10]


def test_splitting_at_spaces_is_pythons() -> None:
    for text in strings(500):
        assert words_of(text, Splitter.spaces) == text.split()


def test_words_are_those_of_a_regular_expression() -> None:
    cjk = "三国\U00020001"
    letter = rf"(?:(?![{cjk}])[\w\u0301])"
    expression = re.compile(rf"{letter}(?:{letter}|['’]{letter})*|[{cjk}]|(\S)\1*")
    for text in strings(500, seed=1):
        assert words_of(text, Splitter.words) == [match.group() for match in expression.finditer(text)], repr(text)


def test_lines_are_pythons() -> None:
    for text in strings(1000, seed=2):
        codes = codes_of(text)
        for any_break, expected in ((True, text.splitlines()), (False, text.split("\n"))):
            starts, ends = lines_of(codes, kinds_of(codes), any_break)
            assert [text[start:end] for start, end in zip(starts, ends, strict=True)] == expected, repr(text)


def repeats(parts: list[str]) -> tuple[int, int]:
    counts = Counter(parts)
    return sum(n - 1 for n in counts.values()), sum((n - 1) * len(part) for part, n in counts.items())


def test_repeated_lines_and_paragraphs_are_those_of_pythons_split() -> None:
    draw = random.Random(3)
    for _ in range(1000):
        text = "".join(draw.choices(["a", "b\n", "\n", "a\n\n", " "], k=draw.randrange(1, 25)))
        codes = codes_of(text)
        lines = re.split(r"\n+", text)
        assert gopher_duplicates(codes, *lines_of(codes, kinds_of(codes), False)) == (*repeats(lines), len(lines))
        paragraphs = re.split(r"\n{2,}", text.strip())
        starts, ends = paragraphs_of(codes, kinds_of(codes))
        assert [text[start:end] for start, end in zip(starts, ends, strict=True)] == paragraphs
        assert repeated(codes, starts, ends) == repeats(paragraphs)


def test_word_hashes_are_the_same_everywhere() -> None:
    codes = codes_of("the whale the 鲸")
    hashes, _ = describe(codes, kinds_of(codes), *split(codes, kinds_of(codes), 0))
    assert [int(value) for value in hashes] == [word_hash(word) for word in ("the", "whale", "the", "鲸")]
    # Signatures are compared with those of runs on other machines, so the hash may not change.
    assert word_hash("whale") == 18051826424928260988


def slow_ngram_scores(words: list[str], sizes: list[int], tops: int) -> list[int]:
    found = []
    for number, size in enumerate(sizes):
        grams = [tuple(words[position : position + size]) for position in range(len(words) - size + 1)]
        if not grams:
            found.append(0)
        elif number < tops:
            gram, count = Counter(grams).most_common(1)[0]  # a tie goes to the first one found
            found.append(count * len(" ".join(gram)))
        else:
            seen, position, total = set(), 0, 0
            while position < len(grams):
                if grams[position] in seen:
                    total += len("".join(grams[position]))
                    position += size
                else:
                    seen.add(grams[position])
                    position += 1
            found.append(total)
    return found


@pytest.mark.parametrize("vocabulary", [["a"], ["a", "bb"], ["a", "bb", "ab", "ccc", "d"], [str(n) for n in range(40)]])
def test_ngram_scores_are_those_of_plain_python(vocabulary: list[str]) -> None:
    draw = random.Random(len(vocabulary))
    sizes = [2, 3, 4, 5, 6, 7, 8, 9, 10]
    for _ in range(150):
        words = draw.choices(vocabulary, k=draw.randrange(0, 120))
        text = " ".join(words) or " "
        codes = codes_of(text)
        starts, ends = split(codes, kinds_of(codes), 0)
        hashes, _ = describe(codes, kinds_of(codes), starts, ends)
        assert ngram_scores(hashes, starts, ends, np.array(sizes), 3, 1).tolist() == slow_ngram_scores(words, sizes, 3)
