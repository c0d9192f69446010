"""Rules of C4 and RefinedWeb that drop lines of web pages, and the page scores that follow from them.

C4 (Raffel et al. 2020, arXiv 1910.10683) exists in several implementations; each is a `C4Rules`. RefinedWeb (Penedo et
al. 2023, arXiv 2306.01116, appendix G.2) is implemented as in DCLM (Li et al. 2024, arXiv 2406.11794). A dropped line
gets the first reason that applies. A sentence ends with . ? ! … before white space or the line's end, or with the CJK
form of one of them; abbreviations are not recognized.
"""

from dataclasses import dataclass
from enum import IntEnum

import numba
import numpy as np

from data_pipeline.scan.characters import ALPHA, CJK, DIGIT, SPACE, UPPER, WORD
from data_pipeline.scan.line_scores import ends_in_ellipsis, trim
from data_pipeline.scan.words import span_hash, word_hash


class Phrase(IntEnum):
    """Kind of a phrase that `Scanner` searches for in the lower-cased text, for use by these rules."""

    lorem_ipsum = 0
    javascript = 1
    policy = 2
    cart = 3
    read_more = 4
    sign_in = 5


PHRASES: tuple[tuple[str, Phrase], ...] = (
    ("lorem ipsum", Phrase.lorem_ipsum),
    ("javascript", Phrase.javascript),
    ("terms of use", Phrase.policy),
    ("privacy policy", Phrase.policy),
    ("cookie policy", Phrase.policy),
    ("uses cookies", Phrase.policy),
    ("use of cookies", Phrase.policy),
    ("use cookies", Phrase.policy),
    ("items in cart", Phrase.cart),
    ("read more...", Phrase.read_more),
    ("sign-in", Phrase.sign_in),
)


class LineDrop(IntEnum):
    """Reason why a line is dropped; 0 means it is kept."""

    kept = 0
    long_word = 1
    no_end = 2
    few_words = 3
    javascript = 4
    policy = 5
    uppercase = 6
    numeric = 7
    counter = 8
    one_word = 9
    boilerplate = 10


@dataclass(frozen=True)
class C4Rules:
    """Settings of one published implementation of C4's line rules."""

    min_words: int
    end_marks: str  # characters in one of which a line must end to be kept; empty: any
    policy: bool  # whether lines with cookie and privacy phrases are dropped
    citations: bool  # whether "[1]", "[edit]" and "[citation needed]" at a line's end are ignored
    page_bracket: bool  # whether "{" and lorem ipsum count anywhere on the page, not only in lines kept so far
    max_word_length: int = 1000


C4_RULES = {
    "paper": C4Rules(5, '.?!"', policy=False, citations=False, page_bracket=True),
    "reference": C4Rules(5, '.?!"', policy=True, citations=True, page_bracket=False),
    "datatrove": C4Rules(3, ".?!\"'", policy=True, citations=True, page_bracket=False),
    "fineweb": C4Rules(3, "", policy=True, citations=True, page_bracket=False),
}
# Words are compared by hash, since compiling code with strings takes seconds.
_CITATIONS = np.array([word_hash(word) for word in ("edit", "citation needed")], np.uint64)
_COUNTED = np.array(
    [
        word_hash(word)
        for word in (
            "likes", "shares", "comments", "retweets", "reposts", "quotes", "bookmarks", "upvotes", "downvotes",
            "downloads", "views", "followers",
        )
    ],
    np.uint64,
)  # fmt: skip
_OPEN, _CLOSE, _CURLY, _DOT = 0x5B, 0x5D, 0x7B, 0x2E


@numba.njit(cache=True, nogil=True)
def c4_lines(
    codes: np.ndarray,
    kinds: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    hits: np.ndarray,
    marks: np.ndarray,
    min_words: int,
    max_word_length: int,
    policy: bool,
    citations: bool,
) -> tuple[np.ndarray, int, bool, bool]:
    """Applies C4's rules to all lines.

    Returns (LineDrop of each line, uint8 [lines]; sentences in kept lines; whether there is "lorem ipsum"; whether
    there is a curly bracket). The last two look only at lines that the rules checked before them have kept. `hits` is
    int64 [n, 2], position and Phrase, sorted by position; `marks` is uint32, the characters in which a line may end,
    empty for any.
    """
    drops = np.zeros(len(starts), np.uint8)
    sentences, lorem, curly, hit = 0, False, False, 0
    for line in range(len(starts)):
        start, end = trim(codes, kinds, starts[line], ends[line])
        phrases = 0
        while hit < len(hits) and hits[hit, 0] < ends[line]:
            if hits[hit, 0] >= starts[line]:
                phrases |= 1 << hits[hit, 1]
            hit += 1
        words, longest = _words(kinds, start, end)
        if longest > max_word_length:
            drops[line] = 1
            continue
        last = _before_citations(codes, kinds, start, end) if citations else end
        if len(marks) and (not _ends_with(codes, start, last, marks) or ends_in_ellipsis(codes, start, last)):
            drops[line] = 2
            continue
        if words < min_words:
            drops[line] = 3
            continue
        lorem |= (phrases & 1) != 0
        if phrases & 2:
            drops[line] = 4
            continue
        for position in range(start, end):
            curly |= codes[position] == _CURLY
        if policy and phrases & 4:
            drops[line] = 5
            continue
        sentences += _sentences(codes, kinds, start, end)
    return drops, sentences, lorem, curly


@numba.njit(cache=True, nogil=True)
def refinedweb_lines(
    codes: np.ndarray,
    lowered: np.ndarray,
    kinds: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    hits: np.ndarray,
) -> tuple[np.ndarray, int, int]:
    """Applies RefinedWeb's rules; returns (LineDrop of each line, uint8 [lines]; words in dropped lines; all words)."""
    drops = np.zeros(len(starts), np.uint8)
    gone = total = hit = 0
    for line in range(len(starts)):
        start, end = trim(codes, kinds, starts[line], ends[line])
        cart = more = sign = False
        while hit < len(hits) and hits[hit, 0] < ends[line]:
            position, phrase = hits[hit, 0], hits[hit, 1]
            if position >= starts[line]:
                cart |= phrase == 3
                more |= phrase == 4 and position + 12 == end
                sign |= phrase == 5 and position == start
            hit += 1
        if start == end:
            continue
        words, _ = _words(kinds, start, end)
        upper = letters = digits = 0
        for position in range(start, end):
            upper += (kinds[position] & UPPER) != 0
            digits += (kinds[position] & DIGIT) != 0
            letters += (kinds[position] & ALPHA) != 0
        cjk = (kinds[start] & CJK) != 0  # a line in such a script often has no space in it
        if 2 * upper > end - start:
            drops[line] = 6
        elif digits and not letters:
            drops[line] = 7
        elif _counter(kinds, lowered, start, end):
            drops[line] = 8
        elif words < 2 and not cjk:
            drops[line] = 9
        elif cart or ((more or sign) and words <= 10):
            drops[line] = 10
        total += words
        gone += words if drops[line] else 0
    return drops, gone, total


@numba.njit(cache=True, nogil=True)
def _words(kinds: np.ndarray, start: int, end: int) -> tuple[int, int]:
    """Returns (number of pieces between white space, characters of the longest one)."""
    words = longest = run = 0
    for position in range(start, end):
        run = 0 if kinds[position] & SPACE else run + 1
        words += run == 1
        longest = max(longest, run)
    return words, longest


@numba.njit(cache=True, nogil=True)
def _ends_with(codes: np.ndarray, start: int, end: int, marks: np.ndarray) -> bool:
    if start >= end:
        return False
    found = False
    for mark in marks:
        found |= codes[end - 1] == mark
    return found


@numba.njit(cache=True, nogil=True)
def _before_citations(codes: np.ndarray, kinds: np.ndarray, start: int, end: int) -> int:
    """Returns the end of a line without "[12]", "[edit]" and "[citation needed]" at its end."""
    while end > start and codes[end - 1] == _CLOSE:
        position = end - 2
        while position >= start and codes[position] != _OPEN and end - position <= 18:
            position -= 1
        if position < start or codes[position] != _OPEN or not _citation(codes, kinds, position + 1, end - 1):
            break
        end = position
    return end


@numba.njit(cache=True, nogil=True)
def _citation(codes: np.ndarray, kinds: np.ndarray, start: int, end: int) -> bool:
    digits = True
    for position in range(start, end):
        digits &= (kinds[position] & DIGIT) != 0
    return digits or _is_one_of(span_hash(codes, start, end), _CITATIONS)


@numba.njit(cache=True, nogil=True)
def _is_one_of(value: np.uint64, hashes: np.ndarray) -> bool:
    found = False
    for known in hashes:
        found |= value == known
    return found


@numba.njit(cache=True, nogil=True)
def _is_end(code: np.uint32) -> bool:
    return code in (0x2E, 0x3F, 0x21, 0x2026, 0x3002, 0xFF1F, 0xFF01, 0xFF0E)  # . ? ! … 。 ？ ！ ．


@numba.njit(cache=True, nogil=True)
def _sentences(codes: np.ndarray, kinds: np.ndarray, start: int, end: int) -> int:
    """Counts the sentences of a line; words after the last end mark count as one too."""
    count, inside = 0, False
    for position in range(start, end):
        code = codes[position]
        if inside and _is_end(code) and (position + 1 == end or not _is_end(codes[position + 1])):
            after = position + 1
            while after < end and codes[after] in (0x22, 0x27, 0x29, 0x5D, 0x201D, 0x2019, 0x300D, 0x300F):
                after += 1  # closing quotes and brackets belong to the sentence
            if after == end or kinds[after] & SPACE or code >= 0x3000:
                count += 1
                inside = False
                continue
        if kinds[position] & WORD:
            inside = True
    return count + inside


@numba.njit(cache=True, nogil=True)
def _counter(kinds: np.ndarray, lowered: np.ndarray, start: int, end: int) -> bool:
    """Whether a line is only a number and the thing it counts, such as "3 likes" or "1.2k views"."""
    position = start
    while position < end and not kinds[position] & WORD:
        position += 1
    if position == end or not kinds[position] & DIGIT:
        return False
    while position < end and not kinds[position] & SPACE:
        if not kinds[position] & DIGIT and lowered[position] not in (0x2C, 0x2E, 0x6B, 0x6D, 0x62):
            return False  # digits , . k m b
        position += 1
    while position < end and kinds[position] & SPACE:
        position += 1
    last = end
    while last > position and not kinds[last - 1] & WORD:
        last -= 1
    return _is_one_of(span_hash(lowered, position, last), _COUNTED)
