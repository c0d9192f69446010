"""Tests that pages which would take minutes are refused by their tags or stopped by the kernel, one by one."""

import gzip
import time
from pathlib import Path

import pytest
from fastwarc.warc import ArchiveIterator

from data_pipeline.extraction import page_limits
from data_pipeline.extraction.extractors import main_text
from data_pipeline.extraction.page_limits import PageReader, too_complex
from data_pipeline.reading.page_decoding import decode_page
from tests.demo_corpus import DEMO
from tests.unit.data_pipeline.extraction.slow_page import SLOW

MANY = "<html><body><main>" + "<p>Call me Ishmael. Some years <b>ago</b>, never mind.</p>" * 2_000 + "</main></body>"


def test_a_page_that_takes_too_long_is_left_and_the_next_one_read() -> None:
    assert not too_complex(SLOW) and not too_complex(MANY)
    with PageReader("resiliparse", 1) as read:
        started = time.monotonic()
        assert read(MANY) == (*main_text(MANY), "")
        assert read(SLOW) == ("", "", "page_too_slow")
        assert read(MANY) == (*main_text(MANY), "")
        # Two seconds of processor time at most, on a machine that others use too; SLOW would take forty.
        assert time.monotonic() - started < 30


@pytest.mark.parametrize("first", ["resiliparse", "trafilatura"])
def test_pages_are_read_to_the_same_text_in_either_process(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with gzip.open(DEMO / "web.warc.gz") as file:
        records = zip(ArchiveIterator(file), range(60), strict=False)
        pages = [decode_page(record.reader.read()).text for record, _ in records]
    pages = [*sorted(pages, key=len)[-8:], "<p>lone \udcff surrogate and NUL \0</p>", "", "<html></html>"]
    with PageReader(first, 60) as read:
        here = [read(page) for page in pages]
        monkeypatch.setattr(page_limits, "_MANY_TAGS", -1)
        assert [read(page) for page in pages] == here
    assert sum(bool(text) for text, _, _ in here) >= 8
    assert [reason for _, _, reason in here] == [""] * 8 + ["extractor_failed", "", ""]  # no parser takes surrogates


def test_a_parser_that_fails_or_crashes_costs_one_page(monkeypatch: pytest.MonkeyPatch) -> None:
    with PageReader("resiliparse", 60) as read:
        assert read(MANY)[2] == ""
        assert read._helper is not None
        read._helper.kill()
        assert read(MANY) == ("", "", "extractor_failed")
        assert read(MANY)[2] == ""

    def fail(*args: object) -> None:
        raise RecursionError

    monkeypatch.setattr(page_limits, "main_text", fail)
    with PageReader("resiliparse", 60) as read:
        assert read("<p>x</p>") == ("", "", "extractor_failed")


def test_no_process_is_left_behind() -> None:
    with PageReader("resiliparse", 60) as read:
        read(MANY)
        helper = read._helper
        assert helper is not None and Path(f"/proc/{helper.pid}").exists()
    assert helper.returncode == 0


def test_depth_is_bounded_by_itself_and_together_with_the_number_of_tags() -> None:
    assert too_complex("<div>" * 2_001)
    assert not too_complex("<div>" * 1_999)
    assert too_complex("<div>" * 1_900 + "<b>x</b>" * 30_000)  # resiliparse takes 10 s
    assert not too_complex("<div>" * 30 + "<b>x</b>" * 300_000)  # it takes half a second
    assert not too_complex(SLOW)
