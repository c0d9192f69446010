"""Tests that English words are those of spaCy: recorded results, and, if spaCy is installed, real text."""

import gzip
import json
import random
import time
from pathlib import Path

import pytest

from configs.data import RuleSet
from data_pipeline.scan.english import words_of

ROOT = Path(__file__).parents[4]


def words(text: str) -> list[str]:
    starts, ends = words_of(text)
    return [text[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("text", "expected"),  # words as split by spaCy 3.8.18
    [
        (
            "Write to jane.roe@acme-corp.com, or see http://www.example.org/a?b=c#d",
            "Write | to | jane.roe@acme-corp.com | , | or | see | http://www.example.org/a?b=c#d",
        ),
        ("(13.6.1).", "( | 13.6.1 | ) | ."),
        (
            "From: Jane Roe <jane@example.org> on mail.example.org:25",
            "From | : | Jane | Roe | < | jane@example.org | > | on | mail.example.org:25",
        ),
        (
            "Hosts 8.8.8.8 and 127.0.0.1, file.txt, www.x.co.uk.",
            "Hosts | 8.8.8.8 | and | 127.0.0.1 | , | file.txt | , | www.x.co.uk | .",
        ),
        ("and Upper.Lower", "and | Upper | . | Lower"),
        (
            "I don't, can't, cannot; we'll've, he'd,",
            "I | do | n't | , | ca | n't | , | can | not | ; | we | 'll | 've | , | he | 'd | ,",
        ),
        ("it's O'Brien's y'all 'em", "it | 's | O'Brien | 's | y' | all | 'em"),
        ("Don’t! it’s ’tis", "Do | n’t | ! | it | ’s | ’ | tis"),
        ("dont wont im id ill hes", "do | nt | wo | nt | i | m | i | d | ill | he | s"),
        ("U.S. e.g. Mr. Smith, Ph.D., at", "U.S. | e.g. | Mr. | Smith | , | Ph.D. | , | at"),
        ("10a.m. or 5pm in N.Y.", "10 | a.m. | or | 5 | pm | in | N.Y."),
        (
            "well-known state-of-the-art 1-2 pre--war a–b x-1",
            "well | - | known | state | - | of | - | the | - | art | 1 | - | 2 | pre | -- | war | a | – | b | x-1",
        ),
        ("1990s-era", "1990s | - | era"),
        ("$5.00 US$3 10km 5% 20°C. 3+", "$ | 5.00 | US$ | 3 | 10 | km | 5 | % | 20 | ° | C | . | 3 | +"),
        ("+4 x+y 2^3 1,000,000 a,b and/or", "+4 | x+y | 2 | ^ | 3 | 1,000,000 | a | , | b | and/or"),
        ("either/or key=value a:b 3:4", "either | / | or | key | = | value | a | : | b | 3:4"),
        (
            "(see [1]) {x} <b>bold</b> \"quoted\" ``tex''",
            "( | see | [ | 1 | ] | ) | { | x | } | < | b | > | bold</b | > | \" | quoted | \" | ` | ` | tex | ''",
        ),
        ("-- ... .... wait...what", "-- | ... | .... | wait | ... | what"),
        (":-) :) ;-) <3 ^_^ 😀😀", ":-) | :) | ;-) | <3 | ^_^ | 😀 | 😀"),
        ("©2024 ★a☆ →", "© | 2024 | ★ | a | ☆ | →"),
        (
            "end.Next sentence.next 3.14.15 v2.0-rc1 C++ c++",
            "end | . | Next | sentence.next | 3.14.15 | v2.0 | - | rc1 | C++ | c++",
        ),
        ("a.b.c foo_bar __init__ #tag @user x*y", "a.b.c | foo_bar | _ | _ | init | _ | _ | # | tag | @user | x*y"),
        (
            "naïve café Ünïcode.Test здравствуй,мир 三国演义 a\xa0b",
            "naïve | café | Ünïcode | . | Test | здравствуй | , | мир | 三国演义 | a | b",
        ),
    ],
)
def test_special_forms_are_cut_as_spacy_cuts_them(text: str, expected: str) -> None:
    assert words(text) == expected.split(" | ")


def test_white_space_of_any_kind_parts_words() -> None:
    assert words(" a\t\nb\u00a0c\u3000d\r\n") == ["a", "b", "c", "d"]
    assert words("") == words(" \n ") == []


def test_time_does_not_grow_faster_than_the_text() -> None:
    """Splits long pieces without white space in time: a quadratic splitter would take minutes."""
    for piece in ("(" * 200_000, "." * 200_000, "a:b@" * 50_000, "a." * 100_000, "x" * 200_000, ")-" * 100_000):
        started = time.process_time()
        starts, ends = words_of(piece)
        assert time.process_time() - started < 5
        assert (starts[1:] == ends[:-1]).all() and (starts[0], ends[-1]) == (0, len(piece))


def real_texts() -> list[str]:
    """Returns English, code and Chinese texts of the demo, and this project's Markdown and Python files."""
    found = [path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.md"), *ROOT.glob("data_pipeline/*/*.py")]]
    for name in ("english", "code", "chinese"):
        with gzip.open(ROOT / f"data/demo/{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            found += [json.loads(line)["text"][:4_000] for line in lines][::25]
    return found


def test_words_are_spacys_on_real_text_and_on_random_signs() -> None:
    english = pytest.importorskip("spacy.lang.en").English()
    draw = random.Random(7)
    alphabet = "aBc1.,:;'’-–—()[]\"“/@#*&%+=<>_~$€°…😀😶é三\u0301sS!?kmd"
    signs = ["".join(draw.choices(alphabet, k=draw.randrange(1, 60))) for _ in range(2_000)]
    pieces = {piece for text in real_texts() for piece in text.split() if len(piece) <= 500}
    assert len(pieces) > 20_000
    for piece in [*sorted(pieces), *signs]:
        assert words(piece) == [token.text for token in english.tokenizer(piece) if token.text.strip()]


def test_verdicts_are_stock_datatroves_on_real_text() -> None:
    """Compares verdicts with those of unchanged datatrove filters, which use spaCy: at least 98% are equal."""
    pytest.importorskip("spacy")
    from tests.bench.data_pipeline.agreement import agreement, peers

    texts = real_texts()
    for name, peer in peers().items():
        same, kept = agreement(name, peer, texts)
        assert same >= 0.98 * len(texts), name
        assert 0 < kept < len(texts) and RuleSet(use=(name,)).bounds()
