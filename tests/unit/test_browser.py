"""The browser that pages are looked at with finds each kind of fault, and none in a page without any."""

from pathlib import Path

import pytest

from pages import figure, page
from tests.browser import Browser

WIDE = '<div style="width: 500px">words</div>'
PALE = '<p style="color: #999; background: #bbb">pale words</p>'
SMALL = figure("Chart", 1600, 100, ['<text x="9" y="50">tiny words</text>'])
FETCHES = '<img src="https://example.org/a.png" alt="">'
FAILS = "<script>console.error('broken'); undefined_function()</script>"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (WIDE, ["scrolls sideways: 5"]),
        (PALE, ["contrast of 1.48: pale words"]),
        (SMALL, ["pixels in a drawing: tiny words"]),
        (FETCHES, ["asks for https://example.org/a.png"]),
        (FAILS, ["broken", "undefined_function"]),
        ("<p>Words.</p>", []),
    ],
)
def test_each_kind_of_fault_is_found(browser: Browser, tmp_path: Path, body: str, words: list[str]) -> None:
    path = tmp_path / "page.html"
    path.write_text(page("Title", [body]), encoding="utf-8")
    found = browser.faults(path, 390, "light")
    assert bool(found) == bool(words) and all(any(word in fault for fault in found) for word in words), found


def test_the_colour_scheme_is_that_asked_for(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    style = "@media (prefers-color-scheme: dark) { p { color: #191918 !important; } }"
    path.write_text(page("Title", ["<p>only dark</p>"], style), encoding="utf-8")
    assert not browser.faults(path, 1280, "light")
    assert "contrast of 1.00: only dark" in browser.faults(path, 1280, "dark")[0]
