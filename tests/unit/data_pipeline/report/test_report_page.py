"""Tests that the page of a real run is complete and well-formed, fetches nothing, and has the ledger's numbers."""

import itertools
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import command
from data_pipeline.report import ledger_tables as report
from data_pipeline.report.report_page import chain_of
from tests.browser import Browser
from tests.unit.data_pipeline.report.reported_run import MAIL

_DROPPING = ("extract", "language", "filter", "dedup", "decontaminate", "documents")


class Tags(HTMLParser):
    """Parser that checks the nesting of tags and collects attributes that could fetch something and cells by row."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.headings: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.rows[-1][-1] += data
        elif self.open[-1:] == ["h2"]:
            self.headings.append(data)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    assert not tags.open and not tags.links
    assert not tags.names & {"script", "link", "img", "iframe", "object", "base"}
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) > 10
    for drawing in drawings:
        root = ET.fromstring(drawing)  # raises an error with line and column if it is not well-formed
        for element in root.iter():
            for name, value in element.attrib.items():
                assert "nan" not in value and "inf" not in value, (name, value)
                if name in ("width", "height"):
                    assert float(value) >= 0


def test_the_page_is_legible_on_a_phone_and_a_desktop(browser: Browser, run_dir: Path, page: str) -> None:
    assert not browser.all_faults(run_dir / "report.html")


def test_text_of_documents_is_masked_and_escaped(page: str) -> None:
    assert MAIL not in page and "&lt;EMAIL&gt;" in page
    assert "alert(" in page and "<script" not in page  # shown as text, not run
    assert "copy-" in page and "<b>;" not in page and re.search(r"copy-\d&lt;b&gt;", page)


def test_stages_stand_in_the_table_with_the_ledgers_numbers(page: str, ledger: dict[str, Any]) -> None:
    tags = Tags()
    tags.feed(page)
    rows = {row[0]: row for row in tags.rows if len(row) == 10}
    for stage in ledger["stages"]:
        total = stage["total"]
        lost = [sum(amount[unit] for amount in total["dropped"].values()) for unit in ("documents", "bytes")]
        expected = [total["in"]["documents"], total["kept"]["documents"], lost[0]]
        expected += [total["in"]["bytes"], total["kept"]["bytes"], lost[1], total["passed_on"]["bytes"]]
        assert [int(cell.replace(",", "")) for cell in rows[stage["name"]][1:8]] == expected
    watched = [stage for stage in ledger["stages"] if stage["name"] in _DROPPING]
    assert all(stage["total"]["dropped"] for stage in watched)
    for stage in watched:
        for reason, amount in stage["total"]["dropped"].items():
            said = (
                f"{amount['documents']:,} (" if amount["documents"] else f"{amount['bytes']:,} bytes out of documents"
            )
            assert f"<b>{reason}</b> {said}" in page


def test_the_flow_goes_on_from_stage_to_stage_without_a_gap(page: str, ledger: dict[str, Any]) -> None:
    chain = chain_of({stage["name"]: stage for stage in ledger["stages"]})
    names = [stage["name"] for stage in chain]
    *before, last, tokens, plan = names
    assert before == ["extract", "language", "score", "filter", "dedup", "decontaminate"]
    assert (last, tokens, plan) == ("documents", "tokens", "plan")
    for one, after in itertools.pairwise(chain):
        assert one["total"]["passed_on"] == after["total"]["in"]
    found = [int(number.replace(",", "")) for number in re.findall(r"<title>([\d,]+) go on</title>", page)]
    assert found == [stage["total"]["passed_on"][unit] for unit in ("documents", "bytes") for stage in chain]


def test_a_narrow_screen_has_the_flow_as_a_list(page: str, ledger: dict[str, Any]) -> None:
    lists = re.findall(r'<div class="narrow">(.*?)</div></figure>|<div class="narrow">(.*?)</figure>', page)
    assert len(lists) == 2
    shown = "".join(lists[0])
    for stage in chain_of({one["name"]: one for one in ledger["stages"]}):
        assert f"<b>{stage['name']}</b> {stage['total']['in']['documents']:,} in" in shown
    assert "@media (max-width: 760px) { .wide { display: none; } .narrow { display: block; }" in page


def test_a_run_that_is_partly_done_and_then_has_a_mixture_in_stages(config: Path, tmp_path: Path) -> None:
    here = f"run.dir={tmp_path}/run"
    headings: set[str] = set()
    for until, more in (
        ("extract", {"Stages", "Config"}),
        ("score", {"Languages", "Sizes of documents"}),
        ("filter", {"Why documents were dropped", "Scores and thresholds"}),
        ("dedup", {"Duplicates"}),
        ("documents", set()),
        ("tokens", set()),
    ):
        assert command.main([str(config), here, "--until", until]) == 0
        assert report.main([str(config), here]) == 0
        tags = Tags()
        tags.feed((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
        headings |= more
        assert headings <= set(tags.headings), until
        assert "Tokens and mixture" not in tags.headings
    late = "mixture.stages.late={samples=20, seq_length=128, weights={code=1.0}}"
    assert command.main([str(config), here, "mixture.stages.general={}", late]) == 0
    assert report.main([str(config), here]) == 0
    tags = Tags()
    tags.feed((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    rows = [row[:3] for row in tags.rows if len(row) == 8 and row[0]]
    assert rows[-3:] == [["prose", "75", "75.00%"], ["code", "25", "25.00%"], ["code", "20", "100.00%"]]
    assert [row[5] for row in tags.rows if len(row) == 9 and row[0] in ("prose", "code", "all")][-3:] == [
        "45",
        "75",
        "120",
    ]


def test_the_page_is_the_runs_whatever_the_file_says_now(config: Path, run_dir: Path, page: str) -> None:
    assert report.main([str(config), "rules.english.word_count.min=10"]) == 0
    assert (run_dir / "report.html").read_text(encoding="utf-8") == page


def test_mixture_and_bytes_per_token(run_dir: Path, page: str, ledger: dict[str, Any]) -> None:
    tags = Tags()
    tags.feed(page)
    rows = {row[0]: row for row in tags.rows if len(row) == 9}
    tokens = next(stage for stage in ledger["stages"] if stage["name"] == "tokens")
    for name, counts in tokens["sources"].items():
        assert int(rows[name][3].replace(",", "")) == counts["notes"]["tokens"]
        assert float(rows[name][4]) == pytest.approx(counts["kept"]["bytes"] / counts["notes"]["tokens"], abs=5e-4)
    assert [rows[name][5:7] for name in ("prose", "code", "all")] == [
        ["75", "75.00%"],
        ["25", "25.00%"],
        ["100", "100.00%"],
    ]
