"""Tests the extraction of main text, and what text repair changes and leaves alone."""

import gzip
import json
import random

import ftfy
import pytest
from ftfy.badness import BADNESS_RE, MOJIBAKE_CATEGORIES

from data_pipeline.extraction import extract as extraction
from data_pipeline.extraction import extractors
from data_pipeline.extraction.extract import repair
from data_pipeline.extraction.extractors import main_text
from tests.demo_corpus import DEMO

PAGE = """<html><head><title>T</title><script>var x = 1;</script></head><body>
<nav><a href="/">Home</a> <a href="/about">About us</a></nav>
<main><h1>Whales</h1><p>Call me Ishmael. Some years ago, never mind how long precisely.</p></main>
</body></html>"""


@pytest.mark.parametrize("first", ["resiliparse", "trafilatura"])
def test_main_text_leaves_out_navigation_and_scripts(first: str) -> None:
    text, extractor = main_text(PAGE, first)
    assert "Call me Ishmael." in text
    assert "var x" not in text
    assert "About us" not in text
    assert extractor == first


def test_trafilatura_is_asked_where_resiliparse_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractors, "extract_plain_text", lambda *args, **kwargs: "  \n")
    text, extractor = main_text(PAGE)
    assert "Call me Ishmael." in text
    assert extractor == "trafilatura"


def test_a_page_without_text() -> None:
    assert main_text("<html><body><script>1</script></body></html>") == ("", "")


@pytest.mark.parametrize(
    ("damaged", "whole"),
    [
        ("schÃ¶n und grÃ¼n", "schön und grün"),
        ("two\r\nlines", "two\nlines"),
        ("a\x07bell", "abell"),
        ("\x1b[36mblue\x1b[0m", "blue"),
        ("cafe\u0301", "café"),
    ],
)
def test_damage_is_repaired(damaged: str, whole: str) -> None:
    assert repair(damaged) == whole


@pytest.mark.parametrize(
    "text", ["话说天下大势，分久必合！（完）", "“curly” ‘quotes’", "tab\tand\nlines  ", "&amp; stays"]
)
def test_sound_text_is_left_alone(text: str) -> None:
    assert repair(text) == text


def test_repair_is_ftfys_though_most_texts_are_not_shown_to_it() -> None:
    """Compares results on real texts, and on strings of all characters in ftfy's own pattern, mostly punctuation."""
    named = sorted({character for character in BADNESS_RE.pattern if ord(character) > 0x7F})
    draw = random.Random(0)
    plain = "abcXYZ 12.,!?\"' \n·´–—―…’ 中文，。e\u0301"
    plain += MOJIBAKE_CATEGORIES["start_punctuation"] + MOJIBAKE_CATEGORIES["end_punctuation"]
    for alphabet in (plain, plain + "".join(named) + "\r\x85\x1b[31m\ufeff\u2028\ud83d\ude00"):
        for _ in range(5_000):
            text = "".join(draw.choices(alphabet, k=draw.randrange(12)))
            assert repair(text) == ftfy.fix_text(text, extraction._REPAIR), repr(text)
    for source in ("english", "chinese", "code"):
        with gzip.open(DEMO / f"{source}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in lines.readlines()[::20]:
                text = json.loads(line)["text"][:5_000]
                assert repair(text) == ftfy.fix_text(text, extraction._REPAIR)
